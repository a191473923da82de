"""SwiGLU and its gradient on Hopper, quantised in both groupings in one pass: 6 bytes moved per value forward, 10 backward.

A block takes a tile of 128 x 128. Its four warpgroups hold 32 rows each, in FP32:

    along rows      a group lies in 8 lanes of one warp: largest, scale and values at once, as in `pallas_kernels.stream`
    along columns   the rows go through shared memory in FP32 and come back with a column per thread, so that the largest of 32 is found
                    without an exchange. The warpgroups' four largest meet in shared memory behind a barrier: the only one between them.
                    A thread then has 32 neighbours of the transposed row in its registers: 32 bytes to write

The transpose thus costs one write and one read of shared memory per value. Computing the SwiGLU twice, once in either form, would save it
and cost two more exponentials; a BF16 copy would halve it, and quantise rounded numbers.

Each warpgroup copies its own rows in, and asks for those of the next tile as soon as they are in its registers, so one slot is enough.

The gradient of the gate weight is a sum over f, which no block sees whole: every tile leaves its 128 sums, and a second, small kernel of
XLA adds f / 128 of them. Atomic additions would need no second kernel, and give other bits in every run.

`quantize.quantize_tiles_both` transposes otherwise: its values lie in shared memory as BF16, which `ldmatrix` transposes on the way to the
registers. These are made in registers, in FP32, which has no such load.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.producers.reference import swiglu, swiglu_gradients
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, scale_of, scales_shape
from pallas_kernels.stream import APPROXIMATE, TuningConfig, launch, ones_beyond, place, put, quantize_registers, quantized_type, spread

SLAB = 32  # rows of a warpgroup
SLABS = GROUP // SLAB
BOTH = TuningConfig(warpgroups=SLABS, stages=1)  # only blocks and stages may vary: the tile gives the rest
ROW_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((16, GROUP), (4, GROUP), (32,), (4,))), warp_dims=(-6,), lane_dims=(-4, -2), vector_dim=-1)
COLUMN_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)  # [128 columns, rows]: a column per thread
COLUMN_BYTES_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(16)  # the same, 16 rows together: the widest store
NUM_MAXIMA = 2  # of which one is filled while a slower warpgroup may still read the other


class Outputs(NamedTuple):
    """References of a kernel's results, of these shapes in global memory; in shared memory [warpgroups, ...], a part of a tile."""

    values: Any  # [m, groups, 128]
    scales: Any  # [groups, pad4(m)]
    values_t: Any  # [128 * groups, pad128(m)]
    scales_t: Any  # [pad128(m) / 128, 128 * groups]; in shared memory [128], of the whole tile


class Exchange(NamedTuple):
    """What the transpose goes through in shared memory."""

    rows: Any  # FP32 [warpgroups, 32, 128]
    maxima: Any  # FP32 [NUM_MAXIMA, warpgroups, 128], of the columns of each warpgroup's rows
    ready: Any  # barrier: all maxima are there


