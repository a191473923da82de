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
(`hopper_product.py`).

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
    sums alive in branches        after the loop: the assembler serialises the products, 232 (`store` rounds before it
                                  branches)
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    GROUP,
    hopper_product,
    layout_inference,  # noqa: F401  for what it does when imported
    manual_axes,
)
from pallas_kernels.hopper_product import ROWS
from pallas_kernels.quantized import E4M3

WARPGROUPS = 2  # that multiply
MEMORY_REGISTERS, COMPUTE_REGISTERS = (
    24,
    240,
)  # per thread; together the 168 for each of 384 threads that a block starts with
SWIZZLE_BYTES, SWIZZLE_ROWS = 128, 8


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut.

    Attributes:
        columns: of one product, 64 or 128; its rows are 64.
        products: of each warpgroup and step.
        split: "m" or "n", the dim along which the two warpgroups share a tile; the products of one lie along the other.
        stages: slots of the ring.
        turn: steps that are unrolled.
        pieces: of the result, 64 rows of 128 bytes each, that may be on their way out per warpgroup.
        batch: pieces that are sent together.
        grid_minor: 0 or 1: the dim along which neighbouring blocks' tiles lie.
        grid_width: how many tiles along that dim share their operands in the L2 cache.
    """

    columns: int = 128
    products: int = 2
    split: str = "m"
    stages: int = 4
    turn: int = 8
    pieces: int = 2
    batch: int = 2
    grid_minor: int = 0
    grid_width: int = 8

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


@dataclasses.dataclass(frozen=True)
class Ring:
    """The slots through which operands pass.

    Attributes:
        operands: refs [stages, ...] of A, B, the scales of A, and what else a step needs.
        full: barriers, one per slot: its copies have arrived.
        empty: likewise: both warpgroups are done with it.
    """

    operands: Sequence[Any]
    full: Any
    empty: Any

    @property
    def stages(self) -> int:
        """The number of slots."""
        return self.operands[0].shape[0]

    def after(self, slot: Array) -> Array:
        """Return the slot that follows."""
        return jnp.where(slot == self.stages - 1, 0, slot + 1)

    def fill(self, slot: Array, sources: Sequence[Any]) -> Array:
        """Copy one step into a slot, once it is free; return the next slot."""
        plgpu.barrier_wait(self.empty.at[slot])
        for source, operand in zip(sources, self.operands, strict=True):
            plgpu.copy_gmem_to_smem(source, operand.at[slot], self.full.at[slot])
        return self.after(slot)

    def drain(self) -> None:
        """Wait until every slot is free again: the memory warpgroup's last act."""
        for slot in range(self.stages):
            plgpu.barrier_wait(self.empty.at[slot])


def slots(config: TuningConfig) -> list:
    """Return the shared memory of the ring: slots of A, B and the scales of A."""
    return [
        swizzled((config.stages, config.tile_m, GROUP), E4M3),
        swizzled((config.stages, config.tile_n, GROUP), E4M3),
        plgpu.SMEM((config.stages, config.tile_m), jnp.float32),
    ]


def barriers(copies: int, stages: int) -> list:
    """Return the barriers of a ring, full and empty, for a number of copies per slot."""
    arrivals = copies, WARPGROUPS
    return [plgpu.Barrier(num_arrivals=count, num_barriers=stages) for count in arrivals]


def tiled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in the swizzled layout of TMA and wgmma."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((SWIZZLE_ROWS, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def staging(pieces: int, dtype: Any) -> plgpu.SMEM:
    """Where pieces wait for their way out."""
    return swizzled((WARPGROUPS, pieces, ROWS, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize), dtype)


