"""SwiGLU's gradient on Hopper in both groupings, and its output once more for a weight gradient.

It moves 11 bytes per value of the output.

A block takes a tile of 128 x 128. Its four warpgroups hold 32 rows each, in FP32:

    along rows      a group lies in 8 lanes of one warp: largest, scale and values at once, as in
                    `pallas_kernels.hopper.stream`
    along columns   the rows go through shared memory in FP32 and come back with a column per thread, so that the
                    largest of 32 is found without an exchange. The warpgroups' four largest meet in shared memory
                    behind a barrier: the only one between them. A thread then has 32 neighbours of the transposed row
                    in its registers: 32 bytes to write

The transpose thus costs one write and one read of shared memory per value. Computing the SwiGLU twice, once in either
form, would save it and cost two more exponentials; a BF16 copy would halve it, and quantise rounded numbers.

Each warpgroup copies its own rows in. It reads them twice, for the output and then for the gradient, because 128
registers do not hold the operands while the output is transposed; then it asks for those of the next tile, whose copies
the gradient's two halves hide.

The gradient of the gate weight is a sum over f, which no block sees whole: every tile leaves its 128 sums, and a
second, small kernel of XLA adds f / 128 of them. Atomic additions would need no second kernel, and give other bits in
every run.

`quantize.quantize_tiles_both` transposes otherwise: its values lie in shared memory as BF16, which `ldmatrix`
transposes on the way to the registers. These are made in registers, in FP32, which has no such load.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.stream import (
    APPROXIMATE,
    TuningConfig,
    launch,
    ones_beyond,
    position,
    put,
    quantize_registers,
    quantized_type,
    spread,
    tiles_of_rows,
    whole_tiles,
)
from pallas_kernels.producers.reference import swiglu, swiglu_gradients
from pallas_kernels.quantized import E4M3, Quantized, Scale, largest_magnitude, scale_of

SLAB = 32  # rows of a warpgroup
SLABS = GROUP // SLAB
# only blocks and stages may vary: the tile gives the rest
SWIGLU_BACKWARD_QUANTIZE = TuningConfig(warpgroups=SLABS, stages=1)
ROW_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((16, GROUP), (4, GROUP), (32,), (4,))), warp_dims=(-6,), lane_dims=(-4, -2), vector_dim=-1
)
COLUMN_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)  # [128 columns, rows]: a column per thread
COLUMN_BYTES_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(16)  # the same, 16 rows together: the widest store
PLANES = 3  # of a tile: gate, up and the gradient
NUM_MAXIMA = 2  # of which one is filled while a slower warpgroup may still read the other


class Outputs(NamedTuple):
    """References of the results, of these shapes in global memory.

    In shared memory they are [warpgroups, ...], a part of a tile.

    `groups` are those of gate and up together for the gradient, and of the activation alone, which has the last two
    only.
    """

    values: Any  # [m, groups, 128]
    scales: Any  # [groups, pad4(m)]
    values_t: Any  # [128 * groups, pad128(m)]
    scales_t: Any  # [pad128(m) / 128, 128 * groups]; in shared memory [128], of the whole tile


class Exchange(NamedTuple):
    """What the transpose goes through in shared memory."""

    rows: Any  # FP32 [warpgroups, 32, 128]
    maxima: Any  # FP32 [NUM_MAXIMA, warpgroups, 128], of the columns of each warpgroup's rows
    ready: Any  # barrier: all maxima are there


class Target(NamedTuple):
    """Where a warpgroup's part of a tile belongs in the result."""

    warpgroup: Array
    rows: Any  # a slice: 32 of m
    i: Array  # of the 128 rows
    column: Array  # of the 128 columns


