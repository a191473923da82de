"""Quantisation as Pallas kernels for TPUs: correct and compiled, their speed on a TPU is unmeasured.

`pallas_kernels/tpu_tiles.py` says how a tensor is cut. The transposed forms transpose each 128 x 128 in FP32 and
quantise its rows; what lies beyond the tensor and would share a group with it is set to zero first.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, Quantized, Scale, encode, largest_magnitude, scale_of, scales_shape
from pallas_kernels.tpu_tiles import (
    BLOCK_GROUPS,
    Interpret,
    call,
    grid_of,
    load_group,
    scale_rows,
    tile_specs,
    tile_types,
    transposed,
    transposed_specs,
    transposed_types,
    values_spec,
)


def quantize_tiles(x: Array, scale: Scale, interpret: Interpret = False) -> Quantized:
    """See `quantize.quantize_tiles`."""
    m, k = x.shape

    def body(x_ref, values_ref, scales_ref):
        _write_rows(x_ref, values_ref, scales_ref, m, scale)

    kernel = call(body, grid_of(m, k), [values_spec()], tile_specs(), tile_types(m, k), interpret, parallel=True)
    return Quantized(*kernel(x), "tile")


def quantize_tiles_both(x: Array, scale: Scale, interpret: Interpret = False) -> tuple[Quantized, Quantized]:
    """See `quantize.quantize_tiles_both`."""
    m, k = x.shape

    def body(x_ref, values_ref, scales_ref, values_t_ref, scales_t_ref):
        _write_rows(x_ref, values_ref, scales_ref, m, scale)
        for g in range(BLOCK_GROUPS):
            _write_columns(load_group(x_ref, g).T, values_t_ref, scales_t_ref, g, m, scale)

    out_specs, out_types = [*tile_specs(), *transposed_specs()], [*tile_types(m, k), *transposed_types(m, k)]
    kernel = call(body, grid_of(m, k), [values_spec()], out_specs, out_types, interpret, parallel=True)
    values, scales, *columns = kernel(x)
    return Quantized(values, scales, "tile"), transposed(*columns)


def requantize_transposed(q: Quantized, scale: Scale, interpret: Interpret = False) -> Quantized:
    """See `quantize.requantize_transposed`."""
    m, k = q.shape

    def body(values_ref, scales_ref, values_t_ref, scales_t_ref):
        for g in range(BLOCK_GROUPS):
            columns = load_group(values_ref, g).T * scales_ref[g : g + 1]
            _write_columns(columns, values_t_ref, scales_t_ref, g, m, scale)

    out_types = transposed_types(m, k)
    kernel = call(body, grid_of(m, k), tile_specs(), transposed_specs(), out_types, interpret, parallel=True)
    return transposed(*kernel(q.values, q.scales))


def quantize_rows(x: Array, rows: Array, scale: Scale, interpret: Interpret = False) -> Quantized:
    """See `quantize.quantize_rows`. XLA gathers the rows, the kernel quantises them: two passes."""
    return quantize_tiles(x.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False), scale, interpret)


def quantize_blocks(w: Array, scale: Scale, interpret: Interpret = False) -> Quantized:
    """See `quantize.quantize_blocks`. A grid step takes the whole width of 128 rows."""
    if w.ndim == 2:
        q = quantize_blocks(w[None], scale, interpret)
        return Quantized(q.values[0], q.scales[0], "block")
    num, n, k = w.shape
    _, blocks_n, blocks_k = scales_shape(w.shape, "block")

    def body(w_ref, values_ref, scales_ref):
        rows = jnp.minimum(n - pl.program_id(1) * GROUP, GROUP)
        lane = lax.broadcasted_iota(jnp.int32, (1, blocks_k), 1)
        scales = jnp.zeros((1, blocks_k), jnp.float32)
        for j in range(blocks_k):
            columns = min(k - j * GROUP, GROUP)
            at = pl.ds(j * GROUP, columns)
            block = w_ref[0, :, at].astype(jnp.float32)
            block = jnp.where(lax.broadcasted_iota(jnp.int32, block.shape, 0) < rows, block, 0.0)
            block_scale = scale_of(largest_magnitude(block, axis=(0, 1), keepdims=True), scale)
            values_ref[0, :, at] = encode(block, block_scale)
            scales = jnp.where(lane == j, block_scale, scales)
        scales_ref[0, 0] = scales

    wide = pl.BlockSpec((1, GROUP, k), lambda e, i: (e, i, 0))
    row = pl.BlockSpec((1, 1, 1, blocks_k), lambda e, i: (e, i, 0, 0))
    out_types = [jax.ShapeDtypeStruct(w.shape, E4M3), jax.ShapeDtypeStruct((num, blocks_n, 1, blocks_k), jnp.float32)]
    values, scales = call(body, (num, blocks_n), [wide], [wide, row], out_types, interpret, parallel=True)(w)
    return Quantized(values, scales[:, :, 0], "block")


def _write_rows(x_ref, values_ref, scales_ref, m: int, scale: Scale) -> None:
    """Quantise the rows of a block."""
    columns = []
    for g in range(BLOCK_GROUPS):
        x = load_group(x_ref, g)
        columns.append(scale_of(largest_magnitude(x, axis=1, keepdims=True), scale))
        values_ref[:, pl.ds(g * GROUP, GROUP)] = encode(x, columns[-1])
    scales_ref[...] = scale_rows(columns, m)


def _write_columns(columns: Array, values_t_ref, scales_t_ref, g: int, m: int, scale: Scale) -> None:
    """Quantise the columns [128 of k, 128 of m] of a block's group g, zeros beyond m."""
    row = pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    columns = jnp.where(row < m, columns, 0.0)
    scales = scale_of(largest_magnitude(columns, axis=1, keepdims=True), scale)
    at = pl.ds(g * GROUP, GROUP)
    values_t_ref[at, :] = encode(columns, scales)
    scales_t_ref[0, :, at] = jnp.broadcast_to(scales, (GROUP, GROUP)).T[:1]
