"""MLA decode on Hopper for more than 32 rows of queries: FlashMLA's "seesaw" over 64 rows.

O [64, 512] in FP32 fills half of the register file, so a multiprocessor holds one: warpgroup 0 its left half,
warpgroup 1 the right. A turn takes two pages. Warpgroup 0 computes the scores of the first, warpgroup 1 of the second,
and both multiply both pages' weights with their half of the values:

    warpgroup 0                                      warpgroup 1
    S0 = Q K0^T, maxima m, weights P0                S1 = Q K1^T, then with m of warpgroup 0: maxima, weights P1
    O_L = a0 O_L + P0 V0_L                           O_R = a0 a1 O_R + P1 V1_R
    O_L = a1 O_L + P1 V1_L                           O_R += a1 P0 V0_R

a0 and a1 are the factors by which the first and the second page raise the maxima. The own weights are multiplied from
registers, the other's from shared memory.

    shared memory  queries 74 KB, two pages of 74 KB, P0 8 KB. P1 lies over the rotary queries, which are in registers.
    refill         a page comes in three pieces, dims 0 to 255, 256 to 511 and the rotary dims, each with barriers of
                   its own: the first half of page 0 and the second of page 1 are free in the middle of a turn.
    masks, NaN     only in the turn that reaches the end of a sequence (see `hopper_few.py`).
    slots          are indexed through a number that is 0 and changes for all that the compiler knows: with constants it
                   keeps 64 descriptors in registers, and spills.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import COMPUTE_REGISTERS, MEMORY_REGISTERS, WARPGROUPS, launch, tiled
from pallas_kernels.mla_decode.hopper_fragments import over_fragments
from pallas_kernels.mla_decode.hopper_seesaw import HALF, ROTARY, ROWS, Half, Shared
from pallas_kernels.mla_decode.schedule import PAGE, Schedule


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        overhead: what a fragment costs beside its pages, in units of two.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    overhead: int = 1
    interpreted: bool = False

    unit = 2

    def padded_rows(self, num_rows: int) -> int:
        """Rows that the kernel computes."""
        return self.num_blocks(num_rows) * ROWS

    def num_blocks(self, num_rows: int) -> int:
        """Thread blocks that read the same pages."""
        return pl.cdiv(num_rows, ROWS)


def attend(task: Any, q: Array, cache: Array, tables: Array, schedule: Schedule, config: TuningConfig) -> list[Array]:
    """Return `Task.results`: those of whole sequences, and of fragments."""
    (batch, num_rows, _), num_parts = q.shape, len(schedule.parts)
    num_blocks = num_rows // ROWS

    def kernel(q_ref, cache_ref, tables_ref, parts_ref, fragments_ref, *refs):
        outputs, shared = refs[:4], Shared(*refs[4:])
        sm, wg = lax.axis_index("sm"), lax.axis_index("wg")
        part, block = lax.div(sm, jnp.int32(num_blocks)), lax.rem(sm, jnp.int32(num_blocks))
        rows = pl.ds(block * ROWS, ROWS)

        def over_own(body):
            over_fragments(parts_ref, fragments_ref, part, lambda fragment, _: body(fragment), None)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            over_own(lambda fragment: copy(fragment, q_ref.at[:, rows], cache_ref, tables_ref, shared))
            shared.drain()

        for side in range(WARPGROUPS):

            @pl.when(wg == side)
            def _(side=side):
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                shared.begin_free(side)
                half = Half(side, config.interpreted, task, shared, block * ROWS)
                over_own(lambda fragment: half.fragment(fragment, outputs, rows))

    scratch = [
        tiled((1, ROWS, 2 * HALF), jnp.bfloat16),
        tiled((ROWS, ROTARY), jnp.bfloat16),
        *(tiled((2, PAGE, columns), jnp.bfloat16) for columns in (HALF, HALF, ROTARY)),
        tiled((ROWS, PAGE), jnp.bfloat16),
        plgpu.SMEM((5, ROWS), jnp.float32),
        *(plgpu.Barrier(num_barriers=6) for _ in range(2)),
        *(plgpu.Barrier() for _ in range(2)),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        *(plgpu.Barrier() for _ in range(5)),
    ]
    out_type = task.results(batch, len(schedule.fragments), num_rows, 2 * HALF)
    run = launch(kernel, out_type, num_parts * num_blocks, scratch, reduction_scratch_bytes=0)
    return run(q, cache, tables, schedule.parts, schedule.fragments)


def copy(fragment: Any, q_ref: Any, cache_ref: Any, tables_ref: Any, shared: Shared) -> None:
    """Copy a fragment's queries and pages, each piece as soon as it is free, in the order in which that is."""
    last = jnp.maximum(lax.div(fragment.length - 1, jnp.int32(PAGE)), 0)
    pieces = (  # barrier, page of the turn, where to, dims
        (4, 0, shared.rotary, 2 * HALF, ROTARY),
        (5, 1, shared.rotary, 2 * HALF, ROTARY),
        (0, 0, shared.left, 0, HALF),
        (3, 1, shared.right, HALF, HALF),
        (2, 0, shared.right, HALF, HALF),
        (1, 1, shared.left, 0, HALF),
    )

    def numbers(turn):
        return tuple(tables_ref[fragment.sequence, jnp.minimum(turn + i, last)] for i in range(2))

    def turn(i, pages):
        following = numbers(fragment.start + 2 * i + 2)  # read ahead of the waits
        for barrier, page, target, first, count in pieces:
            plgpu.barrier_wait(shared.empty.at[barrier])
            source = cache_ref.at[pages[page], :, pl.ds(first, count)]
            plgpu.copy_gmem_to_smem(source, target.at[page], shared.full.at[barrier])

        @pl.when(i == 0)
        def _():
            plgpu.barrier_wait(shared.rotary_queries_empty)
            source = q_ref.at[fragment.sequence, :, pl.ds(2 * HALF, ROTARY)]
            plgpu.copy_gmem_to_smem(source, shared.rotary_queries, shared.rotary_queries_full)

        return following

    @pl.when(fragment.end > fragment.start)
    def _():
        plgpu.barrier_wait(shared.queries_empty)
        source = q_ref.at[fragment.sequence, :, pl.ds(0, 2 * HALF)]
        plgpu.copy_gmem_to_smem(source, shared.queries.at[0], shared.queries_full)
        lax.fori_loop(0, lax.div(fragment.end - fragment.start, jnp.int32(2)), turn, numbers(fragment.start))