def swiglu_backward_quantize(
    hidden: Array,
    grad: Array,
    weight: Array | None,
    scale: Scale,
    config: TuningConfig = SWIGLU_BACKWARD_QUANTIZE,
    *,
    num_rows: Array | None = None,
) -> tuple[Quantized, Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles and transposed, the output transposed, and the weight's gradient.

    The shapes are [m, 2f], [2f, pad128(m)], [f, pad128(m)] and [m]. Tiles behind the first `num_rows` rows are not
    written.
    """
    m, f = hidden.shape[0], hidden.shape[1] // 2
    counts = [] if num_rows is None else [num_rows.reshape(1)]
    groups, tall, weighted = f // GROUP, pl.cdiv(m, GROUP), weight is not None
    values, scales_type = quantized_type((m, 2 * f))
    values = jax.ShapeDtypeStruct((m, 2 * groups, GROUP), values.dtype)
    sums = [jax.ShapeDtypeStruct((groups, tall * GROUP), jnp.float32)] * weighted
    scales = whole_tiles(scales_type, GROUP)
    kernel = launch(
        _body(m, groups, weighted, len(counts), scale),
        config,
        tall * groups,
        (values, scales, *quantized_type((2 * f, tall * GROUP)), *quantized_type((f, tall * GROUP)), *sums),
        _scratch(weighted, config),
        share="tiles",
        copies_per_slot=PLANES,
        params=APPROXIMATE,
        used=(lambda *refs: tiles_of_rows(refs[2 + weighted], GROUP, groups)) if counts else None,
    )
    weights = [jnp.pad(weight, (0, tall * GROUP - m))] if weighted else []
    results = kernel(hidden.reshape(m, 2, groups, GROUP), grad.reshape(m, groups, GROUP), *weights, *counts)
    values, scales, values_t, scales_t, act_t, act_scales_t, *sums = results
    return (
        Quantized(values.reshape(m, 2 * f), scales[:, : scales_type.shape[1]], "tile"),
        Quantized(values_t, scales_t, "tile"),
        Quantized(act_t, act_scales_t, "tile"),
        jnp.sum(sums[0], axis=0)[:m] if weighted else None,
    )


def _scratch(weighted: bool, config: TuningConfig) -> list:
    """Shared memory: slots, `Outputs`, `Exchange`, sums."""
    slab = (SLABS, SLAB)
    return [
        plgpu.SMEM((config.warpgroups * config.stages, PLANES, SLAB, GROUP), jnp.bfloat16),
        plgpu.SMEM((*slab, GROUP), E4M3),
        plgpu.SMEM(slab, jnp.float32),
        plgpu.SMEM((SLABS, GROUP, SLAB), E4M3),
        plgpu.SMEM((GROUP,), jnp.float32),
        plgpu.SMEM((*slab, GROUP), jnp.float32),
        plgpu.SMEM((NUM_MAXIMA, SLABS, GROUP), jnp.float32),
        plgpu.Barrier(num_arrivals=SLABS),
        *([plgpu.SMEM(slab, jnp.float32)] * weighted),
    ]


def _body(m: int, groups: int, weighted: bool, num_counts: int, scale: Scale) -> Callable:
    """Return the body for `stream.launch`, over the tiles of m rows and `groups` groups of columns.

    It does not read the `num_counts` inputs after the weights.
    """

    def body(hidden, grad, *refs):
        weights, refs = refs[:weighted], refs[weighted + num_counts :]
        out, act, sums, refs = (
            Outputs(*refs[:4]),
            Outputs(None, None, *refs[4:6]),
            refs[6 : 6 + weighted],
            refs[6 + weighted :],
        )
        slots, staging, exchange, sum_slots = refs[0], Outputs(*refs[1:5]), Exchange(*refs[5:8]), refs[8:]
        warpgroup = lax.axis_index("warpgroup")

        def at(tile):
            i, g = position(tile, groups)
            return pl.ds(i * GROUP + warpgroup * SLAB, SLAB), i, g

        def fetch(tile, slot, copied):
            rows, _, g = at(tile)
            for plane, ref in enumerate((hidden.at[rows, 0, g], hidden.at[rows, 1, g], grad.at[rows, g])):
                plgpu.copy_gmem_to_smem(ref, slots.at[slot, plane], copied)

        def work(turn):
            rows, i, g = at(turn.tile)
            factors = [plgpu.load(ref.at[rows], layout=ROW_LAYOUT.reduce(1), optimized=False) for ref in weights]
            factor = spread(factors[0], (SLAB, GROUP), ROW_LAYOUT, (0,)) if factors else None

            def load(planes):
                loads = (
                    plgpu.load(slots.at[turn.slot, plane], layout=ROW_LAYOUT, optimized=False)
                    for plane in range(planes)
                )
                return (x.astype(jnp.float32) for x in loads)

            def emit(x, number, to, group, along_rows):
                where = Target(warpgroup, rows, i, group)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if along_rows:
                    _emit_rows(x, where, scale, m, to, staging)
                put(exchange.rows.at[warpgroup], x)
                plgpu.commit_smem()
                _emit_columns(where, scale, to, staging, exchange, lax.rem(3 * turn.number + number, NUM_MAXIMA))

            emit(swiglu(*load(2), factor), 0, act, g, along_rows=False)
            grad_gate, grad_up, product = swiglu_gradients(*load(PLANES), factor)
            row_sums = [jnp.sum(product, axis=1) for _ in sums]
            plgpu.commit_smem()
            turn.release()
            emit(grad_gate, 1, out, g, along_rows=True)
            emit(grad_up, 2, out, groups + g, along_rows=True)
            for ref, slot, row_sum in zip(sums, sum_slots, row_sums, strict=True):
                slot[warpgroup] = row_sum
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot.at[warpgroup], ref.at[g, rows])

        return fetch, work

    return body


def _emit_rows(x: Array, to: Target, scale: Scale, m: int, out: Outputs, staging: Outputs) -> None:
    """Quantise this warpgroup's rows of a tile, and send them."""
    values, scales = quantize_registers(x, scale, ROW_LAYOUT)
    put(staging.values.at[to.warpgroup], values)
    put(staging.scales.at[to.warpgroup], ones_beyond(scales, to.rows.start, m, ROW_LAYOUT))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.values.at[to.warpgroup], out.values.at[to.rows, to.column])
    plgpu.copy_smem_to_gmem(staging.scales.at[to.warpgroup], out.scales.at[to.column, to.rows])


