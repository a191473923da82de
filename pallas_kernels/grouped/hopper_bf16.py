"""Grouped BF16 products on Hopper: the visits of `hopper.py`, without scales and promotion.

Tensor cores add BF16 products in FP32, so a sum stays in their accumulator from the first step to the last: a tile of
128 x 256, 64 x 256 per warpgroup, 128 registers a thread. The next product is started before the last one's slot is
given back, so the tensor cores always have one queued.

wgmma takes BF16 operands with either dim contiguous, so the input gradient multiplies with the weights as the forward
pass stores them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.grouped.hopper_visits import schedule_groups, visit_tiles
from pallas_kernels.hopper.ring import SWIZZLE_ROWS, WARPGROUPS, Ring, barriers, by_role, launch, over_steps, tiled
from pallas_kernels.hopper.store import padded_columns, staging, store_rows, store_sums
from pallas_kernels.hopper.wgmma import ROWS

STEP = 64  # of k: one swizzled line of BF16
ALIGNMENT = 8  # BF16 numbers in the 16 bytes that the copy engine wants of a row


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut; see `pallas_kernels.hopper.main_loop.TuningConfig`."""

    tile_n: int = 256
    stages: int = 4
    out_slots: int = 2
    grid_minor: int = 0
    grid_width: int = 8
    interpreted: bool = False

    @property
    def tile_m(self) -> int:
        """Rows of an output tile."""
        return WARPGROUPS * ROWS


GROUPED_MATMUL_BF16 = TuningConfig()


def grouped_matmul_bf16(
    a: Array, b: Array, group_sizes: Array, *, transpose_b=False, out_dtype=jnp.bfloat16, config=GROUPED_MATMUL_BF16
) -> Array:
    """Return a_g b_g^T [rows, n] for BF16 `a` [rows, k] and `b` [G, n, k], or [G, k, n] with `transpose_b`.

    Rows of no group are zero.
    """
    num_rows, num_columns = a.shape[0], b.shape[2 if transpose_b else 1]
    a, b = whole_lines(a), whole_lines(b)
    (rows, k), num_groups = a.shape, b.shape[0]
    n = b.shape[2 if transpose_b else 1]
    num_steps, padded, tiles_n = pl.cdiv(k, STEP), padded_columns(n, out_dtype), pl.cdiv(n, config.tile_n)
    tables, schedule = schedule_groups(group_sizes, rows, config.tile_m)

    def kernel(a_ref, b_ref, *refs):
        tables, (out, a_slots, b_slots, out_slots, full, empty) = refs[: len(refs) - 6], refs[-6:]
        ring = Ring((a_slots, b_slots), full, empty)
        num_visits, find = schedule(*tables)
        over_visits = functools.partial(visit_tiles, config, num_visits, tiles_n, num_groups, find)

        def copy(visit, column, _):
            _, row, group, *_ = visit
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def steps(first, count, _):
                for slot in range(count):
                    ks = pl.ds((first + slot) * STEP, STEP)
                    ring.fill(
                        slot,
                        [
                            a_ref.at[rows, ks],
                            b_ref.at[group, ks, columns] if transpose_b else b_ref.at[group, columns, ks],
                        ],
                    )

            @pl.when(group < num_groups)
            def _():
                over_steps(num_steps, config.stages, steps)

        def multiply(wg):
            rows = pl.ds(wg * ROWS, ROWS)

            def run(total):
                def steps(first, count, _):
                    for slot in range(count):
                        plgpu.barrier_wait(full.at[slot])
                        right = b_slots.at[slot]
                        plgpu.wgmma(total, a_slots.at[slot, rows], right if transpose_b else right.transpose((1, 0)))
                        plgpu.wgmma_wait(1)
                        before = (slot - 1) % config.stages

                        @pl.when(first + slot > 0)
                        def _(before=before):
                            plgpu.barrier_arrive(empty.at[before])

                over_steps(num_steps, config.stages, steps)
                result = total[...]
                plgpu.barrier_arrive(empty.at[(num_steps - 1) % config.stages])
                return result

            return pl.run_scoped(run, plgpu.ACC((ROWS, config.tile_n), jnp.float32))

        def compute(wg, visit, column, _):
            _, row, group, start, end = visit

            def send(ref, _, j):
                store_rows(ref, out, row + wg * ROWS, start, end, pl.ds(column + j, ref.shape[1]))

            def store(total):
                store_sums({(0, 0): total}, out_slots.at[wg], padded - column, send)

            @pl.when(group < num_groups)
            def _():
                store(multiply(wg))

            @pl.when(group == num_groups)
            def _():
                store(plgpu.layout_cast(jnp.zeros((ROWS, config.tile_n), jnp.float32), plgpu.Layout.WGMMA))

        by_role(ring, lambda: over_visits(copy), lambda wg: over_visits(functools.partial(compute, wg)))

    b_tile = (STEP, config.tile_n) if transpose_b else (config.tile_n, STEP)
    scratch = [
        tiled((config.stages, config.tile_m, STEP), jnp.bfloat16),
        tiled((config.stages, *b_tile), jnp.bfloat16),
        staging(config.out_slots, out_dtype),
        *barriers(2, config.stages),
    ]
    run = launch(kernel, jax.ShapeDtypeStruct((rows, padded), out_dtype), num_multiprocessors(), scratch)
    return run(a, b, *tables)[:num_rows, :num_columns]


def whole_lines(x: Array) -> Array:
    """Pad the last two dims with zeros to what the copy engine takes.

    It takes whole swizzles of rows, and rows of whole lines or of less than one.
    """
    rows, columns = x.shape[-2:]
    missing = -rows % SWIZZLE_ROWS, -columns % (STEP if columns > STEP else ALIGNMENT)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing[0]), (0, missing[1])]) if any(missing) else x
