"""The main loop of every FP8 product on Hopper: D[m, n] = sum over k of A[m, k] B[n, k], scaled every 128 along k.

The problem. Tensor cores multiply E4M3 at twice the rate of BF16 but add in about 14 bits, so after every 128 of k the
partial sum leaves them, is multiplied by the scales of its two groups and added in FP32 by the ordinary units
("promotion", DeepSeek-V3, arXiv 2412.19437, section 3.3.2). The tensor cores must not wait for that, nor for memory,
nor for addresses.

The plan of one thread block, one output tile of 128 x 256 at a time, grid persistent:

    warpgroup 2           copies A, B and the scales of A into a ring of slots, 128 along k each, ahead of the others
    warpgroups 0 and 1    64 x 256 of the tile each, as two products of 64 x 128: start a product, meanwhile wait for
                          the next slot and read its scales; finish the product, free the slot, promote

While one warpgroup promotes, the other multiplies. A thread holds 128 sums and one product of 64 registers
(`wgmma.py`).

What bounds it, on an H100 at (4096, 4096, 7168), where XLA's product per tensor takes 156 us and this 166:

    multiplying without copies    154 us    the promotion is hidden
    copying without multiplying   112 us    from the L2 cache; tiles of 128 x 128 move a third more and take 171, tiles
                                            of 256 x 128, with the same bytes as these, 149
    both                          166 us    shared memory: products read 96 bytes a cycle of the 128 there are, copies
                                            write 48

What lost (TFLOP/s, the same shape; this form gives 1440; experiments/log.md has all figures):

    `plgpu.wgmma`                 spills with 128 sums: 735 with all addresses computed ahead (LLVM hoists 36
                                  descriptors of 64 bits out of the loop), 1130 with addresses computed in the loop,
                                  1249 held in order by a branch
    sums alive in branches        after the loop: the assembler serialises the products, 232 (`store_sums` rounds before
                                  it branches)
    tiles of 128 x 128            1305; the assembler may begin products early, there are registers for it; copies are
                                  the bound
    A in registers                read once for both products: 1336; the reads stand between a product and the next
    clusters of two blocks        B or A copied once for both: 1403 to 1425
    warpgroups take turns         named barriers, from the start of the other's product 1425, from its third quarter
                                  1382, from its end 1244
    a ring that starts at slot 0  in every tile: five slots of 128 x 128 give 1176, 1305 where the ring goes on

Slots are numbers at run time: the ring goes on from tile to tile, whatever the number of steps. Addresses cost little
as long as they are computed from the slot before the wait for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper import wgmma
from pallas_kernels.hopper.ring import WARPGROUPS, Ring, over_steps, swizzled
from pallas_kernels.hopper.wgmma import ROWS
from pallas_kernels.quantized import E4M3


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut.

    Attributes:
        columns: of one product, 64 or 128; its rows are 64.
        products: of each warpgroup and step.
        split: "m" or "n", the dim along which the two warpgroups share a tile; the products of one lie along the other.
        stages: slots of the ring.
        unroll: steps per iteration of the loop.
        out_slots: pieces of the result, 64 rows of 128 bytes each, that may be on their way out per warpgroup.
        batch: pieces that are sent together.
        grid_minor: 0 or 1: the dim along which neighbouring blocks' tiles lie.
        grid_width: how many tiles along that dim share their operands in the L2 cache.
        interpreted: whether a GPU interpreter runs the kernel. It knows neither PTX nor copies that add: products are
            `plgpu.wgmma`'s, and a gradient is stored in C instead of added to it, which is right where C is zeros.
    """

    columns: int = 128
    products: int = 2
    split: str = "m"
    stages: int = 4
    unroll: int = 8
    out_slots: int = 2
    batch: int = 2
    grid_minor: int = 0
    grid_width: int = 8
    interpreted: bool = False

    @property
    def tile_m(self) -> int:
        """Rows of an output tile."""
        return self.height * (WARPGROUPS if self.split == "m" else 1)

    @property
    def height(self) -> int:
        """Rows of a warpgroup."""
        return ROWS * (1 if self.split == "m" else self.products)

    @property
    def width(self) -> int:
        """Columns of a warpgroup."""
        return self.columns * (self.products if self.split == "m" else 1)

    @property
    def tile_n(self) -> int:
        """Columns of an output tile."""
        return self.width * (WARPGROUPS if self.split == "n" else 1)

    def origin(self, wg: Array) -> tuple[Any, Any]:
        """Return the first row and column, within the tile, of what warpgroup `wg` computes."""
        return (wg * ROWS, 0) if self.split == "m" else (0, wg * self.width)

    def offset(self, product: int) -> tuple[int, int]:
        """Return the first row and column of a product within what its warpgroup computes."""
        return (0, product * self.columns) if self.split == "m" else (product * ROWS, 0)


def slots(config: TuningConfig) -> list:
    """Return the shared memory of the ring: slots of A, B and the scales of A."""
    return [
        swizzled((config.stages, config.tile_m, GROUP), E4M3),
        swizzled((config.stages, config.tile_n, GROUP), E4M3),
        plgpu.SMEM((config.stages, config.tile_m), jnp.float32),
    ]


