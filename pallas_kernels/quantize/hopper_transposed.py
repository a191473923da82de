"""The transposed forms on Hopper: 128 neighbours along m share a scale, and the result has m along its rows.

The problem. Eight-bit elements have no transposing load on Hopper, and a transpose by single bytes is slow. Sixteen-bit elements have one:
`ldmatrix` with `.trans` gives a lane two neighbours along m from shared memory that has k along its rows.

The choice. Transpose at sixteen bits, quantise after. BF16 is transposed as it comes; E4M3 is first written to shared memory as FP16, which
holds it exactly, and its scales are multiplied in after the transpose, in FP32, as `dequantize` does. A lane then holds pairs of neighbours
along m, and writes two bytes at a time, in swizzled lines without collisions. FP32 has no such load either; the compiler exchanges
elements between lanes, at half the speed or less, which no hot path of V3 asks for.

The alternative that lost before it was measured: pairs of bytes as sixteen-bit elements, transposed and taken apart by permutes. It saves
the FP16 detour, but is written in inline PTX, which the interpreter cannot check.

A tile is 128 x 128. With two warpgroups per block, each takes 64 of its rows for the one form and 64 of its columns for the other: a tile's
columns stand whole in one warpgroup, so that the warpgroups share nothing but the ring.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.stream import (
    ROWS,
    TILE_ROWS,
    TuningConfig,
    groups_of,
    launch,
    lines,
    ones_beyond,
    quantize_registers,
    row_layout,
    stream,
    tiled,
)
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, scales_shape

BOTH = TuningConfig(blocks=2, warpgroups=2, stages=2, out_slots=1)
REQUANTIZED = TuningConfig(blocks=2, warpgroups=2, stages=3, out_slots=1)
TRANSPOSED = plgpu.Layout.WGMMA  # registers as `ldmatrix` fills them


def quantize_tiles_both(x: Array, scale: Scale, config: TuningConfig = BOTH) -> tuple[Quantized, Quantized]:
    """See `quantize.quantize_tiles_both`. An m that is no multiple of 8, the rows of a transposed tile, costs a copy of x."""
    m, k = x.shape
    x = jnp.pad(x, ((0, -m % TILE_ROWS), (0, 0))) if m % TILE_ROWS else x
    groups = groups_of(k)
    num_tiles = pl.cdiv(m, GROUP) * groups
    layout = row_layout(x.dtype)

    def body(x, values, scales, values_t, scales_t, x_slots, value_slots, scale_slots, value_t_slots, scale_t_slots, full, empty):
        def fetch(tile, slot):
            i, g = lax.div(tile, groups), lax.rem(tile, groups)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(i * GROUP, GROUP), pl.ds(g * GROUP, GROUP)], x_slots.at[slot], full.at[slot])

        def work(tile, slot, out):
            i, g = lax.div(tile, groups), lax.rem(tile, groups)
            for first in _parts(config):
                part = pl.ds(first, ROWS)
                part_values, part_scales = quantize_registers(plgpu.load(x_slots.at[slot, part], layout=layout), scale)
                value_slots[out, part] = part_values
                scale_slots[out, part] = ones_beyond(part_scales, i * GROUP + first, m, layout)
                columns = plgpu.load(x_slots.at[slot, :, part].transpose((1, 0)), layout=TRANSPOSED)
                value_t_slots[out, part], scale_t_slots[out, part] = quantize_registers(columns, scale)
            plgpu.commit_smem()
            for first in _parts(config):
                part, rows, columns = pl.ds(first, ROWS), pl.ds(i * GROUP + first, ROWS), pl.ds(g * GROUP + first, ROWS)
                plgpu.copy_smem_to_gmem(value_slots.at[out, part], values.at[rows, pl.ds(g * GROUP, GROUP)], commit_group=False)
                plgpu.copy_smem_to_gmem(scale_slots.at[out, part], scales.at[g, rows], commit_group=False)
                plgpu.copy_smem_to_gmem(value_t_slots.at[out, part], values_t.at[columns, pl.ds(i * GROUP, GROUP)], commit_group=False)
                plgpu.copy_smem_to_gmem(scale_t_slots.at[out, part], scales_t.at[i, columns], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        stream(config, num_tiles, (full, empty), fetch, work)

    out_slots = [lines((config.out_slots, GROUP, GROUP), E4M3), plgpu.SMEM((config.out_slots, GROUP), jnp.float32)]
    scratch = [tiled((config.stages, GROUP, GROUP), x.dtype), *out_slots, *out_slots]
    out_type = (*_outputs((m, k)), *_outputs(_transposed_shape(m, k)))
    values, scales, values_t, scales_t = launch(body, config, num_tiles, out_type, scratch, copies_per_tile=1)(x)
    return Quantized(values, scales, "tile"), Quantized(values_t, scales_t, "tile")


def requantize_transposed(q: Quantized, scale: Scale, config: TuningConfig = REQUANTIZED) -> Quantized:
    """See `quantize.requantize_transposed`."""
    m, k = q.shape
    groups = groups_of(k)
    num_tiles = pl.cdiv(m, GROUP) * groups

    def body(values, scales, values_t, scales_t, value_slots, scale_slots, wide, value_t_slots, scale_t_slots, full, empty):
        def fetch(tile, slot):
            rows, g = pl.ds(lax.div(tile, groups) * GROUP, GROUP), lax.rem(tile, groups)
            plgpu.copy_gmem_to_smem(values.at[rows, pl.ds(g * GROUP, GROUP)], value_slots.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(scales.at[g, rows], scale_slots.at[slot], full.at[slot])

        def work(tile, slot, out):
            i, g = lax.div(tile, groups), lax.rem(tile, groups)
            row_scales = plgpu.load(scale_slots.at[slot], layout=TRANSPOSED.reduce(0), optimized=False)
            for first in _parts(config):
                part = pl.ds(first, ROWS)
                narrow = plgpu.load(value_slots.at[slot, :, part], layout=row_layout(jnp.float16), optimized=False)
                wide[:, part] = narrow.astype(jnp.float16)
                plgpu.commit_smem()
                columns = plgpu.load(wide.at[:, part].transpose((1, 0)), layout=TRANSPOSED).astype(jnp.float32)
                x = columns * lax.broadcast_in_dim(row_scales, columns.shape, [1])
                value_t_slots[out, part], scale_t_slots[out, part] = quantize_registers(x, scale)
            plgpu.commit_smem()
            for first in _parts(config):
                part, columns = pl.ds(first, ROWS), pl.ds(g * GROUP + first, ROWS)
                plgpu.copy_smem_to_gmem(value_t_slots.at[out, part], values_t.at[columns, pl.ds(i * GROUP, GROUP)], commit_group=False)
                plgpu.copy_smem_to_gmem(scale_t_slots.at[out, part], scales_t.at[i, columns], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        stream(config, num_tiles, (full, empty), fetch, work)

    scratch = [
        lines((config.stages, GROUP, GROUP), E4M3, line_bytes=ROWS),
        plgpu.SMEM((config.stages, GROUP), jnp.float32),
        tiled((GROUP, GROUP), jnp.float16),
        lines((config.out_slots, GROUP, GROUP), E4M3),
        plgpu.SMEM((config.out_slots, GROUP), jnp.float32),
    ]
    out_type = _outputs(_transposed_shape(m, k))
    kernel = launch(body, config, num_tiles, out_type, scratch, copies_per_tile=2)
    return Quantized(*kernel(q.values, q.scales), "tile")


def _parts(config: TuningConfig) -> list:
    """The first rows (or columns) of the parts of a tile that fall to this warpgroup."""
    return [part * ROWS + lax.axis_index("warpgroup") * ROWS for part in range(0, GROUP // ROWS, config.warpgroups)]


def _transposed_shape(m: int, k: int) -> tuple[int, int]:
    return k, groups_of(m) * GROUP


def _outputs(shape: tuple[int, int]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scales_shape(shape, "tile"), jnp.float32)
