"""The routed experts of a decoding step on Hopper: two kernels that read the weights of touched experts once.

    gate_up    a unit of work is a visit (an expert and N rows) and some columns of F, gate and up side by side in a
               slot: act = silu(gate) * up * gate weight, in BF16, or in E4M3 with a scale per row and 128 columns.
               Dense visits: steps along k are cut into equal shares (`hopper_shares.py`)
    down       a unit is some columns of D and steps along k of visits, over which it sums. Dense visits: the steps of
               all visits in a few equal groups, whose FP32 partial sums [groups, N, D] are added in the fusion that
               follows. Sorted visits: each has its own rows, and K of them are added for each token

Floor. A touched expert is 3 D F weights, 12.6 MB in configs/v3_5b.py in BF16 and 88 MB in V3; rows, activations and
partial sums are 1 to 3% of it. One H200 reads 4.3 TB/s, so that 64 touched experts take 187 us, and the 8 of a single
token 23 us, half of these in FP8.

Prediction, before the first run. A kernel costs 3 us beside its bytes: the launch, the first bytes, the last store.
0.85 of the read rate at 32 and 128 tokens, and 30 us for one token in BF16, 18 in FP8. 208 KB of each multiprocessor
are under way, six times what latency needs. experiments/log.md has what was measured. To launch `down` while `gate_up`
ends, with its first weights asked for (programmatic dependent launch), changed nothing that could be seen.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.experts_decode.hopper_shares import Shares
from pallas_kernels.experts_decode.hopper_slots import BLOCKS, ROWS, Shape, TuningConfig
from pallas_kernels.experts_decode.hopper_sort import sort_rows
from pallas_kernels.experts_decode.hopper_stream import L, Source, Stream, launch, over_units
from pallas_kernels.experts_decode.plan import (
    MOST_DENSE,
    Dense,
    Plan,
    dense_plan,
    make_dense,
    make_sorted,
    only_here,
    rows_of_visit,
)
from pallas_kernels.hopper.marks import MARKS
from pallas_kernels.quantized import E4M3, Quantized, largest_magnitude, scale_of

MOST_FEW = 32  # rows of a visit with narrow blocks; beside wide ones fewer bytes of rows are copied
CONFIGS = {  # in FP8, few rows
    (False, True): TuningConfig(),
    (False, False): TuningConfig(width=128, down_width=128),
    (True, True): TuningConfig(width=GROUP),
    (True, False): TuningConfig(width=GROUP, down_width=128),
}
MOST_SORTED_BF16, MOST_SORTED_FP8 = 88, 48  # rows of a visit for which all sums have registers
MOST_GROUPS = 16  # of the steps of all visits


def experts_decode(
    h: Array | Quantized,
    experts: Array,
    gates: Array,
    gate_up: Array | Quantized,
    down: Array | Quantized,
    base: Array,
    dense: Dense | None = None,
    *,
    num_experts: int,
    parts: bool = False,
    everybody: int = 0,
    config: TuningConfig | None = None,
) -> Array:
    """Return y [T, D] in BF16, or FP32 `parts` of it; the experts' weights begin at `base` of the first dim.

    The last `everybody` of the experts are those of every token. `dense` is what `plan.make_dense` makes of experts and
    gates, where it is known.
    """
    in_fp8 = isinstance(gate_up, Quantized)
    num_tokens, k = experts.shape
    most_sorted = MOST_SORTED_FP8 if in_fp8 else MOST_SORTED_BF16
    n = rows_of_visit(num_tokens, k - everybody, num_experts - everybody, most_sorted)
    config = config or CONFIGS[in_fp8, n <= MOST_FEW]
    experts, base = only_here(experts, num_experts), base.reshape(1)
    rows, tiles = tuple(jax.tree.leaves(h)), h.shape[1] // (BLOCKS * config.down_width)
    if num_tokens <= MOST_DENSE:
        plan = dense_plan(dense or make_dense(experts, gates, num_experts, n), num_experts, num_tokens * k)
        zeros = dense.zeros if dense else None
        act = gate_up_visits(config, plan, fill_up(rows, n), gate_up, base, zeros)
        groups = choose_groups(tiles)
        found = down_visits(config, plan, act, down, base, groups)[:, :num_tokens]
        return found if parts else found.sum(0).astype(jnp.bfloat16)
    plan, keys, first_E = make_sorted(experts, num_experts, n)
    rows, row_gates, slots_TK = sort_rows(rows, gates, keys, first_E, n, plan.most_visits * n)
    plan = dataclasses.replace(plan, gates=row_gates.reshape(-1, n))
    act = gate_up_visits(config, plan, rows, gate_up, base)
    y = down_visits(config, plan, act, down, base, plan.most_visits)
    of_choice = [jnp.take(y, slots_TK[:, i], axis=0, mode="fill", fill_value=0) for i in range(k)]
    total = sum((part.astype(jnp.float32) for part in of_choice), jnp.float32(0))
    return total[None] if parts else total.astype(jnp.bfloat16)


def fill_up(rows: tuple[Array, ...], n: int) -> tuple[Array, ...]:
    """Return rows [n, D] and, in FP8, scales [D / 128, n]."""
    missing = n - len(rows[0])
    padded = [jnp.pad(rows[0], ((0, missing), (0, 0)))] if missing else [rows[0]]
    return *padded, *(jnp.pad(x, ((0, 0), (0, n - x.shape[1])), constant_values=1) for x in rows[1:])


def choose_groups(tiles: int) -> int:
    """Return into how many groups the steps of all visits are cut: the least work of the busiest multiprocessor."""
    blocks = num_multiprocessors()
    return min(range(1, MOST_GROUPS + 1), key=lambda groups: (math.ceil(groups * tiles / blocks) / groups, groups))


def gate_up_visits(
    config: TuningConfig,
    plan: Plan,
    rows: tuple[Array, ...],
    gate_up: Array | Quantized,
    base: Array,
    zeros: Array | None = None,
) -> tuple[Array, ...]:
    """Return the activations [visits * N, F] with their gates, in FP8 also their scales [F / 128, visits * N]."""
    in_fp8, n, width = isinstance(gate_up, Quantized), plan.rows, config.width
    values, *weight_scales = jax.tree.leaves(gate_up)
    k, hidden = rows[0].shape[1], values.shape[1 if in_fp8 else 2] // 2
    shape, tiles = Shape(in_fp8, n, width, k, config.turned), hidden // width
    scratch, num_tables, many = shape.scratch(config.ring_bytes), len(plan.tables), 1 + in_fp8

    blocks = num_multiprocessors()
    zeros = jnp.zeros((MARKS,), jnp.int32) if zeros is None else zeros
    marks, num_marks = ((jax.new_ref(zeros),), 1) if plan.dense else ((), 0)

    def kernel(base_ref, gates_ref, *refs):
        tables, refs = refs[:num_tables], refs[num_tables:]
        row_refs, (weight, *scales), refs = refs[:many], refs[many : 2 * many], refs[2 * many :]
        (*marks_ref,), outputs, refs = refs[:num_marks], refs[num_marks : num_marks + many], refs[num_marks + many :]
        (*sums_ref,), scratch = refs[:num_marks], refs[num_marks:]
        stream = Stream.of(shape, config.interpreted, scratch)
        num_visits, find = plan.schedule(*tables)
        first, units = base_ref[0], num_visits * tiles
        shares = Shares(units, shape.steps, sums_ref[0], marks_ref[0], config.interpreted) if plan.dense else None

        def over(body):
            if shares:
                return shares.over(body, jnp.int32(0))
            return over_units(units, lambda unit, slot: body(unit, 0, shape.steps, slot), jnp.int32(0))

        def place(unit):
            visit = find(lax.div(unit, jnp.int32(tiles)))
            tile = lax.rem(unit, jnp.int32(tiles))
            return visit, tile * width, shape.turn(tile, tiles)

        def copy(unit, first_step, last_step, slot):
            visit, column, turn = place(unit)
            columns, row = (column, hidden + column), 0 if plan.dense else visit.row
            source = Source(weight.at[first + visit.expert], columns, row_refs[0], row_refs[-1], row, turn)
            return stream.fill(slot, source, first_step, last_step)

        def multiply(unit, first_step, last_step, slot):
            visit, column, turn = place(unit)

            def block_scale(_):
                of_expert = scales[0].at[first + visit.expert]

                def scale(block, step):
                    return of_expert[lax.div(block * hidden + column, jnp.int32(GROUP)), stream.place(step, turn)]

                return scale

            def finish():
                whole = shares.collect(unit, sums) if shares else sums
                weights = plgpu.load(gates_ref.at[visit.gates], layout=L.WGMMA.reduce(0), optimized=False)
                store_act(outputs, whole, weights, visit.row, column)

            slot, sums = stream.multiply(slot, jnp.int32(first_step), jnp.int32(last_step), block_scale)
            if shares:
                pl.when(first_step > 0)(functools.partial(shares.leave, sums))
                pl.when(first_step == 0)(finish)
            else:
                finish()
            return slot

        stream.by_role(lambda: over(copy), lambda: over(multiply))

    num_rows = plan.most_visits * n
    out_type = [jax.ShapeDtypeStruct((num_rows, hidden), E4M3 if in_fp8 else jnp.bfloat16)]
    if in_fp8:
        out_type.append(jax.ShapeDtypeStruct((hidden // GROUP, num_rows), jnp.float32))
    if plan.dense:
        out_type.append(jax.ShapeDtypeStruct((blocks, BLOCKS * shape.tiles, ROWS, n), jnp.float32))
    run = launch(kernel, "experts_decode_gate_up", out_type, scratch)
    return tuple(run(base, plan.gates, *plan.tables, *rows, values, *weight_scales, *marks))[:many]


def store_act(outputs: tuple, sums: list[Array], weights: Array, row: Array, column: Array) -> None:
    """Store silu(gate) * up * weight, transposed; `sums` are those of gate, then of up, 64 columns each."""
    half, n = len(sums) // 2, sums[0].shape[1]
    weights = lax.broadcast_in_dim(weights, sums[0].shape, [1])
    if len(outputs) == 2:  # rounded as in training
        sums = [total.astype(jnp.bfloat16).astype(jnp.float32) for total in sums]
    acts = [gate / (1 + jnp.exp(-gate)) * up for gate, up in zip(sums[:half], sums[half:], strict=True)]
    acts = [jnp.where(weights == 0, 0.0, act * weights) for act in acts]  # of rows without this expert, NaN or not
    rows, dtype = pl.ds(row, n), jnp.bfloat16
    if len(outputs) == 2:
        largest = [largest_magnitude(act, axis=0) for act in acts]
        scale = scale_of(jnp.maximum(*largest), "fp32")
        outputs[1][lax.div(column, jnp.int32(GROUP)), rows] = scale
        inverse, dtype = lax.broadcast_in_dim(1.0 / scale, sums[0].shape, [1]), E4M3
        acts = [act * inverse for act in acts]
    for i, act in enumerate(acts):
        target = outputs[0].at[rows, pl.ds(column + i * ROWS, ROWS)].transpose((1, 0))
        target[...] = turned(act, dtype)


def turned(x: Array, dtype: jnp.dtype) -> Array:
    """Return FP32 [64, N] in `dtype`, neighbours along the 64 in one register."""
    if dtype == E4M3:  # shuffles know 16 and 32 bits
        return plgpu.layout_cast(x, L.WGMMA_TRANSPOSED).astype(dtype)
    return plgpu.layout_cast(x.astype(dtype), L.WGMMA_TRANSPOSED)


def down_visits(
    config: TuningConfig, plan: Plan, act: tuple[Array, ...], down: Array | Quantized, base: Array, groups: int
) -> Array:
    """Return FP32 partial sums [groups, N, D] of dense visits, or BF16 [visits * N, D] of sorted ones."""
    in_fp8, n, width = isinstance(down, Quantized), plan.rows, config.down_width
    values, *weight_scales = jax.tree.leaves(down)
    k, columns_d = act[0].shape[1], values.shape[1 if in_fp8 else 2]
    shape, tiles = Shape(in_fp8, n, width, k, config.turned), columns_d // (BLOCKS * width)
    scratch, num_tables, many = shape.scratch(config.ring_bytes), len(plan.tables), 1 + in_fp8
    dtype = jnp.float32 if plan.dense else jnp.bfloat16

    def kernel(base_ref, *refs):
        tables, refs = refs[:num_tables], refs[num_tables:]
        row_refs, (weight, *scales), out = refs[:many], refs[many : 2 * many], refs[2 * many]
        stream = Stream.of(shape, config.interpreted, refs[2 * many + 1 :])
        num_visits, find = plan.schedule(*tables)
        first = base_ref[0]

        def place(unit):
            group, tile = lax.div(unit, jnp.int32(tiles)), lax.rem(unit, jnp.int32(tiles))
            start, end = group, group + 1  # a sorted visit is a group
            if plan.dense:
                start, end = (lax.div(i * num_visits * shape.steps, jnp.int32(groups)) for i in (start, end))
            else:
                start, end = start * shape.steps, end * shape.steps
            return group, tile, start, end

        def copy(unit, slot):
            _, tile, start, end = place(unit)
            columns = [(tile * BLOCKS + block) * width for block in range(BLOCKS)]

            def one(number, first_step, last_step, slot):
                visit = find(number)
                rows = row_refs[0], row_refs[-1], visit.row, shape.turn(tile, tiles)
                return stream.fill(slot, Source(weight.at[first + visit.expert], columns, *rows), first_step, last_step)

            return stream.spans(start, end, one, slot)

        def multiply(unit, slot):
            group, tile, start, end = place(unit)

            def block_scale(number):
                of_expert, turn = scales[0].at[first + find(number).expert], shape.turn(tile, tiles)

                def scale(block, step):
                    column = (tile * BLOCKS + block) * width
                    return of_expert[lax.div(column, jnp.int32(GROUP)), stream.place(step, turn)]

                return scale

            slot, sums = stream.multiply(slot, start, end, block_scale)
            for i, total in enumerate(sums):
                column = pl.ds(tile * (BLOCKS * width) + i * ROWS, ROWS)
                target = out.at[group, :, column] if plan.dense else out.at[pl.ds(group * n, n), column]
                target.transpose((1, 0))[...] = turned(total, dtype)
            return slot

        units = (jnp.int32(groups) if plan.dense else num_visits) * tiles
        stream.by_role(lambda: over_units(units, copy, jnp.int32(0)), lambda: over_units(units, multiply, jnp.int32(0)))

    out_shape = (groups, n, columns_d) if plan.dense else (plan.most_visits * n, columns_d)
    run = launch(kernel, "experts_decode_down", jax.ShapeDtypeStruct(out_shape, dtype), scratch)
    return run(base, *plan.tables, *act, values, *weight_scales)
