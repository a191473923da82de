"""A page of the swapped products (`hopper_few.py`): what the two warpgroups share, and what each does with it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import WARPGROUPS
from pallas_kernels.mla_decode.hopper_fragments import LOWEST, finish
from pallas_kernels.mla_decode.schedule import PAGE

TILE = 64  # dims: one swizzled line of BF16
KEY_TILES, VALUE_TILES = 9, 8  # of an entry: 512 latent and 64 rotary dims
OWN_TILES = VALUE_TILES // WARPGROUPS
L = plgpu.Layout
UNTYPED: Any = plgpu  # the type checker does not see all that it exports


def after(slot: Array, count: Any, stages: int) -> Array:
    """Return the slot `count` tiles behind `slot`."""
    behind = slot + count
    return jnp.where(behind >= stages, behind - stages, behind)


@dataclasses.dataclass(frozen=True)
class Shared:
    """The shared memory of a thread block, and its barriers."""

    queries: Any  # [slots, n, 576]
    ring: Any  # [stages, 64, 64]
    weights: Any  # [2, n, 64], of each warpgroup
    full: Any
    empty: Any
    queries_full: Any
    queries_empty: Any
    tail: Any
    scratch: Any  # FP32 [2, .], of each warpgroup's reductions

    def begin_free(self) -> None:
        """Free all slots, before the first copy."""
        for slot in range(self.ring.shape[0]):
            plgpu.barrier_arrive(self.empty.at[slot])
        for turn in range(self.queries.shape[0]):
            plgpu.barrier_arrive(self.queries_empty.at[turn])

    def drain(self) -> None:
        """Wait until all slots are free again: the memory warpgroup's last act."""
        for slot in range(self.ring.shape[0]):
            plgpu.barrier_wait(self.empty.at[slot])
        for turn in range(self.queries.shape[0]):
            plgpu.barrier_wait(self.queries_empty.at[turn])


