"""Quantisation on Hopper: what a tile is, and where its results go.

`pallas_kernels.hopper.stream` tells how tiles stream and what speed each kernel reaches; the transposed forms are in
`hopper_transposed.py`.

    quantize_tiles     a tile is 64 rows of 128: 64 scales leave as one piece of 256 bytes
    quantize_blocks    a tile is a block of 128 x 128, read twice from shared memory: for its largest magnitude, then
                       for its values
    quantize_rows      a tile is 8 gathered rows x 1024. A row of x is k / 128 groups behind one another, so that eight
                       groups of a row are one piece of memory, and a slab of 8 x 128 like any other

Rows that are not there: the copy engine reads zeros outside x, so `quantize_rows` asks for row m in place of any row
outside.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.stream import (
    TuningConfig,
    launch,
    lines,
    ones_beyond,
    position,
    quantize_registers,
    quantized_type,
    row_layout,
    spread,
    whole_tiles,
)
from pallas_kernels.quantized import E4M3, Quantized, Scale, pad_rows, scale_of, scales_shape

QUANTIZE_TILES = TuningConfig(blocks=6)
QUANTIZE_BLOCKS = TuningConfig(blocks=1, stages=3, out_slots=1)
QUANTIZE_ROWS = TuningConfig(blocks=3, stages=3)
ROWS = GROUP // 2  # of a block that a warpgroup holds at a time
SLAB = 8  # rows of a gathered tile, and groups along k: a slab is 8 x 8 groups
SLAB_LAYOUT = plgpu.Layout.TILED(  # registers of a slab's scales, two per lane, the same in each warp
    plgpu.Tiling(((SLAB, 4), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def quantize_tiles(x: Array, scale: Scale, config: TuningConfig = QUANTIZE_TILES) -> Quantized:
    """See `quantize.quantize_tiles`."""
    m, k = x.shape
    groups, layout = k // GROUP, row_layout(x.dtype)
    num_tiles = pl.cdiv(m, config.rows) * groups

    def body(x, values, scales, x_slots, value_slots, scale_slots):
        def at(tile):
            i, g = position(tile, groups)
            return pl.ds(i * config.rows, config.rows), g

        def fetch(tile, slot, copied):
            rows, g = at(tile)
            plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(g * GROUP, GROUP)], x_slots.at[slot], copied)

        def work(turn):
            (rows, g), out = at(turn.tile), turn.take_out_slot()
            value_slots[out], tile_scales = quantize_registers(
                plgpu.load(x_slots.at[turn.slot], layout=layout), scale, layout
            )
            scale_slots[out] = ones_beyond(tile_scales, rows.start, m, layout)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(value_slots.at[out], values.at[rows, pl.ds(g * GROUP, GROUP)], commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[out], scales.at[g, rows])
            turn.release()

        return fetch, work

    ring, out_ring = config.warpgroups * config.stages, config.warpgroups * config.out_slots
    scratch = [
        lines((ring, config.rows, GROUP), x.dtype),
        lines((out_ring, config.rows, GROUP), E4M3),
        plgpu.SMEM((out_ring, config.rows), jnp.float32),
    ]
    values_type, scales_type = quantized_type((m, k))
    out_type = values_type, whole_tiles(scales_type, config.rows)
    values, scales = launch(body, config, num_tiles, out_type, scratch)(x)
    return Quantized(values, scales[:, : scales_type.shape[1]], "tile")


def quantize_blocks(w: Array, scale: Scale, config: TuningConfig = QUANTIZE_BLOCKS) -> Quantized:
    """See `quantize.quantize_blocks`.

    A `k` that is not a multiple of 128 is padded by a copy: the copy engine moves whole swizzled lines.
    """
    if w.ndim == 2:
        q = quantize_blocks(w[None], scale, config)
        return Quantized(q.values[0], q.scales[0], "block")
    num, n, k = w.shape
    if k % GROUP:
        q = quantize_blocks(jnp.pad(w, ((0, 0), (0, 0), (0, -k % GROUP))), scale, config)
        return Quantized(q.values[..., :k], q.scales, "block")
    _, blocks_n, blocks_k = scales_shape(w.shape, "block")
    num_tiles = num * blocks_n * blocks_k
    layout = row_layout(w.dtype)
    halves = [pl.ds(0, ROWS), pl.ds(ROWS, ROWS)]

    def block_of(tile):
        e, rest = position(tile, blocks_n * blocks_k)
        return e, *position(rest, blocks_k)

    def at(ref, tile):
        e, i, j = block_of(tile)
        return ref.at[e, pl.ds(i * GROUP, GROUP), pl.ds(j * GROUP, GROUP)]

    def body(w, values, scales, w_slots, value_slots):
        def fetch(tile, slot, copied):
            plgpu.copy_gmem_to_smem(at(w, tile), w_slots.at[slot], copied)

        def work(turn):
            out = turn.take_out_slot()
            first, second = (jnp.abs(plgpu.load(w_slots.at[turn.slot, half], layout=layout)) for half in halves)
            amax = jnp.max(jnp.max(jnp.maximum(first, second), axis=1), axis=0).astype(jnp.float32)
            block_scale = scale_of(jnp.full((ROWS,), amax), scale)
            for half in halves:
                x = plgpu.load(w_slots.at[turn.slot, half], layout=layout).astype(jnp.float32)
                value_slots[out, half] = (x * spread(1.0 / block_scale, x.shape, layout, (0,))).astype(E4M3)
            scales[block_of(turn.tile)] = jnp.max(block_scale)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(value_slots.at[out], at(values, turn.tile))
            turn.release()

        return fetch, work

    ring, out_ring = config.warpgroups * config.stages, config.warpgroups * config.out_slots
    scratch = [lines((ring, GROUP, GROUP), w.dtype), lines((out_ring, GROUP, GROUP), E4M3)]
    return Quantized(*launch(body, config, num_tiles, quantized_type(w.shape, "block"), scratch)(w), "block")


def quantize_rows(x: Array, rows: Array, scale: Scale, config: TuningConfig = QUANTIZE_ROWS) -> Quantized:
    """See `quantize.quantize_rows`. Scales are written in whole slabs; what is too much is cut off."""
    (m, k), (w,) = x.shape, rows.shape
    groups, layout = k // GROUP, row_layout(x.dtype, lanes_per_row=16)
    tall, wide = pl.cdiv(w, SLAB), pl.cdiv(groups, SLAB)

    def body(x, rows, values, scales, x_slots, value_slots, scale_slots, by_row):
        warpgroup = lax.axis_index("warpgroup")

        def at(tile):
            i, j = position(tile, wide)
            return i * SLAB, pl.ds(j * SLAB, SLAB)

        def fetch(tile, slot, copied):
            row, columns = at(tile)
            sources = [rows[jnp.minimum(row + r, w - 1)] for r in range(SLAB)]
            for r, source in enumerate(sources):
                source = jnp.where((source >= 0) & (source < m), source, m)
                plgpu.copy_gmem_to_smem(x.at[source, columns], x_slots.at[slot, r], copied)

        def work(turn):
            (row, columns), out = at(turn.tile), turn.take_out_slot()
            for r in range(SLAB):
                row_in = plgpu.load(x_slots.at[turn.slot, r], layout=layout)
                value_slots[out, r], row_scales = quantize_registers(row_in, scale, layout)
                by_row[warpgroup, r] = jnp.where(jnp.full((SLAB,), row + r) < w, row_scales, 1.0)
            plgpu.commit_smem()
            scale_slots[out] = plgpu.load(by_row.at[warpgroup].transpose((1, 0)), layout=SLAB_LAYOUT, optimized=False)
            plgpu.commit_smem()
            for r in range(SLAB):
                plgpu.copy_smem_to_gmem(value_slots.at[out, r], values.at[row + r, columns], commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[out], scales.at[columns, pl.ds(row, SLAB)])
            turn.release()

        return fetch, work

    ring, out_ring = config.warpgroups * config.stages, config.warpgroups * config.out_slots
    scratch = [
        lines((ring, SLAB, SLAB, GROUP), x.dtype),
        lines((out_ring, SLAB, SLAB, GROUP), E4M3),
        plgpu.SMEM((out_ring, SLAB, SLAB), jnp.float32),
        plgpu.SMEM((config.warpgroups, SLAB, SLAB), jnp.float32),
    ]
    whole_slabs = jax.ShapeDtypeStruct((wide * SLAB, tall * SLAB), jnp.float32)
    out_type = (jax.ShapeDtypeStruct((w, groups, GROUP), E4M3), whole_slabs)
    kernel = launch(body, config, tall * wide, out_type, scratch, copies_per_slot=SLAB)
    values, scales = kernel(x.reshape(m, groups, GROUP), rows)
    return Quantized(values.reshape(w, k), scales[:groups, : pad_rows(w)], "tile")
