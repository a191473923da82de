"""Weight gradients in FP8 on Hopper: C[g] += A_g B_g^T.

Both operands are tiles of 1 x 128 along the rows that a group received.

What differs from the other products (`main_loop.py`):

    two vectors of scales   every element of a partial product has a scale of its own, row times column: two operations
                            of the FP32 units per element and step instead of one, and the scales of 32 columns in
                            registers. So the products of a warpgroup lie below each other and share them, and the first
                            operation is done in the product's registers.
    steps per group         known on the device only.
    accumulation            the finished tile is *added* to C by the copy engine on its way out (one FP32 addition in
                            the L2 cache), so C is never read into an SM and a group without rows costs nothing.
    no C                    the result begins at zero: the finished tile is stored, and a group without rows gets tiles
                            of zeros. Neither filling C with zeros nor reading them costs anything.
    few tiles               a dense gradient [m, n] of a small layer has fewer tiles than there are multiprocessors, and
                            thousands of steps in each. Its steps are cut into parts, which are groups without a C, and
                            XLA adds their results (`matmul/hopper_gradient.py`).

The result is exact in the sense that matters: one rounding of C + the sum, as if C had been read, and the same on every
run. Parts add one rounding each, in a fixed order.

Where the time goes, on an H100 with 4 groups, 28,416 rows, (4096, 7168), in us; at XLA's dense rate it would be 1073.
Left out one after the other, of a form whose products lie side by side:

    all                                     1796
    seven of eight pieces are not stored    1646
    ... nor are scales of columns read      1497
    ... nor multiplied with                 1226    the second operation costs most; why more than its cycles is not
                                                    known
    this form                               1669 to 1691, and 1608 if seven pieces are not stored

What lost: products side by side 1765 to 1834; one product of 64 x 128 and five slots 1880; three slots and four pieces
1687; C read ahead into the L2 cache 1757; warpgroups that take turns, from the start of a product 1692, from its third
quarter 1678, from its end 1784.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.groups import clear_empty_groups, launch_onto, over_group_tiles, send_out
from pallas_kernels.hopper.main_loop import TuningConfig, multiply, slots
from pallas_kernels.hopper.ring import Ring, barriers, by_role, over_steps
from pallas_kernels.hopper.store import padded_columns, staging, store_sums
from pallas_kernels.hopper.wgmma import ROWS
from pallas_kernels.quantized import Quantized

ACCUMULATE = TuningConfig(split="n", unroll=1, out_slots=1, batch=1)  # unrolled, the scales of columns spill


def multiply_groups(
    config: TuningConfig,
    a: Quantized,
    b: Quantized,
    num_groups: int,
    group_sizes: Array | None,
    c: Array | None,
) -> Array:
    """Return FP32 [num_groups, m, n]. Groups without sizes are parts of K, all of the same number of steps or one more.

    Parts are computed and not read: a number of steps from memory takes one register more, and the assembler spills.
    """
    m, n, num_steps = a.shape[0], b.shape[0], a.shape[1] // GROUP
    padded = padded_columns(n, jnp.float32)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, *refs):
        *sizes, out, a_slots, b_slots, a_scale_slots, b_scale_slots, out_slots, full, empty = refs
        ring = Ring((a_slots, b_slots, a_scale_slots, b_scale_slots), full, empty)

        def start_of_part(part):
            return lax.div(part * num_steps, jnp.int32(num_groups))

        def steps_of(group):
            if not sizes:
                first = start_of_part(group)
                return first, start_of_part(group + 1) - first
            first = lax.fori_loop(
                0, group, lambda g, total: total + lax.div(sizes[0][g], jnp.int32(GROUP)), jnp.int32(0)
            )
            return first, lax.div(sizes[0][group], jnp.int32(GROUP))

        over_tiles = functools.partial(over_group_tiles, config, num_groups, tiles, steps_of)

        def copy(row, column, _, first, num_steps, slot):
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def steps(start, count, slot):
                for i in range(count):
                    step = first + start + i
                    ks = pl.ds(step * GROUP, GROUP)
                    sources = (
                        a_ref.at[rows, ks],
                        b_ref.at[columns, ks],
                        a_scales.at[step, rows],
                        b_scales.at[step, columns],
                    )
                    slot = ring.fill(slot, sources)
                return slot

            over_steps(num_steps, config.unroll, steps, slot)

        def compute(wg, row, column, group, _, num_steps, slot):
            down, right = config.origin(wg)

            def send(ref, i, j):
                rows, columns = pl.ds(row + down + i, ROWS), pl.ds(column + right + j, ref.shape[1])
                send_out(config, c, ref, out.at[group, rows, columns])

            totals = _multiply_tiles(config, num_steps, ring, wg, slot)
            store_sums(totals, out_slots.at[wg], padded - column - right, send, config.batch)

        def over_results(wg):
            over_tiles(functools.partial(compute, wg))
            if c is None and sizes:
                clear_empty_groups(lambda group: sizes[0][group], wg, out_slots.at[wg, 0], out)

        by_role(ring, lambda: over_tiles(copy), over_results)

    scratch = [
        *slots(config),
        plgpu.SMEM((config.stages, config.tile_n), jnp.float32),  # scales of B
        staging(config.out_slots, jnp.float32),
        *barriers(4, config.stages),
    ]
    operands = a.values, a.scales, b.values, b.scales, *(() if group_sizes is None else (group_sizes,))
    return launch_onto(c, (num_groups, m, n), kernel, num_groups * tiles[0] * tiles[1], scratch, operands)


def _multiply_tiles(config: TuningConfig, num_steps: Array, ring: Ring, wg: Array, slot: Array) -> dict:
    """Return `main_loop.multiply` for B in tiles, whose scales are the ring's last operand."""
    _, column = config.origin(wg)

    def scale(slot, i, _):
        columns = pl.ds(column + config.offset(i)[1], config.columns)
        return plgpu.load(ring.operands[-1].at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def promote(total, product, a_scale, b_scale):
        scaled = product * lax.broadcast_in_dim(b_scale, product.shape, [1])
        return total + scaled * lax.broadcast_in_dim(a_scale, product.shape, [0]), scaled

    return multiply(
        config, num_steps, ring, wg, slot, lookahead=lambda _, count: [None] * count, scale=scale, promote=promote
    )
