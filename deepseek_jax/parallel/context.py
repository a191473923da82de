"""Context parallelism: the devices of the mesh axis `context` share the tokens of the same rows.

A row of S tokens is cut into 2 c chunks for c devices. Device i has chunk i and chunk 2 c - 1 - i, so that causal
attention costs each the same: a chunk sees the keys of all before it. Eight tokens on two devices, chunks of two:

    row          0 1   2 3   4 5   6 7
    device       0     1     1     0
    device 0     0 1 6 7           keys seen: 1 + 2 + 7 + 8 = 18
    device 1     2 3 4 5                      3 + 4 + 5 + 6 = 18

What is one number per token (ids, targets, positions, segments, weights: 20 bytes) lies whole on all of them, and a
device takes its part inside the program (`local`). So whatever looks at a neighbour (targets of MTP, documents) is
computed on whole rows, and no boundary between chunks can be seen there. What has a width (the residual stream, logits)
exists in parts only.

Attention needs keys and values of the whole row. They are linear in the latent of C channels that MLA caches, and one
rotated key of R: `gathered` brings these C + R = 576 values of each token, 1,152 bytes in BF16, instead of the
N (P + H) = 32,768 values of content keys and values, 65,536 bytes; each device makes keys and values from them itself.
Of V3 that is 33.6 MFLOP a token and layer on each of the c devices, where the attention of a query to the 65,536 keys
that it sees on average at 128K is 5.4 GFLOP: 20% more at c = 32. The alternative is a ring: keys and values (or
latents) go around while blocks are computed. It hides the transfer and needs no whole row, but takes one step per
device, and merges the softmax of each block with the rest.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.mesh import AXES, AnyMesh, axis_size
from deepseek_jax.parameters import CONTEXT, ROWS
from pallas_kernels.lowering import manual_axes


def size() -> int:
    """Return how many devices share a row on the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)


def places(length: int) -> jax.Array:
    """Return the places in their row, int32 [S], of this device's tokens of rows of `length`."""
    chunk = length // (2 * size())
    starts = jnp.stack(_chunks()) * chunk
    return (starts[:, None] + jnp.arange(chunk)).reshape(-1).astype(jnp.int32)


def local(x_BS: jax.Array) -> jax.Array:
    """Return this device's tokens of whole rows: [B, S] to [B, S / c]; the same where no device shares rows."""
    if size() == 1:
        return x_BS
    chunk = x_BS.shape[1] // (2 * size())
    return jnp.concatenate([lax.dynamic_slice_in_dim(x_BS, i * chunk, chunk, axis=1) for i in _chunks()], axis=1)


@jax.named_scope("context")
def gathered(x_BSX: jax.Array) -> jax.Array:
    """Return the whole rows of which each device has its tokens, in their order: [B, S / c, X] to [B, S, X].

    The derivative sums what all devices of the axis have for a token, in the dtype of `x_BSX`. Sums in FP32 would send
    twice the bytes, of terms that are rounded to BF16 before: they bring the gradients of a layer that eight devices
    share at most 3% nearer to FP32, from which BF16 is 0.8 to 2% away either way (experiments/log.md).
    """
    devices = size()
    if devices == 1:
        return x_BSX
    whole = lax.all_gather(x_BSX, CONTEXT, axis=1, tiled=True)
    chunks = jnp.split(whole, 2 * devices, axis=1)
    return jnp.concatenate([chunks[i] for i in np.argsort(_held(devices))], axis=1)


def total(x: jax.Array) -> jax.Array:
    """Return the sum over the devices that share rows."""
    return x if size() == 1 else lax.pcast(lax.psum(x, CONTEXT), CONTEXT, to="varying")


def once(x: jax.Array) -> jax.Array:
    """Return `x` on the first of the devices that share rows, 0 on the others: what all of them have counts once."""
    return x if size() == 1 else jnp.where(place() == 0, x, jnp.zeros_like(x))


def parts(tree: Any) -> Any:
    """Return sums that add up over the devices: what is the same on all that share rows counts once."""

    def part(x):
        shared = CONTEXT not in manual_axes.varies_over(x)
        return manual_axes.vary(once(x) if shared else x, frozenset({CONTEXT}))

    return jax.tree.map(part, tree)


def place() -> jax.Array:
    """Return this device's index among those that share rows."""
    return lax.axis_index(CONTEXT)


def order_of_devices(length: int) -> np.ndarray:
    """Return the places in a row of `length` in the order in which the devices hold them, one after the other."""
    return np.arange(length).reshape(2 * size(), -1)[_held(size())].reshape(-1)


def _chunks() -> tuple[jax.Array, jax.Array]:
    """Return which chunks of a row this device has."""
    return place(), 2 * size() - 1 - place()


def _held(devices: int) -> np.ndarray:
    """Return the chunks of a row in the order in which the devices hold them."""
    return np.array([(i, 2 * devices - 1 - i) for i in range(devices)]).reshape(-1)


def refuse_context(mesh: AnyMesh, what: str) -> None:
    """Refuse a mesh whose `context` axis has several devices, for work that does not split sequences."""
    if mesh.shape.get(CONTEXT, 1) > 1:
        raise ValueError(
            f"config.mesh.context = {mesh.shape[CONTEXT]}: {what} does not split sequences over devices; use"
            " --config.mesh.context=1 there, and more of mesh.data or mesh.expert"
        )


def readers(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Return (index, number) by which this process reads its part of each batch's rows.

    Processes whose devices share the rows (`context`) read the same ones.

    Raises:
        ValueError: the devices of a process share only a part of its rows with another process.
    """
    shape = tuple(mesh.shape[axis] for axis in AXES)
    places = np.unravel_index(np.arange(math.prod(shape)), shape)
    rows = np.ravel_multi_index([places[AXES.index(axis)] for axis in ROWS], tuple(mesh.shape[axis] for axis in ROWS))
    read: dict[int, set[int]] = {}
    for device, row in zip(mesh.devices.flat, rows.tolist(), strict=True):
        read.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in read.values()})
    if sum(map(len, parts)) != axis_size(mesh, ROWS) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"config.mesh.context = {mesh.shape[CONTEXT]}: processes share some of their rows and not others on mesh"
            f" {dict(mesh.shape)}; make mesh.node * mesh.expert a multiple or a divisor of the devices of a process"
        )
    return parts.index(tuple(sorted(read[jax.process_index()]))), len(parts)
