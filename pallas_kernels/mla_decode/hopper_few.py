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
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import WARPGROUPS, by_role, launch, tiled
from pallas_kernels.mla_decode.schedule import PAGE, Schedule

TILE = 64  # dims: one swizzled line of BF16
KEY_TILES, VALUE_TILES = 9, 8  # of an entry: 512 latent and 64 rotary dims
OWN_TILES = VALUE_TILES // WARPGROUPS
MOST_ROWS = 32
LOWEST = -1e30  # a maximum before there is one: finite, so that differences are
LOG2E = math.log2(math.e)
L = plgpu.Layout


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        tiles: of the ring, for at most 16 rows and for more.
        overhead: what a sequence costs beside its pages, in pages.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    tiles: tuple[int, int] = (23, 18)
    overhead: int = 1
    interpreted: bool = False

    unit = 1

    def padded_rows(self, num_rows: int) -> int:
        """Rows that the kernel computes."""
        return 16 if num_rows <= 16 else MOST_ROWS

    def num_blocks(self, num_rows: int) -> int:
        """Thread blocks that read the same pages."""
        return 1

    def stages(self, num_rows: int) -> int:
        """Tiles of the ring."""
        return self.tiles[num_rows > 16]


def attend(task: Any, q: Array, cache: Array, tables: Array, schedule: Schedule, config: TuningConfig) -> list[Array]:
    """Return `hopper.results`: those of whole sequences, and of fragments."""
    from pallas_kernels.mla_decode.hopper import results

    (batch, n, _), num_parts, stages = q.shape, len(schedule.parts), config.stages(q.shape[1])

    def kernel(q_ref, cache_ref, tables_ref, parts_ref, fragments_ref, *refs):
        outputs, (q_slots, ring_slots, weights, full, empty, q_full, q_empty, tail) = refs[:4], refs[4:]
        part = lax.axis_index("sm")

        def over_fragments(body):
            """Fold `body(fragment, slot, turn) -> slot` over this part's fragments; `turn` counts those with pages."""
            first, count = parts_ref[part, 0], parts_ref[part, 1]

            def one(i, carry):
                number = first + i
                fragment = [number, *(fragments_ref[number, field] for field in range(5))]
                return body(fragment, *carry)

            lax.fori_loop(0, count, one, (jnp.int32(0), jnp.int32(0)))

        def copy():
            def fragment(fields, slot, turn):
                _, sequence, start, end, _, _ = fields
                turn_slot = lax.rem(turn, jnp.int32(2))

                @pl.when(end > start)
                def _():
                    plgpu.barrier_wait(q_empty.at[turn_slot])
                    plgpu.copy_gmem_to_smem(q_ref.at[sequence], q_slots.at[turn_slot], q_full.at[turn_slot])

                def page(j, carry):
                    slot, number = carry
                    following = tables_ref[sequence, jnp.minimum(j + 1, end - 1)]  # read ahead of the waits
                    for tile in range(KEY_TILES):
                        plgpu.barrier_wait(empty.at[slot])
                        source = cache_ref.at[number, :, pl.ds(tile * TILE, TILE)]
                        plgpu.copy_gmem_to_smem(source, ring_slots.at[slot], full.at[slot])
                        slot = after(slot, 1, stages)
                    return slot, following

                number = tables_ref[sequence, jnp.minimum(start, tables_ref.shape[1] - 1)]
                slot, _ = lax.fori_loop(start, end, page, (slot, number))
                return slot, turn + (end > start).astype(jnp.int32)

            over_fragments(fragment)
            for i in range(2):
                plgpu.barrier_wait(q_empty.at[i])

        def compute(wg):
            for i in range(2):
                plgpu.barrier_arrive(q_empty.at[i])
            block = Block(config, task, n, ring_slots, q_slots, weights.at[wg], full, empty, tail)

            def fragment(fields, slot, turn):
                number, sequence, start, end, split, length = fields

                def attend():
                    turn_slot = lax.rem(turn, jnp.int32(2))
                    plgpu.barrier_wait(q_full.at[turn_slot])
                    carry = slot, *block.start()
                    carry = lax.fori_loop(start, end, lambda j, c: block.page(wg, turn_slot, j, length, *c), carry)
                    plgpu.barrier_arrive(q_empty.at[turn_slot])
                    block.store(wg, number, sequence, split, outputs, *carry[1:])

                pl.when(end > start)(attend)
                used = (end - start) * KEY_TILES
                return lax.rem(slot + used, jnp.int32(stages)), turn + (end > start).astype(jnp.int32)

            over_fragments(fragment)

        from pallas_kernels.hopper.ring import Ring

        by_role(Ring((ring_slots,), full, empty), copy, compute)

    scratch = [
        tiled((2, n, KEY_TILES * TILE), jnp.bfloat16),
        tiled((stages, PAGE, TILE), jnp.bfloat16),
        tiled((WARPGROUPS, n, PAGE), jnp.bfloat16),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    run = launch(kernel, results(batch, len(schedule.fragments), n, VALUE_TILES * TILE), num_parts, scratch)
    return run(q, cache, tables, schedule.parts, schedule.fragments)


def after(slot: Array, count: Any, stages: int) -> Array:
    """Return the slot `count` tiles behind `slot`."""
    behind = slot + count
    return jnp.where(behind >= stages, behind - stages, behind)


@dataclasses.dataclass(frozen=True)
class Block:
    """What a multiplying warpgroup works with: its rows and its shared memory."""

    config: TuningConfig
    task: Any
    n: int
    ring: Any
    q: Any
    weights: Any
    full: Any
    empty: Any
    tail: Any

    def start(self) -> tuple:
        """Return maxima [n], sums [64, n] not yet added up, and this warpgroup's tiles of O^T [64, n]."""
        lowest = plgpu.layout_cast(jnp.full((self.n,), LOWEST, jnp.float32), L.WGMMA.reduce(0))
        return lowest, *(plgpu.layout_cast(jnp.zeros((TILE, self.n), jnp.float32), L.WGMMA) for _ in range(5))

    def page(self, wg, turn, j, length, slot, largest, sums, *totals) -> tuple:
        """Take one page: scores, weights, values."""
        stages, n = self.config.stages(self.n), self.n
        slots = [after(slot, tile, stages) for tile in range(KEY_TILES)]
        own = [after(slot, wg * OWN_TILES + tile, stages) for tile in range(OWN_TILES)]
        others = [after(slot, (1 - wg) * OWN_TILES + tile, stages) for tile in range(OWN_TILES)]
        scores = self.score(slots, turn)
        for other in (*others, slots[-1]):
            plgpu.barrier_arrive(self.empty.at[other])
        token = plgpu.broadcasted_iota(jnp.int32, (PAGE, n), 0, layout=L.WGMMA) + j * PAGE
        row = plgpu.broadcasted_iota(jnp.int32, (PAGE, n), 1, layout=L.WGMMA)
        seen = length - self.task.num_queries + 1
        query = sum((row >= i * self.task.num_heads).astype(jnp.int32) for i in range(1, self.task.num_queries))
        scores = jnp.where(token < seen + query, scores, -jnp.inf)
        self.clear_tail(own, length - j * PAGE)
        new = jnp.maximum(largest, scores.max(axis=0) * (self.task.scale * LOG2E))
        faded = jnp.exp2(largest - new)
        weights = jnp.exp2(scores * (self.task.scale * LOG2E) - lax.broadcast_in_dim(new, (PAGE, n), [1]))
        wide = lax.broadcast_in_dim(faded, (PAGE, n), [1])
        sums = sums * wide + weights
        self.weights.transpose((1, 0))[...] = plgpu.layout_cast(weights.astype(jnp.bfloat16), L.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        totals = self.weigh(own, [total * wide for total in totals])
        for slot_ in own:
            plgpu.barrier_arrive(self.empty.at[slot_])
        return after(slots[-1], 1, stages), new, sums, *totals

    def score(self, slots, turn) -> Array:
        """Return S^T [64, n] of a page."""
        queries = [self.q.at[turn, :, pl.ds(tile * TILE, TILE)].transpose((1, 0)) for tile in range(KEY_TILES)]
        if self.config.interpreted:
            total = jnp.zeros((PAGE, self.n), jnp.float32)
            for slot, query in zip(slots, queries, strict=True):
                plgpu.barrier_wait(self.full.at[slot])
                total += jnp.dot(self.ring[slot], query[...], preferred_element_type=jnp.float32)
            return total

        def run(total):
            for slot, query in zip(slots, queries, strict=True):
                plgpu.barrier_wait(self.full.at[slot])
                plgpu.wgmma(total, self.ring.at[slot], query)
            return total[...]

        return pl.run_scoped(run, plgpu.ACC((PAGE, self.n), jnp.float32))

    def weigh(self, slots, totals) -> tuple:
        """Return the tiles of O^T [64, n] with the values of this page added."""
        weights = self.weights.transpose((1, 0))
        if self.config.interpreted:
            return tuple(
                total + jnp.dot(self.ring[slot].T, weights[...], preferred_element_type=jnp.float32)
                for slot, total in zip(slots, totals, strict=True)
            )

        def run(totals):
            for slot, total in zip(slots, totals, strict=True):
                plgpu.wgmma(total, self.ring.at[slot].transpose((1, 0)), weights)

        return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(total) for total in totals)))

    def clear_tail(self, slots, valid) -> None:
        """Put zeros behind the first `valid` tokens of these tiles, when both warpgroups have read them as keys."""

        @pl.when(valid < PAGE)
        def _():
            plgpu.barrier_arrive(self.tail)
            plgpu.barrier_wait(self.tail)
            token = plgpu.broadcasted_iota(jnp.int32, (PAGE, TILE), 0, layout=L.WGMMA)
            for slot in slots:
                tile = plgpu.load(self.ring.at[slot], layout=L.WGMMA)
                self.ring[slot] = jnp.where(token < valid, tile, jnp.bfloat16(0))

    def store(self, wg, number, sequence, split, outputs, largest, sums, *totals) -> None:
        """Store a fragment's result, normalised by itself: in BF16 if it is a sequence's only one."""
        out, lse, partial_out, partial_lse = outputs
        sums = sums.sum(axis=0)
        empty = sums == 0
        inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, sums))
        logarithm = jnp.where(empty, -jnp.inf, (largest + jnp.log2(jnp.where(empty, 1.0, sums))) * (1 / LOG2E))

        def to(values, logarithms, index):
            for tile, total in enumerate(totals):
                columns = pl.ds((wg * OWN_TILES + tile) * TILE, TILE)
                result = (total * lax.broadcast_in_dim(inverse, total.shape, [1])).astype(values.dtype)
                target = values.at[index, :, columns].transpose((1, 0))
                target[...] = plgpu.layout_cast(result, L.WGMMA_TRANSPOSED)

            @pl.when(wg == 0)
            def _():
                logarithms[index, :] = logarithm

        pl.when(split == 0)(lambda: to(out, lse, sequence))
        pl.when(split != 0)(lambda: to(partial_out, partial_lse, number))
