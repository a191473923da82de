"""Grouped FP8 products on Hopper: rows of many experts, one matrix each.

The main loop and its reasons are in `pallas_kernels/hopper/main_loop.py`.

Both operations are a list of *visits*: some rows of one tile that belong to one expert. A tile of A is multiplied
whole, whoever its rows belong to, and only the visit's rows are stored, so two visits of one tile never write the same
row and nothing of a row leaks into another. Where groups are multiples of the tile, no work is wasted; else each group
adds at most one more visit.

    grouped   visits come from `visits.make_visits`, a small XLA program on the group sizes. Rows of no group are
              visited too, without products: their zeros are stored, whatever A holds there.
    masked    expert e has the tiles 0 to ceil(valid / tile) of its own room; each block finds its visit by counting
              through the experts, because decoding has no time for a second kernel. Many rows take the tiles of
              `grouped`; a few, which wait for weights only, small ones, so that the last round of tiles wastes little.

A warpgroup none of whose rows are kept lets the steps pass without multiplying: 192 rows are a tile and a half.

Rows are stored by the copy engine, which takes rectangles of fixed size: 64 rows at once, or powers of two that add up
to fewer.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.grouped.hopper_visits import schedule_groups, visit_tiles
from pallas_kernels.hopper.main_loop import TuningConfig, multiply_blocks, skip, slots, zero_sums
from pallas_kernels.hopper.ring import Ring, barriers, by_role, launch, over_steps
from pallas_kernels.hopper.store import padded_columns, staging, store_rows, store_sums
from pallas_kernels.quantized import Quantized

# eight steps unrolled are 1 to 2% faster, but for some sizes they spill, and cost 20%
GROUPED_MATMUL = TuningConfig(unroll=4)
EXPERTS_AT_ONCE = 16  # whose numbers of rows are read together
# 128 x 256; more steps unrolled, or pieces sent together, spill
MANY_ROWS = TuningConfig(unroll=4, out_slots=1, batch=1, grid_width=4)
FEW_ROWS = TuningConfig(columns=64, products=1, split="n", stages=8, unroll=4, out_slots=1, batch=1)  # 64 x 128


def grouped_matmul(
    a: Quantized, b: Quantized, group_sizes: Array, *, out_dtype=jnp.bfloat16, config=GROUPED_MATMUL
) -> Array:
    """Return a_g b_g^T [rows, n] for tiles `a` [rows, k] and blocks `b` [G, n, k]; rows of no group are zero."""
    visits, schedule = schedule_groups(group_sizes, a.shape[0], config.tile_m)
    return _run(config, a.values[None], a.scales[None], b, visits, schedule, out_dtype)[0]


def masked_matmul(
    a: Quantized,
    b: Quantized,
    valid_rows: Array,
    *,
    expected_rows: int | None = None,
    out_dtype=jnp.bfloat16,
    config=None,
) -> Array:
    """Return a_e b_e^T [E, r, n] for tiles `a` [E, r, k] and blocks `b` [E, n, k].

    Rows from `valid_rows[e]` on are not written.
    """
    num_experts = b.shape[0]
    config = config or (MANY_ROWS if (expected_rows or a.shape[1]) > FEW_ROWS.tile_m else FEW_ROWS)

    def schedule(valid_ref):
        def num_tiles(expert):
            return lax.div(valid_ref[expert] + (config.tile_m - 1), jnp.int32(config.tile_m))

        def find(visit):
            def look(first, count, found):
                before, chosen, tile = found
                for i, tiles in enumerate([num_tiles(first + i) for i in range(count)]):
                    here = (before <= visit) & (visit < before + tiles)
                    chosen, tile = jnp.where(here, first + i, chosen), jnp.where(here, visit - before, tile)
                    before += tiles
                return before, chosen, tile

            _, expert, tile = over_steps(num_experts, EXPERTS_AT_ONCE, look, (jnp.int32(0), jnp.int32(0), jnp.int32(0)))
            return expert, tile * config.tile_m, expert, jnp.int32(0), valid_ref[expert]

        def add(first, count, total):
            return total + sum(num_tiles(first + i) for i in range(count))

        return over_steps(num_experts, EXPERTS_AT_ONCE, add, jnp.int32(0)), find

    return _run(config, a.values, a.scales, b, (valid_rows,), schedule, out_dtype)


def _run(
    config: TuningConfig,
    values: Array,
    scales: Array,
    b: Quantized,
    tables: tuple,
    schedule: Callable,
    out_dtype,
) -> Array:
    """Multiply and store every visit.

    Args:
        config: how a tile is cut.
        values: of A, [L, rows, k].
        scales: of A, [L, k / 128, pad4(rows)].
        b: block [G, n, k]. Visits of group G store zeros.
        tables: what `schedule` reads.
        schedule: refs of the tables -> the number of visits, and a function from the number of a visit to the `Visit`.
        out_dtype: BF16 or FP32.
    """
    (lead, rows, k), (num_groups, n, _) = values.shape, b.shape
    num_steps, padded, tiles_n = k // GROUP, padded_columns(n, out_dtype), pl.cdiv(n, config.tile_n)

    def kernel(a_ref, a_scales, b_ref, b_scales, *refs):
        tables, (out, *operands, out_slots, full, empty) = refs[: len(refs) - 7], refs[-7:]
        ring = Ring(operands, full, empty)
        num_visits, find = schedule(*tables)
        over_visits = functools.partial(visit_tiles, config, num_visits, tiles_n, num_groups, find)

        def first_slot(used):
            return lax.rem(used * num_steps, jnp.int32(config.stages))

        def copy(visit, column, used):
            first, row, group, *_ = visit
            rows, columns = pl.ds(row, config.tile_m), pl.ds(column, config.tile_n)

            def steps(start, count, slot):
                for i in range(count):
                    ks = pl.ds((start + i) * GROUP, GROUP)
                    slot = ring.fill(
                        slot,
                        [a_ref.at[first, rows, ks], b_ref.at[group, columns, ks], a_scales.at[first, start + i, rows]],
                    )
                return slot

            @pl.when(group < num_groups)
            def _():
                over_steps(num_steps, config.unroll, steps, first_slot(used))

        def compute(wg, visit, column, used):
            first, row, group, start, end = visit
            down, right = config.origin(wg)

            def send(ref, i, j):
                store_rows(ref, out.at[first], row + down + i, start, end, pl.ds(column + right + j, ref.shape[1]))

            store = functools.partial(
                store_sums,
                out_slots=out_slots.at[wg],
                columns_left=padded - column - right,
                send=send,
                batch=config.batch,
            )
            mine = (row + down < end) & (row + down + config.height > start)

            @pl.when((group < num_groups) & ~mine)
            def _():
                skip(num_steps, ring, first_slot(used))

            @pl.when((group < num_groups) & mine)
            def _():
                store(multiply_blocks(config, num_steps, ring, wg, first_slot(used), b_scales.at[group], column))

            @pl.when(group == num_groups)
            def _():
                store(zero_sums(config))

        by_role(ring, lambda: over_visits(copy), lambda wg: over_visits(functools.partial(compute, wg)))

    scratch = [*slots(config), staging(config.out_slots, out_dtype), *barriers(3, config.stages)]
    run = launch(kernel, jax.ShapeDtypeStruct((lead, rows, padded), out_dtype), num_multiprocessors(), scratch)
    return run(values, scales, b.values, b.scales, *tables)[..., :n]
