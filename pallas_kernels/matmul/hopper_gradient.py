"""Weight gradients in FP8 on Hopper: C[g] += A_g B_g^T, both operands in tiles of 1 x 128 along the rows that a group
received.

What differs from the other products (`pallas_kernels/hopper/main_loop.py`):

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
                            XLA adds their results (`plan_parts`).

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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.main_loop import TuningConfig, multiply, slots
from pallas_kernels.hopper.ring import WARPGROUPS, Ring, barriers, by_role, launch, over_steps
from pallas_kernels.hopper.store import padded_columns, staging, store_sums
from pallas_kernels.hopper.wgmma import ROWS
from pallas_kernels.quantized import Quantized

CONFIG = TuningConfig(split="n", turn=1, pieces=1, batch=1)  # unrolled, the scales of columns spill
# what the copy engine does to C; the interpreter of Mosaic GPU knows no such copies, so its test stores instead
ON_THE_WAY_OUT = "add"
PER_TILE, PER_STEP = 3.0, 1.15  # us of a tile on H100 and H200, and of 128 along k in it
SUM_LAUNCH, SUM_RATE = 4.0, 3.5e6  # of adding parts: us, and bytes/us of reading them and writing their sum
MOST_PARTS = 16  # FP32 results [m, n] that exist at the same time


def plan_parts(config: TuningConfig, m: int, n: int, num_steps: int) -> int:
    """Return into how many parts to cut the steps of a dense gradient [m, n], for the shortest time by this model:

        rounds = ceil(tiles * parts / multiprocessors)
        time   = rounds * (PER_TILE + ceil(num_steps / parts) * PER_STEP)
                 + SUM_LAUNCH + (parts + 1) * 4 m n / SUM_RATE        where there is more than one part

    With 256 steps on 132 multiprocessors (us by the model; measured on an H200, in one part: 305 to 308, and 541 for
    144 tiles):

        (m, n)          tiles    one part    parts    time
        (2048, 640)        48         297        8     137
        (512, 4096)        64         297        2     161
        (2048, 1536)       96         297        4     252
        (2048, 2048)      128         297        1     297
        (1536, 3072)      144         595        6     409

    Tiles of 128 x 128 take 1.11 times as long for the same work. By this model they would win at (2048, 640) alone:
    123, in 3 parts.
    """
    tiles = pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n)

    def time(parts):
        rounds = pl.cdiv(tiles * parts, num_multiprocessors())
        add_parts = SUM_LAUNCH + (parts + 1) * 4 * m * n / SUM_RATE if parts > 1 else 0
        return rounds * (PER_TILE + pl.cdiv(num_steps, parts) * PER_STEP) + add_parts

    return min(range(1, min(num_steps, MOST_PARTS) + 1), key=time)


def matmul_accumulate(
    a: Quantized,
    b: Quantized,
    c: Array | None = None,
    *,
    config: TuningConfig = CONFIG,
    parts: int | None = None,
) -> Array:
    """Return c + A B^T for tiles `a` [m, k], `b` [n, k] and FP32 `c` [m, n], A B^T without a `c`; k is summed in
    `parts`.
    """
    parts = parts or plan_parts(config, a.shape[0], b.shape[0], a.shape[1] // GROUP)
    if parts == 1:
        return _run(config, a, b, 1, None, None if c is None else c[None])[0]
    total = _run(config, a, b, parts, None, None).sum(0)
    return total if c is None else c + total


def grouped_matmul_accumulate(
    a: Quantized, b: Quantized, group_sizes: Array, c: Array | None = None, *, config: TuningConfig = CONFIG
) -> Array:
    """Return c[g] + A_g B_g^T, or A_g B_g^T without a `c`.

    `a` [m, K] and `b` [n, K] are tiles, whose columns belong to groups of `group_sizes`, multiples of 128.
    """
    return _run(config, a, b, group_sizes.shape[0], group_sizes, c)


def _run(
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

            def turn(start, count, slot):
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

            over_steps(num_steps, config.turn, turn, slot)

        def compute(wg, row, column, group, _, num_steps, slot):
            down, right = config.origin(wg)

            def send(ref, i, j):
                send_out(
                    c,
                    ref,
                    out.at[group, pl.ds(row + down + i, ROWS), pl.ds(column + right + j, ref.shape[1])],
                )

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
        staging(config.pieces, jnp.float32),
        *barriers(4, config.stages),
    ]
    operands = a.values, a.scales, b.values, b.scales, *(() if group_sizes is None else (group_sizes,))
    return launch_onto(c, (num_groups, m, n), kernel, num_groups * tiles[0] * tiles[1], scratch, operands)


def send_out(c: Array | None, ref: Any, target: Any) -> None:
    """Add a finished piece to `target` in C; without a C, store it there."""
    plgpu.copy_smem_to_gmem(ref, target, commit_group=False, reduction_op=None if c is None else ON_THE_WAY_OUT)


def launch_onto(
    c: Array | None, shape: tuple[int, int, int], kernel: Callable, num_tiles: int, scratch: list, operands: tuple
) -> Array:
    """Return FP32 `shape` [G, m, n]: `c` after `kernel(*operands, c, *scratch)`, or what the kernel writes there
    without a `c`.

    The kernel's array has columns up to `main_loop.padded_columns(n)`.
    """
    *lead, n = shape
    padded = padded_columns(n, jnp.float32)
    num_blocks = min(num_multiprocessors(), num_tiles)
    if c is None:
        return launch(kernel, jax.ShapeDtypeStruct((*lead, padded), jnp.float32), num_blocks, scratch)(*operands)[
            ..., :n
        ]
    total = jax.new_ref(jnp.pad(c, ((0, 0), (0, 0), (0, padded - n))))
    launch(kernel, (), num_blocks, scratch)(*operands, total)
    return jax.freeze(total)[..., :n]


def over_group_tiles(config: Any, num_groups: int, tiles: tuple[int, int], steps_of: Callable, body: Callable) -> None:
    """Run `body(row, column, group, first step, number of steps, slot of the first)` for this block's tiles of every
    group that has steps.

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
            body(
                mi * config.tile_m,
                ni * config.tile_n,
                group,
                first,
                num_steps,
                lax.rem(carry, jnp.int32(config.stages)),
            )

        return carry + num_steps


def clear_empty_groups(size_of: Callable[[Array], Array], wg: Array, piece: Any, out: Any) -> None:
    """Store zeros in the results [m, n] of groups of size 0: all blocks and their warpgroups together, one `piece` at a
    time.

    Call it after the tiles that are multiplied: as a branch beside them, the assembler spills.
    """
    num_groups, m, n = out.shape
    rows, columns = piece.shape
    across = pl.cdiv(n, columns)
    first, stride = WARPGROUPS * lax.axis_index("sm") + wg, WARPGROUPS * lax.axis_size("sm")
    count = lax.div(pl.cdiv(m, rows) * across - first + stride - 1, jnp.int32(stride))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    piece[...] = plgpu.layout_cast(jnp.zeros(piece.shape, jnp.float32), plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    def clear(group, _):
        @pl.when(size_of(group) == 0)
        def _():
            def one(i, _):
                down, right = (
                    lax.div(first + i * stride, jnp.int32(across)),
                    lax.rem(first + i * stride, jnp.int32(across)),
                )
                plgpu.copy_smem_to_gmem(piece, out.at[group, pl.ds(down * rows, rows), pl.ds(right * columns, columns)])

            lax.fori_loop(0, count, one, None)

    lax.fori_loop(0, num_groups, clear, None)


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
        config, num_steps, ring, wg, slot, ahead=lambda _, count: [None] * count, scale=scale, promote=promote
    )