@dataclasses.dataclass(frozen=True)
class Half:
    """A multiplying warpgroup, its rows and its half of the output."""

    interpreted: bool
    task: Any
    n: int
    shared: Shared
    wg: Array

    def fragment(self, fragment, outputs, slot, turn) -> None:
        """Attend to a fragment's pages and store the result."""
        shared = self.shared
        plgpu.barrier_wait(shared.queries_full.at[turn])
        lowest = plgpu.layout_cast(jnp.full((self.n,), LOWEST, jnp.float32), L.WGMMA.reduce(0))
        zeros = [plgpu.layout_cast(jnp.zeros((TILE, self.n), jnp.float32), L.WGMMA) for _ in range(1 + OWN_TILES)]

        def page(j, carry):
            return self.page(turn, j * PAGE, fragment.length, *carry)

        _, largest, sums, *totals = lax.fori_loop(fragment.start, fragment.end, page, (slot, lowest, *zeros))
        plgpu.barrier_arrive(shared.queries_empty.at[turn])
        self.store(fragment, outputs, largest, self.reduce("add", sums), totals)

    def page(self, turn, first, length, slot, largest, sums, *totals) -> tuple:
        """Take the page whose first token is `first`: scores, weights, values.

        The sums [64, n] are added up at the end.
        """
        shared, stages, n = self.shared, self.shared.ring.shape[0], self.n
        slots = [after(slot, tile, stages) for tile in range(KEY_TILES)]
        own, others = (
            [after(slot, half * OWN_TILES + tile, stages) for tile in range(OWN_TILES)]
            for half in (self.wg, 1 - self.wg)
        )
        scores = self.score(slots, turn)
        for other in (*others, slots[-1]):
            plgpu.barrier_arrive(shared.empty.at[other])
        token = plgpu.broadcasted_iota(jnp.int32, (PAGE, n), 0, layout=L.WGMMA) + first
        row = plgpu.broadcasted_iota(jnp.int32, (PAGE, n), 1, layout=L.WGMMA)
        scores = jnp.where(token < self.task.seen(row, length), scores, -jnp.inf)
        self.clear_tail(own, length - first)
        new = jnp.maximum(largest, self.reduce("max", scores) * self.task.scale_log2)
        faded = lax.broadcast_in_dim(jnp.exp2(largest - new), (PAGE, n), [1])
        weights = jnp.exp2(scores * self.task.scale_log2 - lax.broadcast_in_dim(new, (PAGE, n), [1]))
        stored = plgpu.layout_cast(weights.astype(jnp.bfloat16), L.WGMMA_TRANSPOSED)
        shared.weights.at[self.wg].transpose((1, 0))[...] = stored
        plgpu.commit_smem()
        totals = self.weigh(own, [total * faded for total in totals])
        for used in own:
            plgpu.barrier_arrive(shared.empty.at[used])
        return after(slots[-1], 1, stages), new, sums * faded + weights, *totals

    def score(self, slots, turn) -> Array:
        """Return S^T [64, n] of a page."""
        columns = [pl.ds(tile * TILE, TILE) for tile in range(KEY_TILES)]
        queries = [self.shared.queries.at[turn, :, column].transpose((1, 0)) for column in columns]
        if self.interpreted:
            total = jnp.zeros((PAGE, self.n), jnp.float32)
            for slot, query in zip(slots, queries, strict=True):
                plgpu.barrier_wait(self.shared.full.at[slot])
                total += jnp.dot(self.shared.ring[slot], query[...], preferred_element_type=jnp.float32)
            return total

        def run(total):
            for slot, query in zip(slots, queries, strict=True):
                plgpu.barrier_wait(self.shared.full.at[slot])
                plgpu.wgmma(total, self.shared.ring.at[slot], query)
            return total[...]

        return pl.run_scoped(run, UNTYPED.ACC((PAGE, self.n), jnp.float32))

    def weigh(self, slots, totals) -> tuple:
        """Return the tiles of O^T [64, n] with the values of this page added."""
        weights = self.shared.weights.at[self.wg].transpose((1, 0))
        if self.interpreted:
            return tuple(
                total + jnp.dot(self.shared.ring[slot].T, weights[...], preferred_element_type=jnp.float32)
                for slot, total in zip(slots, totals, strict=True)
            )

        def run(totals):
            for slot, total in zip(slots, totals, strict=True):
                plgpu.wgmma(total, self.shared.ring.at[slot].transpose((1, 0)), weights)

        return tuple(pl.run_state(run)(tuple(UNTYPED.ACC.init(total) for total in totals)))

    def reduce(self, operation: str, x: Array) -> Array:
        """Return the maxima or sums of columns.

        `x.max(axis=0)` would do, but all warpgroups of a kernel exchange their warps' results through the same memory
        (jax 0.11.2): two that reduce at the same time spoil each other's.
        """
        if self.interpreted:
            return x.max(axis=0) if operation == "max" else x.sum(axis=0)
        vector = plgpu.ShapeDtypeStruct((self.n,), jnp.float32, layout=L.WGMMA.reduce(0))

        @UNTYPED.inline_mgpu(arg_types=(L.WGMMA, plgpu.RefType()), return_type=vector)
        def emit(_, x, scratch):
            return x.reduce(operation, 0, scratch)

        return emit(x, self.shared.scratch.at[self.wg])

    def clear_tail(self, slots, valid) -> None:
        """Put zeros behind the first `valid` tokens of these tiles, when both warpgroups have read them as keys."""

        @pl.when(valid < PAGE)
        def _():
            plgpu.barrier_arrive(self.shared.tail)
            plgpu.barrier_wait(self.shared.tail)
            token = plgpu.broadcasted_iota(jnp.int32, (PAGE, TILE), 0, layout=L.WGMMA)
            for slot in slots:
                tile = plgpu.load(self.shared.ring.at[slot], layout=L.WGMMA)
                self.shared.ring[slot] = jnp.where(token < valid, tile, jnp.bfloat16(0))

    def store(self, fragment, outputs, largest, sums, totals) -> None:
        """Store a fragment's result, normalised by itself: in BF16 if it is a sequence's only one."""
        inverse, logarithm = finish(sums, largest)

        def to(values, logarithms, index):
            for tile, total in enumerate(totals):
                columns = pl.ds((self.wg * OWN_TILES + tile) * TILE, TILE)
                result = (total * lax.broadcast_in_dim(inverse, total.shape, [1])).astype(values.dtype)
                values.at[index, :, columns].transpose((1, 0))[...] = plgpu.layout_cast(result, L.WGMMA_TRANSPOSED)

            @pl.when(self.wg == 0)
            def _():
                logarithms[index, :] = logarithm

        out, lse, partial_out, partial_lse = outputs
        pl.when(fragment.split == 0)(lambda: to(out, lse, fragment.sequence))
        pl.when(fragment.split != 0)(lambda: to(partial_out, partial_lse, fragment.number))
