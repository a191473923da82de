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

LARGE = hopper.TuningConfig()  # tiles of 128 x 256
MEDIUM = hopper.TuningConfig(products=1, stages=5, turn=4)  # 128 x 128
SMALL = hopper.TuningConfig(columns=64, products=1, split="n", stages=8, turn=4, pieces=1, batch=1)  # 64 x 128
RATE = {LARGE: 1.0, MEDIUM: 0.9, SMALL: 0.6}  # with all multiprocessors at work; from 1444, 1305 and, by shared memory, about 900 TFLOP/s


def default_config(m: int, n: int) -> hopper.TuningConfig:
    """Return the config whose tiles, dealt out to all multiprocessors, take the shortest time."""

    def time(config):
        tiles = pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n)
        return pl.cdiv(tiles, num_multiprocessors()) * config.tile_m * config.tile_n / RATE[config]

    return min(RATE, key=time)


def matmul(a: Quantized, b: Quantized, *, out_dtype=jnp.bfloat16, config: hopper.TuningConfig | None = None) -> Array:
    """Return D[m, n] = A B^T for tiles `a` [m, k] and blocks `b` [n, k]."""
    (m, k), n = a.shape, b.shape[0]
    config = config or default_config(m, n)
    num_steps, padded = k // GROUP, hopper.padded_columns(n, out_dtype)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, out, *scratch):
        *operands, out_slots, full, empty = scratch
        ring = hopper.Ring(operands, full, empty)

        def over_tiles(body):
            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
            def _(info):
                mi, ni = plgpu.planar_snake(info.index[0], tiles, config.grid_minor, config.grid_width)
                body(mi * config.tile_m, ni * config.tile_n, lax.rem(info.local_index * num_steps, jnp.int32(config.stages)))

        def copy(row, column, slot):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def turn(first, count, slot):
                for i in range(count):
                    ks = pl.ds((first + i) * GROUP, GROUP)
                    slot = ring.fill(slot, [a_ref.at[rows, ks], b_ref.at[columns, ks], a_scales.at[first + i, rows]])
                return slot

            hopper.over_steps(num_steps, config.turn, turn, slot)

        def compute(wg, row, column, slot):
            down, right = config.origin(wg)

            def send(ref, i, j):
                target = out.at[pl.ds(row + down + i, hopper.ROWS), pl.ds(column + right + j, ref.shape[1])]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False)

            totals = hopper.multiply_blocks(config, num_steps, ring, wg, slot, b_scales, column)
            hopper.store(totals, out_slots.at[wg], padded - column - right, send, config.batch)

        hopper.by_role(ring, lambda: over_tiles(copy), lambda wg: over_tiles(functools.partial(compute, wg)))

    scratch = [*hopper.slots(config), hopper.staging(config.pieces, out_dtype), *hopper.barriers(3, config.stages)]
    num_blocks = min(num_multiprocessors(), tiles[0] * tiles[1])
    run = hopper.launch(kernel, jax.ShapeDtypeStruct((m, padded), out_dtype), num_blocks, scratch)
    return run(hopper.whole_tiles(a.values), a.scales, hopper.whole_tiles(b.values), b.scales)[:, :n]
