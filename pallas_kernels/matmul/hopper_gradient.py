"""Weight gradients in FP8 on Hopper: C[g] += A_g B_g^T, both operands in tiles of 1 x 128 along the rows that a group received.

What differs from the other products (`pallas_kernels/hopper.py`):

    two vectors of scales   every element of a partial product has a scale of its own, row times column: two operations of the FP32 units
                            per element and step instead of one, and the scales of 32 columns in registers. Measured on an H200, 4 groups
                            of 7,104 rows, (4096, 7168): 888 TFLOP/s, where one vector of scales gives 1304.
    steps per group         known on the device only. The ring goes on from slot to slot across tiles, so a slot is a number at run time.
    accumulation            the finished tile is *added* to C by the copy engine on its way out (one FP32 addition in the L2 cache), so C is
                            never read into an SM and a group without rows costs nothing.

The result is exact in the sense that matters: one rounding of C + the sum, as if C had been read, and the same on every run.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.quantized import E4M3, GROUP, Quantized

CONFIG = hopper.TuningConfig()
COPIES = 4  # per step: A, B and the scales of each
TURN = 2  # steps that are unrolled
ON_THE_WAY_OUT = "add"  # what the copy engine does to C; the interpreter of Mosaic GPU knows no such copies, so its test stores instead


def matmul_accumulate(a: Quantized, b: Quantized, c: Array, *, config: hopper.TuningConfig = CONFIG) -> Array:
    """Return c + A B^T for tiles `a` [m, k], `b` [n, k] and FP32 `c` [m, n]."""
    return grouped_matmul_accumulate(a, b, jnp.full((1,), a.shape[1], jnp.int32), c[None], config=config)[0]


def grouped_matmul_accumulate(a: Quantized, b: Quantized, group_sizes: Array, c: Array, *, config: hopper.TuningConfig = CONFIG) -> Array:
    """Return c[g] + A_g B_g^T for tiles `a` [m, K], `b` [n, K], whose columns belong to groups of `group_sizes`, multiples of 128."""
    num_groups, m, n = c.shape
    columns = hopper.padded_columns(n, c.dtype)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, sizes, out, *scratch):
        *slots, out_slots, full, empty = scratch

        def steps_of(group):
            first = lax.fori_loop(0, group, lambda g, total: total + lax.div(sizes[g], jnp.int32(GROUP)), jnp.int32(0))
            return first, lax.div(sizes[group], jnp.int32(GROUP))

        over_tiles = functools.partial(over_group_tiles, config, num_groups, tiles, steps_of)

        def copy(row, column, _, first, num_steps, used):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def step(i, _):
                slot = lax.rem(used + i, jnp.int32(config.stages))

                @pl.when(used + i >= config.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                ks = pl.ds((first + i) * GROUP, GROUP)
                sources = a_ref.at[rows, ks], b_ref.at[columns, ks], a_scales.at[first + i, rows], b_scales.at[first + i, columns]
                for source, target in zip(sources, slots, strict=True):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

            lax.fori_loop(0, num_steps, step, None)

        def compute(wg, row, column, group, _, num_steps, used):
            down, right = config.origin(wg)

            def send(ref):
                target = out.at[group, pl.ds(row + down, hopper.ROWS), pl.ds(column + right, config.columns)]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False, reduction_op=ON_THE_WAY_OUT)

            hopper.store(_sum(config, num_steps, used, (*slots, full, empty), wg), out_slots.at[wg], send)

        def copy_all():
            drain_used(config.stages, over_tiles(copy), empty)

        hopper.by_role(copy_all, lambda wg: over_tiles(functools.partial(compute, wg)))

    scratch = [
        hopper.tiled((config.stages, config.tile_m, GROUP), E4M3),
        hopper.tiled((config.stages, config.tile_n, GROUP), E4M3),
        plgpu.SMEM((config.stages, config.tile_m), jnp.float32),
        plgpu.SMEM((config.stages, config.tile_n), jnp.float32),
        hopper.staging(config.columns, jnp.float32),
        plgpu.Barrier(num_arrivals=COPIES, num_barriers=config.stages),
        plgpu.Barrier(num_arrivals=hopper.WARPGROUPS, num_barriers=config.stages),
    ]
    run = hopper.launch(kernel, (), min(num_multiprocessors(), num_groups * tiles[0] * tiles[1]), scratch)
    total = jax.new_ref(jnp.pad(c, ((0, 0), (0, 0), (0, columns - n))))
    run(hopper.whole_tiles(a.values), a.scales, hopper.whole_tiles(b.values), b.scales, group_sizes, total)
    return jax.freeze(total)[..., :n]


def over_group_tiles(config: Any, num_groups: int, tiles: tuple[int, int], steps_of: Callable, body: Callable) -> Array:
    """Run `body(row, column, group, first step, number of steps, steps so far)` for this block's tiles of every group that has steps.

    Args:
        config: the size of a tile and the order of tiles.
        num_groups: how many results [m, n] there are.
        tiles: of one result, along m and n.
        steps_of: group -> its first step and their number.
        body: of the copying or of the multiplying warpgroups.

    Returns:
        the number of steps of all of them.
    """

    @plgpu.nd_loop((num_groups * tiles[0] * tiles[1],), collective_axes="sm", init_carry=jnp.int32(0))
    def used(info, carry):
        group = lax.div(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        within = lax.rem(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        mi, ni = plgpu.planar_snake(within, tiles, config.grid_minor, config.grid_width)
        first, num_steps = steps_of(group)

        @pl.when(num_steps > 0)
        def _():
            body(mi * config.tile_m, ni * config.tile_n, group, first, num_steps, carry)

        return carry + num_steps

    return used


def drain_used(stages: int, used: Array, empty: Any) -> None:
    """Wait until every slot of a ring that `used` steps went through is free again."""
    for slot in range(stages):

        @pl.when(used > slot)
        def _(slot=slot):
            plgpu.barrier_wait(empty.at[slot])


def _sum(config: hopper.TuningConfig, num_steps: Array, used: Array, slots: tuple, wg: Array) -> Array:
    """Return the sum of warpgroup `wg` over the steps of a group, one at least, FP32 [64, columns]; `used` steps went before."""
    a_slots, b_slots, a_scale_slots, b_scale_slots, full, empty = slots
    row, column = config.origin(wg)
    rows, columns = pl.ds(row, hopper.ROWS), pl.ds(column, config.columns)

    def step(i, total):
        slot = lax.rem(used + i, jnp.int32(config.stages))
        plgpu.barrier_wait(full.at[slot])
        a_scale = plgpu.load(a_scale_slots.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        b_scale = plgpu.load(b_scale_slots.at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        product = hopper.multiply_slot(a_slots.at[slot, rows], b_slots.at[slot, columns])
        plgpu.barrier_arrive(empty.at[slot])
        scaled = product * lax.broadcast_in_dim(b_scale, product.shape, [1])
        return total + scaled * lax.broadcast_in_dim(a_scale, product.shape, [0])

    def turn(i, total):
        for j in range(TURN):
            total = step(i * TURN + j, total)
        return total

    turns = lax.div(num_steps, jnp.int32(TURN))
    total = lax.fori_loop(0, turns, turn, hopper.zero_sum(config))
    return lax.fori_loop(turns * TURN, num_steps, step, total)
