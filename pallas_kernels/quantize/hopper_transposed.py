"""The transposed forms on Hopper: 128 neighbours along m share a scale, and the result has m along its rows.

The problem. Eight-bit elements have no transposing load on Hopper, and a transpose by single bytes is slow. Sixteen-bit
elements have one: `ldmatrix` with `.trans` gives a lane two neighbours along m from shared memory that has k along its
rows.

The choice. Transpose at sixteen bits, quantise after. BF16 is transposed as it comes; E4M3 is first written to shared
memory as FP16, which holds it exactly, and its scales are multiplied in after the transpose, in FP32, as `dequantize`
does. A lane then holds pairs of neighbours along m, and writes two bytes at a time, in swizzled lines without
collisions. FP32 has no such load either; the compiler exchanges elements between lanes, at half the speed or less,
which no hot path of V3 asks for.

The alternative that lost before it was measured: pairs of bytes as sixteen-bit elements, transposed and taken apart by
permutes. It saves the FP16 detour, but is written in inline PTX, which the interpreter cannot check.

The producers also write both forms of a tile (`producers/hopper_backward.py`), and share with this file how tiles
stream and how groups are quantised, but not the transpose: their values are FP32 in registers when they are made, not
BF16 in shared memory.

A tile is 128 x 128. With two warpgroups per block, each takes 64 of its rows for the one form and 64 of its columns for
the other: a tile's columns stand whole in one warpgroup, so that the warpgroups share nothing but the ring.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.ring import SWIZZLE_ROWS, tiled
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
    tiles_of_rows,
    whole_tiles,
)
from pallas_kernels.quantized import E4M3, Quantized, Scale

QUANTIZE_TILES_BOTH = TuningConfig(blocks=1, warpgroups=2, stages=4, out_slots=2)  # for BF16
REQUANTIZE_TRANSPOSED = TuningConfig(blocks=2, warpgroups=2, stages=3, out_slots=1)
ROWS = GROUP // 2  # or columns, that a warpgroup holds at a time
TRANSPOSED = plgpu.Layout.WGMMA  # registers as `ldmatrix` fills them


def quantize_tiles_both(x: Array, scale: Scale, config: TuningConfig | None = None) -> tuple[Quantized, Quantized]:
    """See `quantize.quantize_tiles_both`.

    An m that is not a multiple of 8, the rows of a transposed tile, costs a copy of x.
    """
    m, k = x.shape
    config = config or dataclasses.replace(
        QUANTIZE_TILES_BOTH, stages=QUANTIZE_TILES_BOTH.stages * 2 // x.dtype.itemsize
    )
    x = jnp.pad(x, ((0, -m % SWIZZLE_ROWS), (0, 0))) if m % SWIZZLE_ROWS else x
    tall, groups = pl.cdiv(m, GROUP), k // GROUP
    layout = row_layout(x.dtype)

    def body(x, values, scales, values_t, scales_t, x_slots, value_slots, scale_slots, value_t_slots, scale_t_slots):
        parts = _parts(config)

        def fetch(tile, slot, copied):
            i, g = position(tile, groups)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(i * GROUP, GROUP), pl.ds(g * GROUP, GROUP)], x_slots.at[slot], copied)

        def work(turn):
            (i, g), out = position(turn.tile, groups), turn.take_out_slot()
            for first in parts:
                part = pl.ds(first, ROWS)
                rows = plgpu.load(x_slots.at[turn.slot, part], layout=layout)
                value_slots[out, part], part_scales = quantize_registers(rows, scale, layout)
                scale_slots[out, part] = ones_beyond(part_scales, i * GROUP + first, m, layout)
                columns = plgpu.load(x_slots.at[turn.slot, :, part].transpose((1, 0)), layout=TRANSPOSED)
                value_t_slots[out, part], scale_t_slots[out, part] = quantize_registers(columns, scale, TRANSPOSED)
            plgpu.commit_smem()
            for first in parts:
                part, rows, columns = pl.ds(first, ROWS), pl.ds(i * GROUP + first, ROWS), pl.ds(g * GROUP + first, ROWS)
                plgpu.copy_smem_to_gmem(
                    value_slots.at[out, part], values.at[rows, pl.ds(g * GROUP, GROUP)], commit_group=False
                )
                plgpu.copy_smem_to_gmem(scale_slots.at[out, part], scales.at[g, rows], commit_group=False)
                plgpu.copy_smem_to_gmem(
                    value_t_slots.at[out, part], values_t.at[columns, pl.ds(i * GROUP, GROUP)], commit_group=False
                )
                plgpu.copy_smem_to_gmem(scale_t_slots.at[out, part], scales_t.at[i, columns], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            turn.release()

        return fetch, work

    out_slots = [lines((config.out_slots, GROUP, GROUP), E4M3), plgpu.SMEM((config.out_slots, GROUP), jnp.float32)]
    scratch = [tiled((config.stages, GROUP, GROUP), x.dtype), *out_slots, *out_slots]
    values_type, scales_type = quantized_type((m, k))
    out_type = (values_type, whole_tiles(scales_type, GROUP), *quantized_type((k, tall * GROUP)))
    values, scales, values_t, scales_t = launch(body, config, tall * groups, out_type, scratch, share="slots")(x)
    return Quantized(values, scales[:, : scales_type.shape[1]], "tile"), Quantized(values_t, scales_t, "tile")


def requantize_transposed(
    q: Quantized, scale: Scale, config: TuningConfig = REQUANTIZE_TRANSPOSED, *, num_rows: Array | None = None
) -> Quantized:
    """See `quantize.requantize_transposed`."""
    m, k = q.shape
    counts = [] if num_rows is None else [num_rows.reshape(1)]
    tall, groups = pl.cdiv(m, GROUP), k // GROUP

    def body(values, scales, *refs):
        values_t, scales_t, value_slots, scale_slots, wide, value_t_slots, scale_t_slots = refs[len(counts) :]
        parts = _parts(config)

        def fetch(tile, slot, copied):
            i, g = position(tile, groups)
            rows = pl.ds(i * GROUP, GROUP)
            plgpu.copy_gmem_to_smem(values.at[rows, pl.ds(g * GROUP, GROUP)], value_slots.at[slot], copied)
            plgpu.copy_gmem_to_smem(scales.at[g, rows], scale_slots.at[slot], copied)

        def work(turn):
            (i, g), slot, out = position(turn.tile, groups), turn.slot, turn.take_out_slot()
            row_scales = plgpu.load(scale_slots.at[slot], layout=TRANSPOSED.reduce(0), optimized=False)
            for first in parts:
                part = pl.ds(first, ROWS)
                narrow = plgpu.load(value_slots.at[slot, :, part], layout=row_layout(jnp.float16), optimized=False)
                wide[:, part] = narrow.astype(jnp.float16)
                plgpu.commit_smem()
                columns = plgpu.load(wide.at[:, part].transpose((1, 0)), layout=TRANSPOSED).astype(jnp.float32)
                x = columns * spread(row_scales, columns.shape, TRANSPOSED, (1,))
                value_t_slots[out, part], scale_t_slots[out, part] = quantize_registers(x, scale, TRANSPOSED)
            plgpu.commit_smem()
            for first in parts:
                part, columns = pl.ds(first, ROWS), pl.ds(g * GROUP + first, ROWS)
                plgpu.copy_smem_to_gmem(
                    value_t_slots.at[out, part], values_t.at[columns, pl.ds(i * GROUP, GROUP)], commit_group=False
                )
                plgpu.copy_smem_to_gmem(scale_t_slots.at[out, part], scales_t.at[i, columns], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            turn.release()

        return fetch, work

    scratch = [
        lines((config.stages, GROUP, GROUP), E4M3, line_bytes=ROWS),
        plgpu.SMEM((config.stages, GROUP), jnp.float32),
        tiled((GROUP, GROUP), jnp.float16),
        lines((config.out_slots, GROUP, GROUP), E4M3),
        plgpu.SMEM((config.out_slots, GROUP), jnp.float32),
    ]
    kernel = launch(
        body,
        config,
        tall * groups,
        quantized_type((k, tall * GROUP)),
        scratch,
        share="slots",
        copies_per_slot=2,
        used=(lambda *refs: tiles_of_rows(refs[2], GROUP, groups)) if counts else None,
    )
    values_t, scales_t = kernel(q.values, q.scales, *counts)
    return Quantized(values_t, scales_t, "tile")


def _parts(config: TuningConfig) -> list:
    """The first rows (or columns) of the parts of a tile that fall to this warpgroup."""
    warpgroup = lax.axis_index("warpgroup")
    return [(part + warpgroup) * ROWS for part in range(0, GROUP // ROWS, config.warpgroups)]