def swizzled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in rows of 128 bytes: the bytes of `tiled`, but the matrix in global memory may have any number of
    rows.
    """
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform(shape[-1:]), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    )


def over_steps(num_steps: Any, turn: int, body: Callable[[Any, int, Any], Any], carry: Any = None) -> Any:
    """Fold `body(first step, number of steps, carry)` over `num_steps`, a number or a scalar: `turn` of them at a time,
    then the rest.
    """
    if isinstance(num_steps, int):
        turns, rest = divmod(num_steps, turn)
        carry = lax.fori_loop(0, turns, lambda i, carry: body(i * turn, turn, carry), carry)
        return body(turns * turn, rest, carry) if rest else carry
    turns = lax.div(num_steps, jnp.int32(turn))
    carry = lax.fori_loop(0, turns, lambda i, carry: body(i * turn, turn, carry), carry)
    return lax.fori_loop(turns * turn, num_steps, lambda i, carry: body(i, 1, carry), carry)


def multiply(
    config: TuningConfig,
    num_steps: Any,
    ring: Ring,
    wg: Array,
    slot: Array,
    *,
    ahead: Callable[[Any, int], list],
    scale: Callable[[Array, int, Any], Array],
    promote: Callable[[Array, Array, Array, Array], Array],
) -> dict[tuple[int, int], Array]:
    """Return the sums of warpgroup `wg` over the steps of a tile: FP32 [64, columns] for each product, by
    `config.offset`.

    Args:
        config: how the tile is cut.
        num_steps: k / 128, at least 1; a number, or a scalar.
        ring: its first three operands are A, B and the scales of A.
        wg: the warpgroup's number.
        slot: of the first step.
        ahead: first step, count -> for each step what is read of global memory before its products.
        scale: slot, number of the product, what was read ahead -> the scales of B of one product.
        promote: sum, product, scales of A [64], scales of B -> the sum with the scaled product, and what may become of
            the product's registers, which the next product takes over.
    """
    a_slots, b_slots, a_scale_slots, *_ = ring.operands
    row, column = config.origin(wg)
    places = [(row + down, column + right) for down, right in map(config.offset, range(config.products))]
    below = config.split == "n"  # products lie below each other: they share the scales of B; side by side, those of A
    add = hopper_product.never(wg)

    def receive(slot):
        plgpu.barrier_wait(ring.full.at[slot])
        return [
            plgpu.load(a_scale_slots.at[slot, pl.ds(row, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            for row, _ in (places if below else places[:1])
        ]

    def step(carry, found, more):
        slot, a_scales, product, *totals = carry
        following, received = ring.after(slot), a_scales
        for i, (row, column) in enumerate(places):
            product = hopper_product.start(
                a_slots.at[slot, pl.ds(row, ROWS)], b_slots.at[slot, pl.ds(column, config.columns)], product, add
            )
            if not (below and i):
                b_scale = scale(slot, i, found)
            last = i == config.products - 1
            if last and more:
                received = receive(following)
            product = hopper_product.finish(product)
            if last:
                plgpu.barrier_arrive(ring.empty.at[slot])
            totals[i], product = promote(totals[i], product, a_scales[i if below else 0], b_scale)
        return following, received, product, *totals

    def turn(first, count, carry):
        for found in ahead(first, count):
            carry = step(carry, found, more=True)
        return carry

    carry = slot, receive(slot), zero_sum(config), *zero_sums(config).values()
    carry = over_steps(num_steps - 1, config.turn, turn, carry)
    (found,) = ahead(num_steps - 1, 1)
    _, _, _, *totals = step(carry, found, more=False)
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

    The tile begins at `first_column` and may end beyond the last block; likewise along k, where `first_step` is given.
    """
    _, column = config.origin(wg)

    def block_scale(i, step):
        block = lax.div(first_column + column + config.offset(i)[1], jnp.int32(GROUP))
        if first_step is not None:
            step = jnp.minimum(first_step + step, b_scales.shape[1] - 1)
        return b_scales[jnp.minimum(block, b_scales.shape[0] - 1), step]

    def ahead(first, count):
        return [[block_scale(i, first + j) for i in range(config.products)] for j in range(count)]

    def promote(total, product, a_scale, b_scale):
        return total + product * lax.broadcast_in_dim(a_scale * b_scale, product.shape, [0]), product

    return multiply(config, num_steps, ring, wg, slot, ahead=ahead, scale=lambda _, i, found: found[i], promote=promote)


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


