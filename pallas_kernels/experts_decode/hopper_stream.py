"""How weights stream through a multiprocessor while few rows are multiplied with them.

A thread block has two warpgroups: one copies, one multiplies. What stands in a slot of the ring is one step along k,
128 bytes of it: two blocks of weights of some columns each, and the N rows that they are multiplied with.

    BF16    weights [64 k, width] as they are stored, rows [N, 64]        sums stay in the tensor cores' accumulators
    FP8     weights [width, 128 k], rows [N, 128] and their scales        promoted in FP32 after every step

Weights are the left operand, with 64 of their columns as wgmma's rows, and the rows are its columns: nothing is padded
to 64. One multiplying warpgroup suffices: memory takes 900 clocks for a slot of 16 KB, its products and barriers 300.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.experts_decode.hopper_slots import BLOCKS, ROWS, Shape
from pallas_kernels.lowering import layout_inference

FEW_ROWS = 32  # up to which all products of a step have registers beside the sums
L = plgpu.Layout
UNTYPED: Any = plgpu  # the type checker does not see all that it exports


class Source(NamedTuple):
    """What a visit copies.

    Attributes:
        weight: ref of the expert's matrix [k, .], in FP8 [., k].
        columns: the first column of each block.
        rows: ref [., k].
        scales: ref [k / 128, .] of the rows, in FP8.
        row: the first.
        turn: the step along k that comes first.
    """

    weight: Any
    columns: Sequence[Any]
    rows: Any
    scales: Any
    row: Any
    turn: Any = 0


@dataclasses.dataclass(frozen=True)
class Stream:
    """The ring in a kernel."""

    shape: Shape
    interpreted: bool
    weights: Any
    rows: Any
    scales: Any
    full: Any
    empty: Any

    @classmethod
    def of(cls, shape: Shape, interpreted: bool, refs: Sequence[Any]) -> "Stream":
        """Return the stream of the refs of `Shape.scratch`."""
        weights, rows, *scales, full, empty = refs
        return cls(shape, interpreted, weights, rows, scales[0] if scales else None, full, empty)

    @property
    def stages(self) -> int:
        """The number of slots."""
        return self.weights.shape[0]

    def after(self, slot: Array) -> Array:
        """Return the slot that follows."""
        return jnp.where(slot == self.stages - 1, 0, slot + 1)

    def by_role(self, copy: Callable[[], None], multiply: Callable[[], None]) -> None:
        """Run `copy()` in the one warpgroup and `multiply()` in the other; slots begin and end free."""
        wg = lax.axis_index("wg")

        @pl.when(wg == 1)
        def _():
            copy()
            for slot in range(self.stages):
                plgpu.barrier_wait(self.empty.at[slot])

        @pl.when(wg == 0)
        def _():
            for slot in range(self.stages):
                plgpu.barrier_arrive(self.empty.at[slot])
            multiply()

    def place(self, i: Any, turn: Any) -> Array:
        """Return where along k the i-th step is."""
        place = i + turn
        return jnp.where(place >= self.shape.steps, place - self.shape.steps, place)

    def spans(self, start: Any, end: Any, body: Callable, carry: Any) -> Any:
        """Fold `body(visit, first step, last step + 1, carry)` over the visits that steps `start` to `end` lie in."""
        steps = self.shape.steps

        def one(visit, carry):
            return body(visit, jnp.maximum(start - visit * steps, 0), jnp.minimum(end - visit * steps, steps), carry)

        return lax.fori_loop(lax.div(start, jnp.int32(steps)), lax.div(end + steps - 1, jnp.int32(steps)), one, carry)

    def fill(self, slot: Array, source: "Source", first: Any = 0, last: Any = None) -> Array:
        """Copy steps of a visit into slots, each once it is free; return the next slot."""
        shape = self.shape
        taken = pl.ds(source.row, shape.rows)

        def step(i, slot):
            place = self.place(i, source.turn)
            ks, full = pl.ds(place * shape.depth, shape.depth), self.full.at[slot]
            plgpu.barrier_wait(self.empty.at[slot])
            for block, column in enumerate(source.columns):
                own = pl.ds(column, shape.width)
                weights = source.weight.at[own, ks] if shape.in_fp8 else source.weight.at[ks, own]
                plgpu.copy_gmem_to_smem(weights, self.weights.at[slot, block], full)
            plgpu.copy_gmem_to_smem(source.rows.at[taken, ks], self.rows.at[slot], full)
            if shape.in_fp8:
                own = self.scales.at[slot, pl.ds(0, shape.rows)]
                plgpu.copy_gmem_to_smem(source.scales.at[place, taken], own, full)
            return self.after(slot)

        return lax.fori_loop(first, shape.steps if last is None else last, step, slot)

    def multiply(self, slot: Array, start: Any, end: Any, block_scale: Callable) -> tuple[Array, list[Array]]:
        """Return the next slot, and the FP32 sums [64, N] over steps of some visits, block after block.

        Args:
            slot: the first.
            start: the first step, counted over all visits.
            end: the last step, plus 1.
            block_scale: visit -> a function from block and step to the scale of the weights; FP8 only.
        """
        if not self.shape.in_fp8:
            return self._multiply_bf16(slot, end - start)
        return self._multiply_fp8(slot, start, end, block_scale)

    def _products(self, slot: Array, first: int, accumulators: Sequence[Any]) -> None:
        right = self.rows.at[slot].transpose((1, 0))
        for i, accumulator in enumerate(accumulators, first):
            plgpu.wgmma(accumulator, self._left(slot, i), right)

    def _left(self, slot: Array, i: int) -> Any:
        block, tile = divmod(i, self.shape.tiles)
        own = pl.ds(tile * ROWS, ROWS)
        if self.shape.in_fp8:
            return self.weights.at[slot, block, own]
        return self.weights.at[slot, block, :, own].transpose((1, 0))

    def _dots(self, slot: Array, numbers: range) -> list[Array]:
        """Return products of a step, where wgmma is not known."""
        right = self.rows[slot].astype(jnp.float32)
        lefts = [self._left(slot, i)[...].astype(jnp.float32) for i in numbers]
        plgpu.commit_smem()  # ordinary reads before a copy into the slot: the race detector asks for it, wgmma does not
        return [jnp.dot(left, right.T, preferred_element_type=jnp.float32) for left in lefts]

    def _zeros(self) -> list[Array]:
        zero = plgpu.layout_cast(jnp.zeros((ROWS, self.shape.rows), jnp.float32), L.WGMMA)
        return [zero] * (BLOCKS * self.shape.tiles)

    def _accumulators(self, count: int) -> list:
        return [UNTYPED.ACC((ROWS, self.shape.rows), jnp.float32)] * count

    def _multiply_bf16(self, slot, steps):
        def before(slot):
            return jnp.where(slot == 0, self.stages - 1, slot - 1)

        if self.interpreted:

            def dots(_, carry):
                slot, *totals = carry
                plgpu.barrier_wait(self.full.at[slot])
                totals = [total + dot for total, dot in zip(totals, self._dots(slot, range(len(totals))), strict=True)]
                plgpu.barrier_arrive(self.empty.at[slot])
                return self.after(slot), *totals

            slot, *totals = lax.fori_loop(0, steps, dots, (slot, *self._zeros()))
            return slot, totals

        def run(*accumulators):
            def step(i, slot):
                plgpu.barrier_wait(self.full.at[slot])
                self._products(slot, 0, accumulators)
                plgpu.wgmma_wait(len(accumulators))
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(self.empty.at[before(slot)]))
                return self.after(slot)

            last = lax.fori_loop(0, steps, step, slot)
            totals = [accumulator[...] for accumulator in accumulators]
            pl.when(steps > 0)(lambda: plgpu.barrier_arrive(self.empty.at[before(last)]))
            return last, *totals

        slot, *totals = pl.run_scoped(run, *self._accumulators(BLOCKS * self.shape.tiles))
        return slot, totals

    def _multiply_fp8(self, slot, start, end, block_scale):
        count = BLOCKS * self.shape.tiles
        together = count if self.shape.rows <= FEW_ROWS else self.shape.tiles  # products in registers beside all sums

        def products(slot, first):
            if self.interpreted:
                return self._dots(slot, range(first, first + together))

            def run(*accumulators):
                self._products(slot, first, accumulators)
                return [accumulator[...] for accumulator in accumulators]

            return pl.run_scoped(run, *self._accumulators(together))

        def visit(number, first_step, last_step, carry):
            scale_of = block_scale(number)

            def step(i, carry):
                slot, scales, *totals = carry
                following = [scale_of(block, jnp.minimum(i + 1, last_step - 1)) for block in range(BLOCKS)]
                plgpu.barrier_wait(self.full.at[slot])
                own = plgpu.load(
                    self.scales.at[slot, pl.ds(0, self.shape.rows)], layout=L.WGMMA.reduce(0), optimized=False
                )
                factors = [lax.broadcast_in_dim(own * scale, totals[0].shape, [1]) for scale in scales]
                for first in range(0, count, together):
                    made = products(slot, first)
                    if first + together == count:
                        plgpu.barrier_arrive(self.empty.at[slot])
                    for j, value in enumerate(made, first):
                        totals[j] += value * factors[j // self.shape.tiles]
                return self.after(slot), following, *totals

            slot, *totals = carry
            first = [scale_of(block, first_step) for block in range(BLOCKS)]
            slot, _, *totals = lax.fori_loop(first_step, last_step, step, (slot, first, *totals))
            return slot, *totals

        slot, *totals = self.spans(start, end, visit, (slot, *self._zeros()))
        return slot, totals


def launch(body: Callable, name: str, out_type: Any, scratch: list) -> Callable:
    """Return the kernel of `body(*refs)`: a block of two warpgroups on every multiprocessor."""
    layout_inference.install()
    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=out_type,
        grid=(num_multiprocessors(),),
        grid_names=("sm",),
        num_threads=2,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )


def over_units(count: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Fold `body(unit, carry)` over this block's share of `count` units, every `num_multiprocessors`-th."""
    own, blocks = lax.axis_index("sm"), lax.axis_size("sm")
    turns = lax.div(count - own + blocks - 1, jnp.int32(blocks))
    return lax.fori_loop(0, turns, lambda i, carry: body(own + i * blocks, carry), carry)
