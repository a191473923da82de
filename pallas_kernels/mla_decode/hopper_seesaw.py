"""A turn of the seesaw (`hopper_many.py`): what the two warpgroups share, and what each does with two pages."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.hopper_fragments import LOWEST, finish
from pallas_kernels.mla_decode.schedule import PAGE

ROWS, HALF, ROTARY = 64, 256, 64
L = plgpu.Layout
UNTYPED: Any = plgpu  # the type checker does not see all that it exports
COLUMN = L.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Shared:
    """The shared memory of a thread block, and who may touch it when.

    Pieces of pages: `PIECES[side]` are the first and the second 256 dims and the rotary dims of page `side`. Each is
    freed by the one warpgroup that reads it last.
    """

    queries: Any  # [1, 64, 512]
    rotary_queries: Any  # [64, 64], later P1
    left: Any  # [2, 64, 256]
    right: Any
    rotary: Any  # [2, 64, 64]
    weights: Any  # P0
    stats: Any  # maxima, a0, a1, sums of both
    full: Any  # of left 0, left 1, right 0, right 1, rotary 0, rotary 1
    empty: Any
    queries_full: Any
    rotary_queries_full: Any
    queries_empty: Any
    rotary_queries_empty: Any
    scored0: Any
    scored1: Any
    weighed0: Any
    weighed1: Any

    def begin_free(self, side: int) -> None:
        """Free all that this warpgroup frees, before the first copy."""
        plgpu.barrier_arrive(self.queries_empty)
        if side == 0:
            plgpu.barrier_arrive(self.rotary_queries_empty)
        for piece in ((0, 1, 4), (2, 3, 5))[side]:
            plgpu.barrier_arrive(self.empty.at[piece])

    def drain(self) -> None:
        """Wait until all is free again: the memory warpgroup's last act."""
        plgpu.barrier_wait(self.queries_empty)
        plgpu.barrier_wait(self.rotary_queries_empty)
        for piece in range(6):
            plgpu.barrier_wait(self.empty.at[piece])