def store(
    totals: Mapping[tuple[int, int], Array],
    out_slots: Any,
    room: Any,
    send: Callable[[Any, int, int], None],
    batch: int = 1,
) -> None:
    """Send the sums of a warpgroup out through shared memory, some pieces at a time.

    Args:
        totals: by their first row and column within what the warpgroup computes, FP32 [64, columns].
        out_slots: ref [pieces, 64, width].
        room: how many columns there are from the warpgroup's first one on; pieces that begin beyond are dropped.
        send: ref [64, width], its first row and column -> starts copies, uncommitted.
        batch: how many pieces are sent together.
    """
    pieces, _, width = out_slots.shape
    cut = []
    for (down, right), total in totals.items():
        # Rounded here and now: sums that live on through branches cost the assembler the pipeline of products, and it
        # spills.
        rounded = [
            lax.optimization_barrier(total[:, x : x + width].astype(out_slots.dtype))
            for x in range(0, total.shape[1], width)
        ]
        cut += [(down, right + j * width, piece) for j, piece in enumerate(rounded)]
    for first in range(0, len(cut), batch):
        together = cut[first : first + batch]

        @pl.when(together[0][1] < room)
        def _(first=first, together=together):
            # A total's first pieces wait for all: how many of the one before were dropped, only the run knows.
            plgpu.wait_smem_to_gmem(pieces // batch - 1 if first % len(rounded) else 0, wait_read_only=True)
            refs = [out_slots.at[(first + j) % pieces] for j in range(len(together))]
            for ref, (*_, piece) in zip(refs, together, strict=True):
                ref[...] = piece
            plgpu.commit_smem()
            for ref, (down, right, _) in zip(refs, together, strict=True):
                send(ref, down, right)
            plgpu.commit_smem_to_gmem_group()


def store_rows(ref: Any, out: Any, first: Array, start: Array, end: Array, columns: Any) -> None:
    """Copy those rows of `ref` [64, n] to the columns of `out` that lie from `start` to `end`; row 0 of `ref` is row
    `first` of `out`.
    """
    skip = jnp.clip(start - first, 0, ROWS)
    count = jnp.clip(end - first, 0, ROWS) - skip
    size = ROWS
    while size:  # a rectangle of each size that the binary form of the count has
        part = (count & size) != 0

        @pl.when(part)
        def _(skip=skip, size=size):
            plgpu.copy_smem_to_gmem(
                ref.at[pl.ds(skip, size)], out.at[pl.ds(first + skip, size), columns], commit_group=False
            )

        skip += jnp.where(part, size, 0)
        size //= 2


def launch(body: Callable, out_type: Any, num_blocks: int, scratch_types: list) -> Callable:
    """Return the kernel of `body(*refs)` on a persistent grid of `num_blocks`, three warpgroups each."""
    return plgpu.kernel(
        body,
        kernel_name=manual_axes.operation(body),
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


def by_role(ring: Ring, copy: Callable[[], None], compute: Callable[[Array], None]) -> None:
    """Run `copy()` in the memory warpgroup and `compute(wg)` in the others, each with its registers; all slots begin
    free and end free.

    The number of the warpgroup is asked for here and nowhere else: it is a shuffle, which the compiler leaves where it
    stands.
    """
    wg = lax.axis_index("wg")

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        copy()
        ring.drain()

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for slot in range(ring.stages):
            plgpu.barrier_arrive(ring.empty.at[slot])
        compute(wg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def padded_columns(n: int, dtype: Any) -> int:
    """Return n rounded up to whole swizzled lines, of which the copy engine wants a multiple."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return n if n < columns else -(-n // columns) * columns
