"""Quantisation on Hopper: what a tile is, and where its results go. How tiles stream is in `stream.py`; the transposed forms in
`hopper_transposed.py`.

    quantize_tiles     a tile is 64 rows of 128 per warpgroup: 64 scales leave as one piece of 256 bytes
    quantize_blocks    a tile is a block of 128 x 128, read twice from shared memory: for its largest magnitude, then for its values
    quantize_rows      a tile is 8 gathered rows x 1024 per warpgroup. A row of x is k / 128 groups behind one another, so that eight groups
                       of a row are one piece of memory, and a slab of 8 x 128 like any other

Rows that are not there: the copy engine reads zeros outside x, so `quantize_rows` asks for row m in place of any row outside.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.hopper_transposed import quantize_tiles_both, requantize_transposed
from pallas_kernels.quantize.stream import (
    ROWS,
    TuningConfig,
    groups_of,
    launch,
    lines,
    ones_beyond,
    quantize_registers,
    row_layout,
    stream,
)
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, pad_rows, scale_of, scales_shape

__all__ = ["quantize_blocks", "quantize_rows", "quantize_tiles", "quantize_tiles_both", "requantize_transposed"]

TILES = TuningConfig(blocks=4)
BLOCKS = TuningConfig(blocks=1, stages=3, out_slots=1)
GATHERED = TuningConfig(blocks=4)
SLAB = 8  # rows of a gathered tile, and groups along k: a slab is 8 x 8 groups
SLAB_LAYOUT = plgpu.Layout.TILED(  # registers of a slab's scales, two per lane, the same in each warp
    plgpu.Tiling(((SLAB, 4), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def quantize_tiles(x: Array, scale: Scale, config: TuningConfig = TILES) -> Quantized:
    """See `quantize.quantize_tiles`."""
    m, k = x.shape
    rows, groups = ROWS * config.warpgroups, groups_of(k)
    num_tiles = pl.cdiv(m, rows) * groups
    layout = row_layout(x.dtype)

    def body(x, values, scales, x_slots, value_slots, scale_slots, full, empty):
        part = lax.axis_index("warpgroup")

        def fetch(tile, slot):
            i, g = lax.div(tile, groups), lax.rem(tile, groups)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(i * rows, rows), pl.ds(g * GROUP, GROUP)], x_slots.at[slot], full.at[slot])

        def work(tile, slot, out):
            row, g = lax.div(tile, groups) * rows + part * ROWS, lax.rem(tile, groups)
            tile_values, tile_scales = quantize_registers(plgpu.load(x_slots.at[slot, pl.ds(part * ROWS, ROWS)], layout=layout), scale)
            value_slots[part, out] = tile_values
            scale_slots[part, out] = ones_beyond(tile_scales, row, m, layout)
            plgpu.commit_smem()
            values_out = values.at[pl.ds(row, ROWS), pl.ds(g * GROUP, GROUP)]
            plgpu.copy_smem_to_gmem(value_slots.at[part, out], values_out, commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[part, out], scales.at[g, pl.ds(row, ROWS)])

        stream(config, num_tiles, (full, empty), fetch, work)

    scratch = [
        lines((config.stages, rows, GROUP), x.dtype),
        lines((config.warpgroups, config.out_slots, ROWS, GROUP), E4M3),
        plgpu.SMEM((config.warpgroups, config.out_slots, ROWS), jnp.float32),
    ]
    return Quantized(*launch(body, config, num_tiles, _outputs((m, k), "tile"), scratch, copies_per_tile=1)(x), "tile")


def quantize_blocks(w: Array, scale: Scale, config: TuningConfig = BLOCKS) -> Quantized:
    """See `quantize.quantize_blocks`. A `k` that is no multiple of 128 is padded by a copy: the copy engine moves whole swizzled lines."""
    if w.ndim == 2:
        q = quantize_blocks(w[None], scale, config)
        return Quantized(q.values[0], q.scales[0], "block")
    num, n, k = w.shape
    if k % GROUP:
        q = quantize_blocks(jnp.pad(w, ((0, 0), (0, 0), (0, -k % GROUP))), scale, config)
        return Quantized(q.values[..., :k], q.scales, "block")
    assert config.warpgroups == 1, "one warpgroup finds the largest magnitude of a block"
    _, blocks_n, blocks_k = scales_shape(w.shape, "block")
    num_tiles = num * blocks_n * blocks_k
    layout = row_layout(w.dtype)
    halves = [pl.ds(0, ROWS), pl.ds(ROWS, ROWS)]

    def block_of(tile):
        e, rest = lax.div(tile, blocks_n * blocks_k), lax.rem(tile, blocks_n * blocks_k)
        return e, lax.div(rest, blocks_k), lax.rem(rest, blocks_k)

    def body(w, values, scales, w_slots, value_slots, full, empty):
        def at(ref, tile):
            e, i, j = block_of(tile)
            return ref.at[e, pl.ds(i * GROUP, GROUP), pl.ds(j * GROUP, GROUP)]

        def fetch(tile, slot):
            plgpu.copy_gmem_to_smem(at(w, tile), w_slots.at[slot], full.at[slot])

        def work(tile, slot, out):
            first, second = (jnp.abs(plgpu.load(w_slots.at[slot, half], layout=layout)) for half in halves)
            amax = jnp.max(jnp.max(jnp.maximum(first, second), axis=1), axis=0).astype(jnp.float32)
            block_scale = scale_of(jnp.full((ROWS,), amax), scale)
            for half in halves:
                x = plgpu.load(w_slots.at[slot, half], layout=layout).astype(jnp.float32)
                value_slots[out, half] = (x * lax.broadcast_in_dim(1.0 / block_scale, x.shape, [0])).astype(E4M3)
            scales[block_of(tile)] = jnp.max(block_scale)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(value_slots.at[out], at(values, tile))

        stream(config, num_tiles, (full, empty), fetch, work)

    scratch = [lines((config.stages, GROUP, GROUP), w.dtype), lines((config.out_slots, GROUP, GROUP), E4M3)]
    return Quantized(*launch(body, config, num_tiles, _outputs(w.shape, "block"), scratch, copies_per_tile=1)(w), "block")


def quantize_rows(x: Array, rows: Array, scale: Scale, config: TuningConfig = GATHERED) -> Quantized:
    """See `quantize.quantize_rows`. Scales are written in whole slabs; what is too much is cut off."""
    (m, k), (w,) = x.shape, rows.shape
    groups, tile_rows = groups_of(k), SLAB * config.warpgroups
    slabs = pl.cdiv(groups, SLAB)
    num_tiles = pl.cdiv(w, tile_rows) * slabs
    layout = row_layout(x.dtype, lanes_per_row=16)

    def body(x, rows, values, scales, x_slots, value_slots, scale_slots, by_row, full, empty):
        part = lax.axis_index("warpgroup")

        def fetch(tile, slot):
            row, slab = lax.div(tile, slabs) * tile_rows, lax.rem(tile, slabs)
            sources = [rows[jnp.minimum(row + r, w - 1)] for r in range(tile_rows)]
            for r, source in enumerate(sources):
                source = jnp.where((source >= 0) & (source < m), source, m)
                plgpu.copy_gmem_to_smem(x.at[source, pl.ds(slab * SLAB, SLAB)], x_slots.at[slot, r], full.at[slot])

        def work(tile, slot, out):
            row, slab = lax.div(tile, slabs) * tile_rows + part * SLAB, lax.rem(tile, slabs)
            for r in range(SLAB):
                row_values, row_scales = quantize_registers(plgpu.load(x_slots.at[slot, part * SLAB + r], layout=layout), scale)
                value_slots[part, out, r] = row_values
                by_row[part, r] = jnp.where(jnp.full((SLAB,), row + r) < w, row_scales, 1.0)
            plgpu.commit_smem()
            scale_slots[part, out] = plgpu.load(by_row.at[part].transpose((1, 0)), layout=SLAB_LAYOUT, optimized=False)
            plgpu.commit_smem()
            for r in range(SLAB):
                row_out = values.at[row + r, pl.ds(slab * SLAB, SLAB)]
                plgpu.copy_smem_to_gmem(value_slots.at[part, out, r], row_out, commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[part, out], scales.at[pl.ds(slab * SLAB, SLAB), pl.ds(row, SLAB)])

        stream(config, num_tiles, (full, empty), fetch, work)

    scratch = [
        lines((config.stages, tile_rows, SLAB, GROUP), x.dtype),
        lines((config.warpgroups, config.out_slots, SLAB, SLAB, GROUP), E4M3),
        plgpu.SMEM((config.warpgroups, config.out_slots, SLAB, SLAB), jnp.float32),
        plgpu.SMEM((config.warpgroups, SLAB, SLAB), jnp.float32),
    ]
    whole_slabs = jax.ShapeDtypeStruct((slabs * SLAB, pl.cdiv(w, SLAB) * SLAB), jnp.float32)
    out_type = (jax.ShapeDtypeStruct((w, groups, GROUP), E4M3), whole_slabs)
    kernel = launch(body, config, num_tiles, out_type, scratch, copies_per_tile=tile_rows)
    values, scales = kernel(x.reshape(m, groups, GROUP), rows)
    return Quantized(values.reshape(w, k), scales[:groups, : pad_rows(w)], "tile")


def _outputs(shape: tuple[int, ...], grouping: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scales_shape(shape, grouping), jnp.float32)