class Place(NamedTuple):
    """Where a warpgroup's part of a tile belongs in the result."""

    warpgroup: Array
    rows: Any  # a slice: 32 of m
    i: Array  # of the 128 rows
    column: Array  # of the 128 columns


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over the tiles of m rows and f columns reads and writes.

    Attributes:
        m, f: rows and columns of a half.
        planes: halves of each operand: two of `hidden` [m, 2f], one of `grad` [m, f].
        halves: of the result.
        weighted: whether rows have weights.
    """

    m: int
    f: int
    planes: tuple[int, ...]
    halves: int
    weighted: bool

    @property
    def groups(self) -> int:
        """Groups of a row of a half."""
        return self.f // GROUP

    @property
    def tall(self) -> int:
        """Tiles along m."""
        return pl.cdiv(self.m, GROUP)

    @property
    def num_sums(self) -> int:
        """Tensors of sums along rows, for the gradient of the weight: one of the pass backward, if there is a weight."""
        return int(self.weighted and self.halves == 2)


def swiglu_quantize_both(hidden: Array, weight: Array | None, scale: Scale, config: TuningConfig = BOTH) -> tuple[Quantized, Quantized]:
    """Return silu(gate) * up (* weight) in tiles [m, f], and transposed in tiles [f, pad128(m)]."""

    def compute(inputs, weight, emit, turn):
        product = swiglu(*inputs, weight)
        plgpu.commit_smem()
        turn.release()
        emit(product, 0, lax.rem(turn.number, NUM_MAXIMA))

    rows, columns, _ = _run(compute, [hidden], weight, 1, scale, config)
    return rows, columns


def swiglu_backward_quantize(
    hidden: Array, grad: Array, weight: Array | None, scale: Scale, config: TuningConfig = BOTH
) -> tuple[Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles [m, 2f] and transposed in tiles [2f, pad128(m)], and that of the weight."""

    def compute(inputs, weight, emit, turn):
        grad_gate, grad_up, product = swiglu_gradients(*inputs, weight)
        sums = None if weight is None else jnp.sum(product, axis=1)
        plgpu.commit_smem()
        turn.release()
        emit(grad_gate, 0, 0)
        emit(grad_up, 1, 1)
        return sums

    rows, columns, sums = _run(compute, [hidden, grad], weight, 2, scale, config)
    return rows, columns, None if sums is None else jnp.sum(sums, axis=0)[: hidden.shape[0]]


