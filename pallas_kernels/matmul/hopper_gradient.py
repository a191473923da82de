"""Weight gradients in FP8 on Hopper: C[g] += A_g B_g^T, both operands in tiles of 1 x 128 along the rows that a group received.

What differs from the other products (`pallas_kernels/hopper.py`):

    two vectors of scales   every element of a partial product has a scale of its own, row times column: two operations of the FP32 units
                            per element and step instead of one, and the scales of 32 columns in registers. So the products of a
                            warpgroup lie below each other and share them, and the first operation is done in the product's registers.
    steps per group         known on the device only.
    accumulation            the finished tile is *added* to C by the copy engine on its way out (one FP32 addition in the L2 cache), so C is
                            never read into an SM and a group without rows costs nothing.

The result is exact in the sense that matters: one rounding of C + the sum, as if C had been read, and the same on every run.

Where the time goes, on an H100 with 4 groups, 28,416 rows, (4096, 7168), in us; at XLA's dense rate it would be 1073. Left out one after
the other, of a form whose products lie side by side:

    all                                     1796
    seven of eight pieces are not stored    1646
    ... nor are scales of columns read      1497
    ... nor multiplied with                 1226    the second operation costs most; why more than its cycles is not known
    this form                               1669 to 1691, and 1608 if seven pieces are not stored

What lost: products side by side 1765 to 1834; one product of 64 x 128 and five slots 1880; three slots and four pieces 1687; C read ahead
into the L2 cache 1757; warpgroups that take turns, from the start of a product 1692, from its third quarter 1678, from its end 1784.
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
from pallas_kernels.quantized import GROUP, Quantized

CONFIG = hopper.TuningConfig(split="n", turn=1, pieces=1, batch=1)  # unrolled, the scales of columns spill
ON_THE_WAY_OUT = "add"  # what the copy engine does to C; the interpreter of Mosaic GPU knows no such copies, so its test stores instead


def matmul_accumulate(a: Quantized, b: Quantized, c: Array, *, config: hopper.TuningConfig = CONFIG) -> Array:
    """Return c + A B^T for tiles `a` [m, k], `b` [n, k] and FP32 `c` [m, n]."""
    return grouped_matmul_accumulate(a, b, jnp.full((1,), a.shape[1], jnp.int32), c[None], config=config)[0]


def grouped_matmul_accumulate(a: Quantized, b: Quantized, group_sizes: Array, c: Array, *, config: hopper.TuningConfig = CONFIG) -> Array:
    """Return c[g] + A_g B_g^T for tiles `a` [m, K], `b` [n, K], whose columns belong to groups of `group_sizes`, multiples of 128."""
    num_groups, m, n = c.shape
    padded = hopper.padded_columns(n, c.dtype)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, sizes, out, *scratch):
        *operands, out_slots, full, empty = scratch
        ring = hopper.Ring(operands, full, empty)

        def steps_of(group):
            first = lax.fori_loop(0, group, lambda g, total: total + lax.div(sizes[g], jnp.int32(GROUP)), jnp.int32(0))
            return first, lax.div(sizes[group], jnp.int32(GROUP))

        over_tiles = functools.partial(over_group_tiles, config, num_groups, tiles, steps_of)

        def copy(row, column, _, first, num_steps, slot):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def turn(start, count, slot):
                for i in range(count):
                    step = first + start + i
                    ks = pl.ds(step * GROUP, GROUP)
                    sources = a_ref.at[rows, ks], b_ref.at[columns, ks], a_scales.at[step, rows], b_scales.at[step, columns]
                    slot = ring.fill(slot, sources)
                return slot

            hopper.over_steps(num_steps, config.turn, turn, slot)

        def compute(wg, row, column, group, _, num_steps, slot):
            down, right = config.origin(wg)

            def send(ref, i, j):
                target = out.at[group, pl.ds(row + down + i, hopper.ROWS), pl.ds(column + right + j, ref.shape[1])]
                plgpu.copy_smem_to_gmem(ref, target, commit_group=False, reduction_op=ON_THE_WAY_OUT)

            totals = _multiply_tiles(config, num_steps, ring, wg, slot)
            hopper.store(totals, out_slots.at[wg], padded - column - right, send, config.batch)

        hopper.by_role(ring, lambda: over_tiles(copy), lambda wg: over_tiles(functools.partial(compute, wg)))

    scratch = [
        *hopper.slots(config),
        plgpu.SMEM((config.stages, config.tile_n), jnp.float32),  # scales of B
        hopper.staging(config.pieces, jnp.float32),
        *hopper.barriers(4, config.stages),
    ]
    run = hopper.launch(kernel, (), min(num_multiprocessors(), num_groups * tiles[0] * tiles[1]), scratch)
    total = jax.new_ref(jnp.pad(c, ((0, 0), (0, 0), (0, padded - n))))
    run(a.values, a.scales, b.values, b.scales, group_sizes, total)
    return jax.freeze(total)[..., :n]


def over_group_tiles(config: Any, num_groups: int, tiles: tuple[int, int], steps_of: Callable, body: Callable) -> None:
    """Run `body(row, column, group, first step, number of steps, slot of the first)` for this block's tiles of every group that has steps.

    Args:
        config: the size of a tile, the order of tiles, and the number of slots.
        num_groups: how many results [m, n] there are.
        tiles: of one result, along m and n.
        steps_of: group -> its first step and their number.
        body: of the copying or of the multiplying warpgroups.
    """

    @plgpu.nd_loop((num_groups * tiles[0] * tiles[1],), collective_axes="sm", init_carry=jnp.int32(0))
    def _(info, carry):
        group = lax.div(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        within = lax.rem(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        mi, ni = plgpu.planar_snake(within, tiles, config.grid_minor, config.grid_width)
        first, num_steps = steps_of(group)

        @pl.when(num_steps > 0)
        def _():
            body(mi * config.tile_m, ni * config.tile_n, group, first, num_steps, lax.rem(carry, jnp.int32(config.stages)))

        return carry + num_steps


def _multiply_tiles(config: hopper.TuningConfig, num_steps: Array, ring: hopper.Ring, wg: Array, slot: Array) -> dict:
    """Return `hopper.multiply` for B in tiles, whose scales are the ring's last operand."""
    _, column = config.origin(wg)

    def scale(slot, i, _):
        columns = pl.ds(column + config.offset(i)[1], config.columns)
        return plgpu.load(ring.operands[-1].at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def promote(total, product, a_scale, b_scale):
        scaled = product * lax.broadcast_in_dim(b_scale, product.shape, [1])
        return total + scaled * lax.broadcast_in_dim(a_scale, product.shape, [0]), scaled

    return hopper.multiply(config, num_steps, ring, wg, slot, ahead=lambda _, count: [None] * count, scale=scale, promote=promote)