def _emit_columns(to: Target, scale: Scale, out: Outputs, staging: Outputs, exchange: Exchange, maxima: Any) -> None:
    """Quantise the columns of the tile whose rows lie in `exchange`, and send this warpgroup's part of them."""
    columns = pl.ds(to.column * GROUP, GROUP)
    x = plgpu.load(exchange.rows.at[to.warpgroup].transpose((1, 0)), layout=COLUMN_LAYOUT, optimized=False)
    exchange.maxima[maxima, to.warpgroup] = largest_magnitude(x, axis=1)
    plgpu.barrier_arrive(exchange.ready)
    plgpu.barrier_wait(exchange.ready)
    parts = [
        plgpu.load(exchange.maxima.at[maxima, slab], layout=COLUMN_LAYOUT.reduce(1), optimized=False)
        for slab in range(SLABS)
    ]
    scales = scale_of(jnp.maximum(jnp.maximum(parts[0], parts[1]), jnp.maximum(parts[2], parts[3])), scale)
    scaled = x * spread(1.0 / scales, x.shape, COLUMN_LAYOUT, (0,))
    put(staging.values_t.at[to.warpgroup], plgpu.layout_cast(scaled, COLUMN_BYTES_LAYOUT).astype(E4M3))

    @pl.when(to.warpgroup == 0)
    def _():
        staging.scales_t[...] = scales

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.values_t.at[to.warpgroup], out.values_t.at[columns, to.rows])

    @pl.when(to.warpgroup == 0)
    def _():
        plgpu.copy_smem_to_gmem(staging.scales_t, out.scales_t.at[to.i, columns])
