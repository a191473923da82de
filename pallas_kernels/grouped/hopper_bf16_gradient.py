"""Weight gradients in BF16 on Hopper: C[g] += A_g^T B_g, rows of a group anywhere.

Results are added to C on the way out, or stored, as in FP8.

wgmma takes BF16 with either dim contiguous, so nothing is transposed: A [K, m] and B [K, n] are read as the layers left
them. Rows come in steps of 64 on a fixed grid, and groups end anywhere, so a group's first and last step may hold rows
of its neighbours, or of no group, where NaN may stand. These rows are made zero in shared memory, in both operands,
before they are multiplied:

    step         0          1          2            rows 50 to 150 of group g: 14 rows of step 0, all of step 1, 22 of
                                                    step 2
    kept         50 .. 63   64 .. 127  128 .. 149

Each warpgroup clears its half of A, which it alone reads, and half of B, which both read; so the two meet at a barrier,
in those steps only.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped.hopper_bf16 import TuningConfig, whole_lines
from pallas_kernels.hopper.groups import clear_empty_groups, launch_onto, over_group_tiles, send_out
from pallas_kernels.hopper.ring import WARPGROUPS, Ring, barriers, by_role, tiled
from pallas_kernels.hopper.store import padded_columns, staging, store_sums
from pallas_kernels.hopper.wgmma import ROWS

STEP = 64  # rows
GROUPED_MATMUL_ACCUMULATE_BF16 = TuningConfig()


def grouped_matmul_accumulate_bf16(
    a: Array, b: Array, group_sizes: Array, c: Array | None = None, *, config=GROUPED_MATMUL_ACCUMULATE_BF16
) -> Array:
    """Return c[g] + A_g^T B_g for BF16 `a` [K, m], `b` [K, n] and FP32 `c` [G, m, n], A_g^T B_g without a `c`.

    Rows of no group never leak, NaN included.
    """
    num_groups, m, n = group_sizes.shape[0], a.shape[1], b.shape[1]
    padded = padded_columns(n, jnp.float32)
    tiles = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, b_ref, offsets, out, a_slots, b_slots, out_slots, full, empty, cleared):
        ring = Ring((a_slots, b_slots), full, empty)

        def steps_of(group):
            start, end = offsets[group], offsets[group + 1]
            first = lax.div(start, jnp.int32(STEP))
            return first, jnp.where(start < end, lax.div(end - 1, jnp.int32(STEP)) + 1 - first, 0)

        over_tiles = functools.partial(over_group_tiles, config, num_groups, tiles, steps_of)

        def copy(row, column, _, first, num_steps, slot):
            a_columns, b_columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def step(i, slot):
                rows = pl.ds((first + i) * STEP, STEP)
                return ring.fill(slot, [a_ref.at[rows, a_columns], b_ref.at[rows, b_columns]])

            lax.fori_loop(0, num_steps, step, slot)

        def multiply(wg, group, first, num_steps, slot):
            mine = pl.ds(wg * ROWS, ROWS)
            half = config.tile_n // WARPGROUPS

            def run(total):
                def step(i, slots):
                    slot, before = slots
                    plgpu.barrier_wait(full.at[slot])
                    row = (first + i) * STEP
                    start, end = offsets[group] - row, offsets[group + 1] - row

                    @pl.when((start > 0) | (end < STEP))
                    def _():
                        _clear(a_slots.at[slot, :, mine], start, end)
                        _clear(b_slots.at[slot, :, pl.ds(wg * half, half)], start, end)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    plgpu.wgmma(total, a_slots.at[slot, :, mine].transpose((1, 0)), b_slots.at[slot])
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[before])

                    return ring.after(slot), slot

                _, last = lax.fori_loop(0, num_steps, step, (slot, slot))
                result = total[...]
                plgpu.barrier_arrive(empty.at[last])
                return result

            return pl.run_scoped(run, plgpu.ACC((ROWS, config.tile_n), jnp.float32))

        def compute(wg, row, column, group, first, num_steps, slot):
            def send(ref, _, j):
                rows, columns = pl.ds(row + wg * ROWS, ROWS), pl.ds(column + j, ref.shape[1])
                send_out(config, c, ref, out.at[group, rows, columns])

            store_sums({(0, 0): multiply(wg, group, first, num_steps, slot)}, out_slots.at[wg], padded - column, send)

        def over_results(wg):
            over_tiles(functools.partial(compute, wg))
            if c is None:
                clear_empty_groups(lambda group: offsets[group + 1] - offsets[group], wg, out_slots.at[wg, 0], out)

        by_role(ring, lambda: over_tiles(copy), over_results)

    scratch = [
        tiled((config.stages, STEP, config.tile_m), jnp.bfloat16),
        tiled((config.stages, STEP, config.tile_n), jnp.bfloat16),
        staging(config.out_slots, jnp.float32),
        *barriers(2, config.stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes, dtype=jnp.int32)])
    operands = whole_lines(a), whole_lines(b), offsets
    return launch_onto(c, (num_groups, m, n), kernel, num_groups * tiles[0] * tiles[1], scratch, operands)


def _clear(ref, start: Array, end: Array) -> None:
    """Make the rows of `ref` [64, columns] that are not from `start` to `end` zero."""
    value = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    row = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA)
    ref[...] = jnp.where((row >= start) & (row < end), value, jnp.zeros_like(value))
