"""Quantisation in plain jnp: the specification that the kernels equal in every bit."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP
from pallas_kernels.quantized import Quantized, Scale, dequantize, encode, largest_magnitude, pad_rows, scale_of


def quantize_tiles(x: Array, scale: Scale) -> Quantized:
    """Return x [m, k] in tiles of 1 x 128."""
    m, k = x.shape
    groups = x.astype(jnp.float32).reshape(m, k // GROUP, GROUP)
    scales = scale_of(largest_magnitude(groups, axis=2), scale)
    values = encode(groups, scales[:, :, None]).reshape(m, k)
    return Quantized(values, jnp.pad(scales.T, ((0, 0), (0, pad_rows(m) - m)), constant_values=1.0), "tile")


def quantize_blocks(w: Array, scale: Scale) -> Quantized:
    """Return w [..., n, k] in blocks of 128 x 128; what an edge block lacks counts as zeros."""
    *lead, n, k = w.shape
    edges = [(0, 0)] * len(lead) + [(0, -n % GROUP), (0, -k % GROUP)]
    padded = jnp.pad(w.astype(jnp.float32), edges)
    blocks = padded.reshape(*lead, padded.shape[-2] // GROUP, GROUP, padded.shape[-1] // GROUP, GROUP)
    scales = scale_of(largest_magnitude(blocks, axis=(-3, -1)), scale)
    values = encode(blocks, scales[..., :, None, :, None]).reshape(padded.shape)
    return Quantized(values[..., :n, :k], scales, "block")


def quantize_tiles_both(x: Array, scale: Scale) -> tuple[Quantized, Quantized]:
    """Return x [m, k] in tiles, and its transpose [k, pad128(m)] in tiles."""
    return quantize_tiles(x, scale), quantize_tiles(_transposed(x), scale)


def requantize_transposed(q: Quantized, scale: Scale) -> Quantized:
    """Return the transpose [k, pad128(m)] of tiles q [m, k], in tiles."""
    return quantize_tiles(_transposed(dequantize(q)), scale)


def quantize_rows(x: Array, rows: Array, scale: Scale) -> Quantized:
    """Return x[rows] in tiles, zeros where a row is outside of x."""
    return quantize_tiles(x.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False), scale)


def _transposed(x: Array) -> Array:
    """The transpose of x [m, k], its columns filled up with zeros to a multiple of 128."""
    return jnp.pad(x.T, ((0, 0), (0, -x.shape[0] % GROUP)))