def multiply(
    config: TuningConfig,
    num_steps: Any,
    ring: Ring,
    wg: Array,
    slot: Array,
    *,
    lookahead: Callable[[Any, int], list],
    scale: Callable[[Array, int, Any], Array],
    promote: Callable[[Array, Array, Array, Array], Array],
) -> dict[tuple[int, int], Array]:
    """Return the sums of warpgroup `wg` over the steps of a tile.

    They are FP32 [64, columns] for each product, by `config.offset`.

    Args:
        config: how the tile is cut.
        num_steps: k / 128, at least 1; a number, or a scalar.
        ring: its first three operands are A, B and the scales of A.
        wg: the warpgroup's number.
        slot: of the first step.
        lookahead: first step, count -> for each step what is read of global memory before its products.
        scale: slot, number of the product, what was read ahead -> the scales of B of one product.
        promote: sum, product, scales of A [64], scales of B -> the sum with the scaled product, and what may become of
            the product's registers, which the next product takes over.
    """
    a_slots, b_slots, a_scale_slots, *_ = ring.operands
    row, column = config.origin(wg)
    origins = [(row + down, column + right) for down, right in map(config.offset, range(config.products))]
    below = config.split == "n"  # products lie below each other: they share the scales of B; side by side, those of A
    add = wgmma.never(wg)

    def receive(slot):
        plgpu.barrier_wait(ring.full.at[slot])
        return [
            plgpu.load(a_scale_slots.at[slot, pl.ds(row, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            for row, _ in (origins if below else origins[:1])
        ]

    def step(carry, loaded, more):
        slot, a_scales, product, *totals = carry
        following, received = ring.after(slot), a_scales
        for i, (row, column) in enumerate(origins):
            product = wgmma.start(
                a_slots.at[slot, pl.ds(row, ROWS)],
                b_slots.at[slot, pl.ds(column, config.columns)],
                product,
                add,
                ptx=not config.interpreted,
            )
            if not (below and i):
                b_scale = scale(slot, i, loaded)
            last = i == config.products - 1
            if last and more:
                received = receive(following)
            product = wgmma.finish(product, ptx=not config.interpreted)
            if last:
                plgpu.barrier_arrive(ring.empty.at[slot])
            totals[i], product = promote(totals[i], product, a_scales[i if below else 0], b_scale)
        return following, received, product, *totals

    def steps(first, count, carry):
        for loaded in lookahead(first, count):
            carry = step(carry, loaded, more=True)
        return carry

    carry = slot, receive(slot), zero_sum(config), *zero_sums(config).values()
    carry = over_steps(num_steps - 1, config.unroll, steps, carry)
    (loaded,) = lookahead(num_steps - 1, 1)
    _, _, _, *totals = step(carry, loaded, more=False)
    return {config.offset(i): total for i, total in enumerate(totals)}


def multiply_blocks(
    config: TuningConfig,
    num_steps: int,
    ring: Ring,
    wg: Array,
    slot: Array,
    b_scales: Any,
    first_column: Array,
    first_step: Any = None,
) -> dict[tuple[int, int], Array]:
    """Return `multiply` for B in blocks, whose scales are the ref `b_scales` [n / 128, k / 128].

    The tile begins at `first_column` and may end beyond the last block; so it may along k, where `first_step` is given.
    """
    _, column = config.origin(wg)

    def block_scale(i, step):
        block = lax.div(first_column + column + config.offset(i)[1], jnp.int32(GROUP))
        if first_step is not None:
            step = jnp.minimum(first_step + step, b_scales.shape[1] - 1)
        return b_scales[jnp.minimum(block, b_scales.shape[0] - 1), step]

    def lookahead(first, count):
        return [[block_scale(i, first + j) for i in range(config.products)] for j in range(count)]

    def promote(total, product, a_scale, b_scale):
        return total + product * lax.broadcast_in_dim(a_scale * b_scale, product.shape, [0]), product

    return multiply(
        config, num_steps, ring, wg, slot, lookahead=lookahead, scale=lambda _, i, loaded: loaded[i], promote=promote
    )


def skip(num_steps: int, ring: Ring, slot: Array) -> None:
    """Let the steps of a tile pass: what a warpgroup does that has no rows in it."""

    def step(_, slot):
        plgpu.barrier_wait(ring.full.at[slot])
        plgpu.barrier_arrive(ring.empty.at[slot])
        return ring.after(slot)

    lax.fori_loop(0, num_steps, step, slot)


def zero_sum(config: TuningConfig) -> Array:
    """Return FP32 zeros [64, columns], laid out as a product."""
    return plgpu.layout_cast(jnp.zeros((ROWS, config.columns), jnp.float32), plgpu.Layout.WGMMA)


def zero_sums(config: TuningConfig) -> dict[tuple[int, int], Array]:
    """Return the sums of a warpgroup before its first step, as `multiply` returns them."""
    return {config.offset(i): zero_sum(config) for i in range(config.products)}
