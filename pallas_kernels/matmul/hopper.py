"""FP8 products on Hopper: tiles of A with blocks of B.

The main loop and its reasons are in `pallas_kernels/hopper/main_loop.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.main_loop import TuningConfig, multiply_blocks, slots
from pallas_kernels.hopper.ring import Ring, barriers, by_role, launch, over_steps
from pallas_kernels.hopper.store import padded_columns, staging, store_sums
from pallas_kernels.hopper.wgmma import ROWS
from pallas_kernels.quantized import Quantized

LARGE = TuningConfig()  # tiles of 128 x 256
MEDIUM = TuningConfig(products=1, stages=5, unroll=4)  # 128 x 128
SMALL = TuningConfig(columns=64, products=1, split="n", stages=8, unroll=4, out_slots=1, batch=1)  # 64 x 128
# Microseconds on an H100 at work: of a launch, of a tile, of 128 along k in it. It predicts 40 times of 5 to 660 us
# within -23 to 14%.
TIMES = {LARGE: (3.0, 0.9, 0.72), MEDIUM: (2.2, 0.6, 0.39), SMALL: (1.9, 0.5, 0.25)}
SUM_LAUNCH, SUM_RATE = 1.0, 2.4e6  # of adding parts: us, and bytes/us of reading them
MOST_PARTS = 16


def plan(m: int, n: int, num_steps: int) -> tuple[TuningConfig, int]:
    """Return the tiles, and the number of parts of k, that take the shortest time, dealt out to all multiprocessors."""

    def time(candidate):
        config, parts = candidate
        launch, per_tile, per_step = TIMES[config]
        tiles = pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n)
        rounds = pl.cdiv(tiles * parts, num_multiprocessors())
        add_parts = SUM_LAUNCH + 4 * m * n * parts / SUM_RATE if parts > 1 else 0
        return launch + rounds * (per_tile + pl.cdiv(num_steps, parts) * per_step) + add_parts

    return min(((config, parts) for parts in range(1, min(num_steps, MOST_PARTS) + 1) for config in TIMES), key=time)


def matmul(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype=jnp.bfloat16,
    config: TuningConfig | None = None,
    parts: int | None = None,
) -> Array:
    """Return D[m, n] = A B^T for tiles `a` [m, k] and blocks `b` [n, k].

    Where there are fewer tiles than multiprocessors, k is cut into `parts`, whose FP32 products XLA adds. A last part
    that ends beyond k reads zeros there.
    """
    (m, k), n = a.shape, b.shape[0]
    planned = plan(m, n, k // GROUP)
    config, parts = config or planned[0], parts or planned[1]
    num_steps, padded = pl.cdiv(k // GROUP, parts), padded_columns(n, jnp.float32 if parts > 1 else out_dtype)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)
    num_tiles = tiles[0] * tiles[1]

    def kernel(a_ref, a_scales, b_ref, b_scales, out, *scratch):
        *operands, out_slots, full, empty = scratch
        ring = Ring(operands, full, empty)

        def over_tiles(body):
            @plgpu.nd_loop((num_tiles * parts,), collective_axes="sm")
            def _(info):
                part, tile = (
                    (lax.div(info.index[0], num_tiles), lax.rem(info.index[0], num_tiles))
                    if parts > 1
                    else (0, info.index[0])
                )
                mi, ni = plgpu.planar_snake(tile, tiles, config.grid_minor, config.grid_width)
                body(
                    part,
                    mi * config.tile_m,
                    ni * config.tile_n,
                    lax.rem(info.local_index * num_steps, jnp.int32(config.stages)),
                )

        def copy(part, row, column, slot):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def steps(first, count, slot):
                for i in range(count):
                    step = part * num_steps + first + i
                    ks = pl.ds(step * GROUP, GROUP)
                    slot = ring.fill(slot, [a_ref.at[rows, ks], b_ref.at[columns, ks], a_scales.at[step, rows]])
                return slot

            over_steps(num_steps, config.unroll, steps, slot)

        def compute(wg, part, row, column, slot):
            down, right = config.origin(wg)

            def send(ref, i, j):
                target = out.at[part, pl.ds(row + down + i, ROWS), pl.ds(column + right + j, ref.shape[1])]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False)

            totals = multiply_blocks(
                config, num_steps, ring, wg, slot, b_scales, column, part * num_steps if parts > 1 else None
            )
            store_sums(totals, out_slots.at[wg], padded - column - right, send, config.batch)

        by_role(ring, lambda: over_tiles(copy), lambda wg: over_tiles(functools.partial(compute, wg)))

    out_type = jax.ShapeDtypeStruct((parts, m, padded), jnp.float32 if parts > 1 else out_dtype)
    scratch = [*slots(config), staging(config.out_slots, out_type.dtype), *barriers(3, config.stages)]
    num_blocks = min(num_multiprocessors(), num_tiles * parts)
    products = launch(kernel, out_type, num_blocks, scratch)(a.values, a.scales, b.values, b.scales)[..., :n]
    return products.sum(0).astype(out_dtype) if parts > 1 else products[0]
