"""Fingerprints of arrays, computed on the devices that hold them.

    fingerprint(x) = sum over i of bits(x_i) * weight(i)  mod 2^32,    weight(i) odd, from the global index i

Integers add in any order, so the sum is the same on every mesh. An odd weight has an inverse mod 2^32, so every change
of one element changes the sum. The cost is one pass over memory that is already on the device. A hash of the files
would read them all again, and would depend on the mesh that wrote them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.host_memory import to_device


def fingerprints(tree: Any) -> dict[str, int]:
    """Return `{path of a leaf: fingerprint}`; equal on every mesh, changed by any change of one element."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, jax.device_get(_fingerprint_leaves(tree)).tolist(), strict=True))


@jax.jit
def _fingerprint_leaves(tree: Any) -> jax.Array:
    return jnp.stack([_fingerprint(leaf) for leaf in jax.tree.leaves(tree)])


def _fingerprint(x: jax.Array) -> jax.Array:
    x = to_device(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros_like(bits)
    for dim, size in enumerate(x.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=jax.typeof(x).sharding)
        index = index * jnp.uint32(size) + place
    index = (index ^ (index >> 16)) * jnp.uint32(0x85EBCA6B)  # murmur3's finaliser: neighbours get unrelated weights
    index = (index ^ (index >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits * (index | jnp.uint32(1)), dtype=jnp.uint32)