@dataclasses.dataclass(frozen=True)
class Half:
    """A warpgroup's work: 64 rows, half of the output, the scores of every other page."""

    side: int
    interpreted: bool
    task: Any
    shared: Shared
    first_row: Array

    def fragment(self, fragment: Any, outputs: Any, rows: Any) -> None:
        """Attend to a fragment's pages and store the result."""

        @pl.when(fragment.end > fragment.start)
        def _():
            shared = self.shared
            num_turns = lax.div(fragment.end - fragment.start, jnp.int32(2))
            plgpu.barrier_wait(shared.queries_full)
            plgpu.barrier_wait(shared.rotary_queries_full)
            rotary = plgpu.load(shared.rotary_queries, layout=L.WGMMA)
            if self.side == 0:
                shared.stats[0, :] = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), COLUMN)
                plgpu.commit_smem()
            step = self.left_turn if self.side == 0 else self.right_turn
            total = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), L.WGMMA)
            sums = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), COLUMN)

            def turn(i, carry):
                return step(i, i == num_turns - 1, rotary, fragment, *carry)

            total, sums = lax.fori_loop(0, num_turns, turn, (total, sums))
            if self.side == 0:
                plgpu.barrier_arrive(shared.rotary_queries_empty)
            self.store(fragment, outputs, rows, total, sums)

    def left_turn(self, i, is_last, rotary, fragment, total, sums) -> tuple:
        """Take two pages as warpgroup 0."""
        shared, zero = self.shared, lax.shift_right_logical(i, 20)
        token = (fragment.start + 2 * i) * PAGE
        scores = self.scores(zero, 0, rotary, (0, 2), token, is_last, fragment)
        old = self.stat(0)
        largest = jnp.maximum(old, scores.max(axis=1) * self.task.scale_log2)
        faded = jnp.exp2(old - largest)
        shared.stats[0, :], shared.stats[1, :] = largest, faded
        plgpu.barrier_arrive(shared.scored0)  # all threads arrive: a barrier orders plain stores and loads by itself
        weights = jnp.exp2(scores * self.task.scale_log2 - wide(largest, PAGE))
        sums = sums * faded + weights.sum(axis=1)
        self.clear_tail(shared.left.at[zero], fragment.length - token, fragment)

        def hand_over():
            plgpu.barrier_wait(shared.scored1)
            shared.weights[...] = (weights * wide(self.stat(2), PAGE)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.weighed0)

        own = weights.astype(jnp.bfloat16), shared.left.at[zero]
        total = self.accumulate(total * wide(faded, HALF), own, hand_over)
        plgpu.barrier_arrive(shared.empty.at[0])
        plgpu.barrier_wait(shared.weighed1)
        plgpu.barrier_wait(shared.full.at[1])
        self.clear_tail(shared.left.at[zero + 1], fragment.length - token - PAGE, fragment)
        faded = self.stat(2)
        total = self.accumulate(total * wide(faded, HALF), (shared.rotary_queries, shared.left.at[zero + 1]))
        plgpu.barrier_arrive(shared.empty.at[1])
        return total, sums * faded

    def right_turn(self, i, is_last, rotary, fragment, total, sums) -> tuple:
        """Take two pages as warpgroup 1."""
        shared, zero = self.shared, lax.shift_right_logical(i, 20)
        token = (fragment.start + 2 * i) * PAGE
        scores = self.scores(zero, 1, rotary, (3, 1), token + PAGE, is_last, fragment)
        page_largest = scores.max(axis=1) * self.task.scale_log2
        plgpu.barrier_wait(shared.scored0)
        old, faded = self.stat(0), self.stat(1)
        largest = jnp.maximum(old, page_largest)
        factor = jnp.exp2(old - largest)
        shared.stats[0, :], shared.stats[2, :] = largest, factor
        plgpu.barrier_arrive(shared.scored1)
        weights = jnp.exp2(scores * self.task.scale_log2 - wide(largest, PAGE))
        factor *= faded
        rounded = weights.astype(jnp.bfloat16)
        shared.rotary_queries[...] = rounded
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weighed1)
        sums = sums * factor + weights.sum(axis=1)
        self.clear_tail(shared.right.at[zero + 1], fragment.length - token - PAGE, fragment)

        def take_over():
            plgpu.barrier_wait(shared.weighed0)
            plgpu.barrier_wait(shared.full.at[2])

        total = self.accumulate(total * wide(factor, HALF), (rounded, shared.right.at[zero + 1]), take_over)
        plgpu.barrier_arrive(shared.empty.at[3])
        self.clear_tail(shared.right.at[zero], fragment.length - token, fragment)
        total = self.accumulate(total, (shared.weights, shared.right.at[zero]))
        plgpu.barrier_arrive(shared.empty.at[2])
        return total, sums

    def stat(self, which: int) -> Array:
        """Return one of the shared numbers per row."""
        return plgpu.load(self.shared.stats.at[which], layout=COLUMN, optimized=False)

    def scores(self, zero, page, rotary, order, token, is_last, fragment) -> Array:
        """Return S [64, 64] of a page whose first token is `token`, -inf where a query does not see."""
        shared = self.shared
        halves = {0: (0, shared.left), 1: (0, shared.left), 2: (HALF, shared.right), 3: (HALF, shared.right)}

        def run(total):
            for barrier in order:
                first, keys = halves[barrier]
                plgpu.barrier_wait(shared.full.at[barrier])
                queries = shared.queries.at[zero, :, pl.ds(first, HALF)]
                total = self.multiply(total, queries, keys.at[zero + page].transpose((1, 0)))
            plgpu.barrier_wait(shared.full.at[4 + page])
            total = self.multiply(total, rotary, shared.rotary.at[zero + page].transpose((1, 0)))
            return total if self.interpreted else total[...]

        if self.interpreted:
            scores = run(jnp.zeros((ROWS, PAGE), jnp.float32))
            plgpu.commit_smem()  # the detector wants it between a plain read and the next copy; wgmma reads otherwise
        else:
            scores = pl.run_scoped(run, UNTYPED.ACC((ROWS, PAGE), jnp.float32))
        plgpu.barrier_arrive(shared.empty.at[4 + page])

        @pl.when(is_last)
        def _():
            plgpu.barrier_arrive(shared.queries_empty)

        def mask(scores):
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 1, layout=L.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 0, layout=L.WGMMA) + self.first_row
            return jnp.where(column < self.task.seen(row, fragment.length) - token, scores, -jnp.inf)

        complete = token + PAGE <= fragment.length - self.task.num_queries + 1
        return lax.cond(complete, lambda scores: scores, mask, scores)

    def multiply(self, total, a, b) -> Any:
        """Add a product: to an accumulator, or in the interpreter to an array."""
        if self.interpreted:
            a = a if isinstance(a, Array) else a[...]
            return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.wgmma(total, a, b)
        return total

    def accumulate(self, total, product, meanwhile=lambda: None) -> Array:
        """Return `total` [64, 256] with a product added; `meanwhile` runs beside the tensor cores."""
        if self.interpreted:
            meanwhile()
            total = self.multiply(total, *product)
            plgpu.commit_smem()
            return total

        def run(ref):
            plgpu.wgmma(ref, *product)
            meanwhile()

        return pl.run_state(run)(UNTYPED.ACC.init(total))

    def clear_tail(self, values, valid, fragment) -> None:
        """Put zeros behind the first `valid` tokens of these values: they may be NaN."""

        @pl.when(valid < PAGE)
        def _():
            token = plgpu.broadcasted_iota(jnp.int32, (PAGE, PAGE), 0, layout=L.WGMMA)
            for first in range(0, HALF, PAGE):
                piece = values.at[:, pl.ds(first, PAGE)]
                piece[...] = jnp.where(token < valid, plgpu.load(piece, layout=L.WGMMA), jnp.bfloat16(0))
            plgpu.commit_smem()

    def store(self, fragment, outputs, rows, total, sums) -> None:
        """Exchange sums and store this half: in BF16 if the fragment is its sequence's only one."""
        shared = self.shared
        shared.stats[3 + self.side, :] = sums
        plgpu.commit_smem()
        mine, other = (shared.scored0, shared.scored1)[:: 1 - 2 * self.side]
        plgpu.barrier_arrive(mine)
        plgpu.barrier_wait(other)
        sums += self.stat(4 - self.side)
        inverse, logarithm = finish(sums, self.stat(0) if self.side == 0 else sums)  # maxima are warpgroup 0's again
        total = total * wide(inverse, HALF)

        def to(values, logarithms, index):
            values[index, rows, pl.ds(self.side * HALF, HALF)] = total.astype(values.dtype)
            if self.side == 0:
                logarithms[index, rows] = logarithm

        out, lse, partial_out, partial_lse = outputs
        pl.when(fragment.split == 0)(lambda: to(out, lse, fragment.sequence))
        pl.when(fragment.split != 0)(lambda: to(partial_out, partial_lse, fragment.number))


def wide(column: Array, num_columns: int) -> Array:
    """Return a number per row in every column."""
    return lax.broadcast_in_dim(column, (ROWS, num_columns), [0])
