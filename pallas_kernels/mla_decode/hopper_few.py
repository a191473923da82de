"""MLA decode on Hopper for at most 32 rows of queries: S^T = K Q^T and O^T = V^T P^T, so rows are columns.

wgmma has 64 rows at least, but as few as 8 columns. With queries as columns nothing is padded to 64, queries take
18 KB of shared memory instead of 74, and a warpgroup holds its half of O^T in 32 to 64 registers a thread.

    ring       tiles of 64 tokens x 64 dims, 9 a page, each with a barrier of its own. A tile is refilled as soon as
               both warpgroups are done with it.
    scores     both warpgroups compute the whole S^T of a page: the products are far from their limit here, and what
               is computed twice need not be exchanged. Both have the same maxima and sums, bit for bit.
    output     warpgroup w owns dims 256 w to 256 w + 255 of O^T: V^T is the page itself, read as a transposed operand.
    masks      for every page: 8 or 16 numbers a thread.
    NaN        a tail of a page may hold NaN, and 0 times NaN is NaN: in a sequence's last page each warpgroup puts
               zeros into the tail of its half of V, when both have computed their scores.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import WARPGROUPS, launch, tiled
from pallas_kernels.mla_decode.hopper_fragments import LOWEST, finish, over_fragments
from pallas_kernels.mla_decode.schedule import PAGE, Schedule

TILE = 64  # dims: one swizzled line of BF16
KEY_TILES, VALUE_TILES = 9, 8  # of an entry: 512 latent and 64 rotary dims
OWN_TILES = VALUE_TILES // WARPGROUPS
# per thread; with fewer, either spills
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232
MOST_ROWS = 32
L = plgpu.Layout


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        tiles: of the ring, for at most 16 rows and for more.
        query_slots: sequences whose queries have room, likewise.
        overhead: what a fragment costs beside its pages, in pages.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    tiles: tuple[int, int] = (18, 21)
    query_slots: tuple[int, int] = (2, 1)
    overhead: int = 1
    interpreted: bool = False

    unit = 1

    def padded_rows(self, num_rows: int) -> int:
        """Rows that the kernel computes."""
        return 16 if num_rows <= 16 else MOST_ROWS

    def num_blocks(self, num_rows: int) -> int:
        """Thread blocks that read the same pages."""
        return 1


def attend(task: Any, q: Array, cache: Array, tables: Array, schedule: Schedule, config: TuningConfig) -> list[Array]:
    """Return `Task.results`: those of whole sequences, and of fragments."""
    (batch, n, _), num_parts = q.shape, len(schedule.parts)
    stages, query_slots = config.tiles[n > 16], config.query_slots[n > 16]

    def kernel(q_ref, cache_ref, tables_ref, parts_ref, fragments_ref, *refs):
        outputs, shared = refs[:4], Shared(*refs[4:])
        part, wg = lax.axis_index("sm"), lax.axis_index("wg")
        over_own = functools.partial(over_fragments, parts_ref, fragments_ref, part)
        start = jnp.int32(0), jnp.int32(0)

        def after_fragment(fragment, slot, turn):
            used = lax.rem(slot + (fragment.end - fragment.start) * KEY_TILES, jnp.int32(stages))
            return used, jnp.where(fragment.end > fragment.start, lax.rem(turn + 1, jnp.int32(query_slots)), turn)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def fragment(fragment, carry):
                copy(fragment, q_ref, cache_ref, tables_ref, shared, *carry)
                return after_fragment(fragment, *carry)

            over_own(fragment, start)
            shared.drain()

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            shared.begin_free()
            half = Half(config.interpreted, task, n, shared, wg)

            def fragment(fragment, carry):
                pl.when(fragment.end > fragment.start)(lambda: half.fragment(fragment, outputs, *carry))
                return after_fragment(fragment, *carry)

            over_own(fragment, start)

    scratch = [
        tiled((query_slots, n, KEY_TILES * TILE), jnp.bfloat16),
        tiled((stages, PAGE, TILE), jnp.bfloat16),
        tiled((WARPGROUPS, n, PAGE), jnp.bfloat16),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        plgpu.Barrier(num_barriers=query_slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=query_slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.SMEM((WARPGROUPS, n * 32), jnp.float32),
    ]
    out_type = task.results(batch, len(schedule.fragments), n, VALUE_TILES * TILE)
    run = launch(kernel, out_type, num_parts, scratch, reduction_scratch_bytes=0)
    return run(q, cache, tables, schedule.parts, schedule.fragments)


def after(slot: Array, count: Any, stages: int) -> Array:
    """Return the slot `count` tiles behind `slot`."""
    behind = slot + count
    return jnp.where(behind >= stages, behind - stages, behind)


def copy(fragment, q_ref, cache_ref, tables_ref, shared, slot, turn) -> None:
    """Copy a fragment's queries and pages, each tile as soon as its slot is free."""

    def number(j):
        return tables_ref[fragment.sequence, jnp.minimum(j, fragment.end - 1)]

    def page(j, carry):
        slot, page_number = carry
        following = number(j + 1)  # read ahead of the waits
        for tile in range(KEY_TILES):
            plgpu.barrier_wait(shared.empty.at[slot])
            source = cache_ref.at[page_number, :, pl.ds(tile * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, shared.ring.at[slot], shared.full.at[slot])
            slot = after(slot, 1, shared.ring.shape[0])
        return slot, following

    @pl.when(fragment.end > fragment.start)
    def _():
        plgpu.barrier_wait(shared.queries_empty.at[turn])
        plgpu.copy_gmem_to_smem(q_ref.at[fragment.sequence], shared.queries.at[turn], shared.queries_full.at[turn])
        lax.fori_loop(fragment.start, fragment.end, page, (slot, number(fragment.start)))


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

        return pl.run_scoped(run, plgpu.ACC((PAGE, self.n), jnp.float32))

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

        return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(total) for total in totals)))

    def reduce(self, operation: str, x: Array) -> Array:
        """Return the maxima or sums of columns.

        `x.max(axis=0)` would do, but all warpgroups of a kernel exchange their warps' results through the same memory
        (jax 0.11.2): two that reduce at the same time spoil each other's.
        """
        if self.interpreted:
            return x.max(axis=0) if operation == "max" else x.sum(axis=0)
        vector = plgpu.ShapeDtypeStruct((self.n,), jnp.float32, layout=L.WGMMA.reduce(0))

        @plgpu.inline_mgpu(arg_types=(L.WGMMA, plgpu.RefType()), return_type=vector)
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