def _run(
    compute: Callable, operands: list[Array], weight: Array | None, halves: int, scale: Scale, config: TuningConfig
) -> tuple[Quantized, Quantized, Array | None]:
    """Run `compute` (see `_body`) on the tiles of `operands` [m, multiple of f]; return results and sums [f / 128, pad4(m)] or None."""
    m, f = operands[0].shape[0], operands[0].shape[1] // 2
    of = Pass(m, f, tuple(x.shape[1] // f for x in operands), halves, weight is not None)
    shape, shape_t = (m, halves * f), (halves * f, of.tall * GROUP)
    values, scales = quantized_type(shape)
    values = jax.ShapeDtypeStruct((m, halves * of.groups, GROUP), values.dtype)
    sums = [jax.ShapeDtypeStruct(scales_shape((m, f), "tile"), jnp.float32)] * of.num_sums
    kernel = launch(
        _body(of, compute, scale),
        config,
        of.tall * of.groups,
        (values, scales, *quantized_type(shape_t), *sums),
        _scratch(of, config),
        share="tiles",
        copies_per_slot=sum(of.planes),
        params=APPROXIMATE,
    )
    planes = [x.reshape(m, width, of.groups, GROUP) for x, width in zip(operands, of.planes, strict=True)]
    weights = [] if weight is None else [jnp.pad(weight, (0, of.tall * GROUP - m))]
    values, scales, values_t, scales_t, *sums = kernel(*planes, *weights)
    return Quantized(values.reshape(shape), scales, "tile"), Quantized(values_t, scales_t, "tile"), sums[0] if sums else None


def _scratch(of: Pass, config: TuningConfig) -> list:
    """Shared memory: slots, `Outputs`, `Exchange`, sums."""
    slab = (SLABS, SLAB)
    return [
        plgpu.SMEM((config.warpgroups * config.stages, sum(of.planes), SLAB, GROUP), jnp.bfloat16),
        plgpu.SMEM((*slab, GROUP), E4M3),
        plgpu.SMEM(slab, jnp.float32),
        plgpu.SMEM((SLABS, GROUP, SLAB), E4M3),
        plgpu.SMEM((GROUP,), jnp.float32),
        plgpu.SMEM((*slab, GROUP), jnp.float32),
        plgpu.SMEM((NUM_MAXIMA, SLABS, GROUP), jnp.float32),
        plgpu.Barrier(num_arrivals=SLABS),
        *([plgpu.SMEM(slab, jnp.float32)] * of.num_sums),
    ]


def _body(of: Pass, compute: Callable, scale: Scale) -> Callable:
    """Return the body, for `stream.launch`, that quantises what `compute(inputs, weight, emit, turn)` emits.

    `inputs` are FP32 [32, 128], gate and up and what follows; `weight` is spread like them, or None; `emit(x, half, maxima)` takes one half
    of the result, through one of the maxima; what `compute` returns, if the pass has sums, are the sums [32] of rows.
    """

    def body(*refs):
        refs = iter(refs)
        operands, weights, out, sums, slots, staging, exchange, sum_slots = (
            list(itertools.islice(refs, count))
            for count in (len(of.planes), of.weighted, len(Outputs._fields), of.num_sums, 1, len(Outputs._fields), 3, of.num_sums)
        )
        (slots,), out, staging, exchange = slots, Outputs(*out), Outputs(*staging), Exchange(*exchange)
        planes = [(ref, half) for ref, width in zip(operands, of.planes, strict=True) for half in range(width)]
        warpgroup = lax.axis_index("warpgroup")

        def at(tile):
            i, g = place(tile, of.groups)
            return pl.ds(i * GROUP + warpgroup * SLAB, SLAB), i, g

        def fetch(tile, slot, copied):
            rows, _, g = at(tile)
            for plane, (ref, half) in enumerate(planes):
                plgpu.copy_gmem_to_smem(ref.at[rows, half, g], slots.at[slot, plane], copied)

        def work(turn):
            rows, i, g = at(turn.tile)
            inputs = [plgpu.load(slots.at[turn.slot, plane], layout=ROW_LAYOUT, optimized=False) for plane in range(len(planes))]
            factors = [plgpu.load(ref.at[rows], layout=ROW_LAYOUT.reduce(1), optimized=False) for ref in weights]
            factor = spread(factors[0], (SLAB, GROUP), ROW_LAYOUT, (0,)) if factors else None

            def emit(x, half, maxima):
                to = Place(warpgroup, rows, i, half * of.groups + g)
                _emit_rows(x, to, scale, of.m, out, staging)
                put(exchange.rows.at[warpgroup], x)
                plgpu.commit_smem()
                _emit_columns(to, scale, out, staging, exchange, maxima)

            row_sums = compute([x.astype(jnp.float32) for x in inputs], factor, emit, turn)
            for ref, slot in zip(sums, sum_slots, strict=True):
                slot[warpgroup] = row_sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot.at[warpgroup], ref.at[g, rows])

        return fetch, work

    return body


def _emit_rows(x: Array, to: Place, scale: Scale, m: int, out: Outputs, staging: Outputs) -> None:
    """Quantise this warpgroup's rows of a tile, and send them."""
    values, scales = quantize_registers(x, scale, ROW_LAYOUT)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    put(staging.values.at[to.warpgroup], values)
    put(staging.scales.at[to.warpgroup], ones_beyond(scales, to.rows.start, m, ROW_LAYOUT))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.values.at[to.warpgroup], out.values.at[to.rows, to.column])
    plgpu.copy_smem_to_gmem(staging.scales.at[to.warpgroup], out.scales.at[to.column, to.rows])


def _emit_columns(to: Place, scale: Scale, out: Outputs, staging: Outputs, exchange: Exchange, maxima: Any) -> None:
    """Quantise the columns of the tile whose rows lie in `exchange`, and send this warpgroup's part of the transposed rows."""
    columns = pl.ds(to.column * GROUP, GROUP)
    x = plgpu.load(exchange.rows.at[to.warpgroup].transpose((1, 0)), layout=COLUMN_LAYOUT, optimized=False)
    exchange.maxima[maxima, to.warpgroup] = jnp.max(jnp.abs(x), axis=1)
    plgpu.barrier_arrive(exchange.ready)
    plgpu.barrier_wait(exchange.ready)
    parts = [plgpu.load(exchange.maxima.at[maxima, slab], layout=COLUMN_LAYOUT.reduce(1), optimized=False) for slab in range(SLABS)]
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
