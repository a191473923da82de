"""Quantisation as Pallas kernels for TPUs: correct and compiled, their speed on a TPU is unmeasured.

A grid step takes 128 rows by 1024 columns, eight groups; a group's 128 elements are the lanes of a register. The scales
of rows come out as columns and are stored as rows: they are gathered in the lanes of a 128 x 128 matrix, which is
transposed once. The transposed forms transpose each 128 x 128 in FP32 and quantise its rows. Blocks at an edge hold
rubbish outside the tensor: what is written there is dropped, and where it would share a group with the tensor it is set
to zero first.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, Quantized, Scale, encode, largest_magnitude, scale_of, scales_shape

GROUPS = 8  # per grid step: scales are stored in pieces of 8 x 128
WIDTH = GROUPS * GROUP
VMEM_BYTES = 48 * 2**20  # of 64 MiB, the least of v5p, v6e and tpu7x


def quantize_tiles(x: Array, scale: Scale) -> Quantized:
    """See `quantize.quantize_tiles`."""
    m, k = x.shape

    def body(x_ref, values_ref, scales_ref):
        _write_rows(x_ref, values_ref, scales_ref, m, scale)

    return Quantized(*_call(body, _grid(m, k), [_values_spec()], _tile_specs(), _tile_types(m, k))(x), "tile")


def quantize_tiles_both(x: Array, scale: Scale) -> tuple[Quantized, Quantized]:
    """See `quantize.quantize_tiles_both`."""
    m, k = x.shape

    def body(x_ref, values_ref, scales_ref, values_t_ref, scales_t_ref):
        _write_rows(x_ref, values_ref, scales_ref, m, scale)
        for g in range(GROUPS):
            _write_columns(_group(x_ref, g).T, values_t_ref, scales_t_ref, g, m, scale)

    out_specs, out_types = [*_tile_specs(), *_transposed_specs()], [*_tile_types(m, k), *_transposed_types(m, k)]
    values, scales, *transposed = _call(body, _grid(m, k), [_values_spec()], out_specs, out_types)(x)
    return Quantized(values, scales, "tile"), _transposed(*transposed)


def requantize_transposed(q: Quantized, scale: Scale) -> Quantized:
    """See `quantize.requantize_transposed`."""
    m, k = q.shape

    def body(values_ref, scales_ref, values_t_ref, scales_t_ref):
        for g in range(GROUPS):
            columns = _group(values_ref, g).T * scales_ref[g : g + 1]
            _write_columns(columns, values_t_ref, scales_t_ref, g, m, scale)

    call = _call(body, _grid(m, k), _tile_specs(), _transposed_specs(), _transposed_types(m, k))
    return _transposed(*call(q.values, q.scales))


def quantize_rows(x: Array, rows: Array, scale: Scale) -> Quantized:
    """See `quantize.quantize_rows`. XLA gathers the rows, the kernel quantises them: two passes."""
    return quantize_tiles(x.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False), scale)


def quantize_blocks(w: Array, scale: Scale) -> Quantized:
    """See `quantize.quantize_blocks`. A grid step takes the whole width of 128 rows."""
    if w.ndim == 2:
        q = quantize_blocks(w[None], scale)
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
    values, scales = _call(body, (num, blocks_n), [wide], [wide, row], out_types)(w)
    return Quantized(values, scales[:, :, 0], "block")


def _write_rows(x_ref, values_ref, scales_ref, m: int, scale: Scale) -> None:
    """Quantise the rows of a block."""
    lane = lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    gathered = jnp.ones((GROUP, GROUP), jnp.float32)
    for g in range(GROUPS):
        x = _group(x_ref, g)
        scales = scale_of(largest_magnitude(x, axis=1, keepdims=True), scale)
        values_ref[:, pl.ds(g * GROUP, GROUP)] = encode(x, scales)
        gathered = jnp.where(lane == g, scales, gathered)
    row = pl.program_id(0) * GROUP + lane[:GROUPS]
    scales_ref[...] = jnp.where(row < m, gathered.T[:GROUPS], 1.0)


def _write_columns(columns: Array, values_t_ref, scales_t_ref, g: int, m: int, scale: Scale) -> None:
    """Quantise the columns [128 of k, 128 of m] of a block's group g, zeros beyond m."""
    row = pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    columns = jnp.where(row < m, columns, 0.0)
    scales = scale_of(largest_magnitude(columns, axis=1, keepdims=True), scale)
    at = pl.ds(g * GROUP, GROUP)
    values_t_ref[at, :] = encode(columns, scales)
    scales_t_ref[0, :, at] = jnp.broadcast_to(scales, (GROUP, GROUP)).T[:1]


def _group(ref, g: int) -> Array:
    return ref[:, pl.ds(g * GROUP, GROUP)].astype(jnp.float32)


def _grid(m: int, k: int) -> tuple[int, int]:
    return pl.cdiv(m, GROUP), pl.cdiv(k, WIDTH)


def _values_spec() -> pl.BlockSpec:
    return pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j))


def _tile_specs() -> list[pl.BlockSpec]:
    return [_values_spec(), pl.BlockSpec((GROUPS, GROUP), lambda i, j: (j, i))]


def _tile_types(m: int, k: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((m, k), E4M3), jax.ShapeDtypeStruct(scales_shape((m, k), "tile"), jnp.float32)]


def _transposed_specs() -> list[pl.BlockSpec]:
    return [pl.BlockSpec((WIDTH, GROUP), lambda i, j: (j, i)), pl.BlockSpec((1, 1, WIDTH), lambda i, j: (i, 0, j))]


def _transposed_types(m: int, k: int) -> list[jax.ShapeDtypeStruct]:
    groups = pl.cdiv(m, GROUP)
    return [jax.ShapeDtypeStruct((k, groups * GROUP), E4M3), jax.ShapeDtypeStruct((groups, 1, k), jnp.float32)]


def _transposed(values: Array, scales: Array) -> Quantized:
    return Quantized(values, scales[:, 0], "tile")


def _call(
    body: Callable, grid: tuple[int, ...], in_specs: Sequence, out_specs: Sequence, out_types: Sequence
) -> Callable:
    params = pltpu.CompilerParams(dimension_semantics=("parallel",) * len(grid), vmem_limit_bytes=VMEM_BYTES)
    return pl.pallas_call(
        body, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_types, compiler_params=params
    )
