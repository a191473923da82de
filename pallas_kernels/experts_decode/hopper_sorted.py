"""The second product of experts on Hopper where rows are sorted: each visit has rows of its own.

A unit of work is a visit and some columns of D. With one prompt of 512 tokens in configs/v3_5b.py there are some 73
visits of 8 units, 4.4 for each multiprocessor: taken one after the other they are five turns, of which the last has
work for a few. So the steps of all units are cut into equal shares, as those of the first product are.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import GROUP
from pallas_kernels.experts_decode.hopper_act import turned
from pallas_kernels.experts_decode.hopper_shares import Shares
from pallas_kernels.experts_decode.hopper_slots import BLOCKS, ROWS, Shape, TuningConfig
from pallas_kernels.experts_decode.hopper_stream import Source, Stream, launch
from pallas_kernels.experts_decode.plan import Plan
from pallas_kernels.hopper.marks import MARKS
from pallas_kernels.quantized import Quantized


def down_sorted(
    config: TuningConfig, plan: Plan, act: tuple[Array, ...], down: Array | Quantized, base: Array
) -> Array:
    """Return BF16 [visits * N, D] of sorted visits; rows that no assignment has are not written."""
    in_fp8, n, width = isinstance(down, Quantized), plan.rows, config.down_width
    values, *weight_scales = jax.tree.leaves(down)
    k, columns_d = act[0].shape[1], values.shape[1 if in_fp8 else 2]
    shape, tiles = Shape(in_fp8, n, width, k, config.turned), columns_d // (BLOCKS * width)
    scratch, many = shape.scratch(config.ring_bytes), 1 + in_fp8

    def kernel(base_ref, table_ref, *refs):
        row_refs, (weight, *scales), refs = refs[:many], refs[many : 2 * many], refs[2 * many :]
        marks_ref, out, sums_ref, scratch = refs[0], refs[1], refs[2], refs[3:]
        stream = Stream.of(shape, config.interpreted, scratch)
        num_visits, find = plan.schedule(table_ref)
        first = base_ref[0]
        shares = Shares(num_visits * tiles, shape.steps, sums_ref, marks_ref, config.interpreted)

        def place(unit):
            tile = lax.rem(unit, jnp.int32(tiles))
            return find(lax.div(unit, jnp.int32(tiles))), tile * BLOCKS * width, shape.turn(tile, tiles)

        def copy(unit, first_step, last_step, slot):
            visit, column, turn = place(unit)
            columns = [column + block * width for block in range(BLOCKS)]
            source = Source(weight.at[first + visit.expert], columns, row_refs[0], row_refs[-1], visit.row, turn)
            return stream.fill(slot, source, first_step, last_step)

        def multiply(unit, first_step, last_step, slot):
            visit, column, turn = place(unit)

            def finish():
                for i, total in enumerate(shares.collect(unit, sums)):
                    target = out.at[pl.ds(visit.row, n), pl.ds(column + i * ROWS, ROWS)]
                    target.transpose((1, 0))[...] = turned(total, jnp.bfloat16)

            slot, sums = stream.multiply(
                slot,
                jnp.int32(first_step),
                jnp.int32(last_step),
                lambda _: scale_of_columns(stream, scales[0].at[first + visit.expert], column, turn),
            )
            pl.when(first_step > 0)(functools.partial(shares.leave, sums))
            pl.when(first_step == 0)(finish)
            return slot

        stream.by_role(lambda: shares.over(copy, jnp.int32(0)), lambda: shares.over(multiply, jnp.int32(0)))

    out_type = [jax.ShapeDtypeStruct((plan.most_visits * n, columns_d), jnp.bfloat16), shape.shares()]
    run = launch(kernel, "experts_decode_down", out_type, scratch)
    marks = jax.new_ref(jnp.zeros((MARKS,), jnp.int32))
    return run(base, *plan.tables, *act, values, *weight_scales, marks)[0]


def scale_of_columns(stream: Stream, of_expert: Array, column: Array, turn: Array | int) -> Callable:
    """Return a function from a block, of the columns from `column` on, and a step to the scale of their weights."""

    def scale(block, step):
        return of_expert[lax.div(column + block * stream.shape.width, jnp.int32(GROUP)), stream.place(step, turn)]

    return scale
