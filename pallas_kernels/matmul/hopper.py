"""FP8 products on Hopper: tiles of A with blocks of B. The main loop and its reasons are in `pallas_kernels/hopper.py`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.quantized import GROUP, Quantized

LARGE = hopper.TuningConfig()
SMALL = hopper.TuningConfig(columns=64, split="n", stages=8)  # tiles of 64 x 128: at (128, 7168, 2048) on an H200 527 TFLOP/s, LARGE 411


def default_config(m: int, n: int) -> hopper.TuningConfig:
    """Return `SMALL` where tiles of 128 x 128 would leave half of the multiprocessors without one."""
    tiles = pl.cdiv(m, LARGE.tile_m) * pl.cdiv(n, LARGE.tile_n)
    return SMALL if 2 * tiles <= num_multiprocessors() else LARGE


def matmul(a: Quantized, b: Quantized, *, out_dtype=jnp.bfloat16, config: hopper.TuningConfig | None = None) -> Array:
    """Return D[m, n] = A B^T for tiles `a` [m, k] and blocks `b` [n, k]."""
    (m, k), n = a.shape, b.shape[0]
    config = config or default_config(m, n)
    num_steps, columns = k // GROUP, hopper.padded_columns(n, out_dtype)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, out, a_slots, b_slots, a_scale_slots, out_slots, full, empty):
        slots = a_slots, b_slots, a_scale_slots, full, empty

        def over_tiles(body):
            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
            def _(info):
                mi, ni = plgpu.planar_snake(info.index[0], tiles, config.grid_minor, config.grid_width)
                body(mi * config.tile_m, ni * config.tile_n, info.local_index)

        def copy(row, column, tile):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def turn(first, count, _):
                for i in range(count):
                    step = first + i
                    ks = pl.ds(step * GROUP, GROUP)
                    reused = (tile > 0) | (step >= config.stages)
                    sources = a_ref.at[rows, ks], a_scales.at[step, rows], b_ref.at[columns, ks]
                    hopper.copy_step(slots, i % config.stages, reused, *sources)

            hopper.over_steps(num_steps, config.stages, turn)

        def compute(wg, row, column, _):
            down, right = config.origin(wg)
            block = jnp.minimum(lax.div(column + right, jnp.int32(GROUP)), b_scales.shape[0] - 1)

            def send(ref):
                target = out.at[pl.ds(row + down, hopper.ROWS), pl.ds(column + right, config.columns)]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False)

            total = hopper.multiply(config, num_steps, slots, wg, lambda step: b_scales[block, step])
            hopper.store(total, out_slots.at[wg], send)

        def copy_all():
            over_tiles(copy)
            hopper.drain(config.stages, num_steps, empty)

        hopper.by_role(copy_all, lambda wg: over_tiles(functools.partial(compute, wg)))

    num_blocks = min(num_multiprocessors(), tiles[0] * tiles[1])
    run = hopper.launch(kernel, jax.ShapeDtypeStruct((m, columns), out_dtype), num_blocks, hopper.scratch(config, out_dtype))
    return run(hopper.whole_tiles(a.values), a.scales, hopper.whole_tiles(b.values), b.scales)[:, :n]
