"""FP8 products on Hopper: tiles of A with blocks of B. The main loop and its reasons are in `pallas_kernels/hopper.py`."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.quantized import GROUP, Quantized


def matmul(a: Quantized, b: Quantized, *, out_dtype=jnp.bfloat16, config: hopper.TuningConfig | None = None) -> Array:
    """Return D[m, n] = A B^T for tiles `a` [m, k] and blocks `b` [n, k]."""
    config = config or hopper.TuningConfig()
    (m, k), n = a.shape, b.shape[0]
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

            def step(i, slot, _):
                ks = pl.ds(i * GROUP, GROUP)
                reused = (tile > 0) | (i >= config.stages)
                hopper.copy_step(slots, slot, reused, a_ref.at[rows, ks], a_scales.at[i, rows], b_ref.at[columns, ks])

            hopper.over_steps(num_steps, config.stages, step)

        def compute(row, column, _):
            def b_scale(offset, step):
                return b_scales[jnp.minimum((column + offset) // GROUP, b_scales.shape[0] - 1), step]

            def send(ref, i, j):
                down, right = config.origin(i, j)
                target = out.at[pl.ds(row + down, hopper.ROWS), pl.ds(column + right, config.columns)]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False)

            sums = hopper.multiply(config, num_steps, slots, b_scale, out_slots.at[lax.axis_index("wg"), 0])
            hopper.store_waves(config, sums, out_slots, send)

        def copy_all():
            over_tiles(copy)
            hopper.drain(config, num_steps, empty)

        hopper.by_role(copy_all, lambda: over_tiles(compute))

    num_blocks = min(num_multiprocessors(), tiles[0] * tiles[1])
    run = hopper.launch(kernel, hopper.shape_of((m, columns), out_dtype), num_blocks, hopper.scratch(config, out_dtype))
    return run(hopper.whole_tiles(a.values), a.scales, hopper.whole_tiles(b.values), b.scales)[:, :n]
