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
from pallas_kernels.mla_decode.hopper_fragments import over_fragments
from pallas_kernels.mla_decode.hopper_swapped import KEY_TILES, TILE, VALUE_TILES, Half, Shared, after
from pallas_kernels.mla_decode.schedule import PAGE, Schedule

# per thread; with fewer, either spills
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232
MOST_ROWS = 32


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
