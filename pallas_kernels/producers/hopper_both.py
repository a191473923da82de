"""SwiGLU and its gradient on Hopper, quantised in both groupings in one pass: 6 bytes moved per value forward, 10 backward.

A block takes a tile of 128 x 128. Its four warpgroups hold 32 rows each, in FP32:

    along rows      a group lies in 8 lanes of one warp: largest, scale and values at once, as in `stream`
    along columns   the rows go through shared memory in FP32 and come back with a column per thread, so that the largest of 32 is found
                    without an exchange. The warpgroups' four largest meet in shared memory behind a barrier: the only one between them.
                    A thread then has 32 neighbours of the transposed row in its registers: 32 bytes to write

The transpose thus costs one write and one read of shared memory per value. Computing the SwiGLU twice, once in either form, would save it
and cost two more exponentials; a BF16 copy would halve it, and quantise rounded numbers.

Each warpgroup copies its own rows in, and asks for those of the next tile as soon as they are in its registers, so one slot is enough.

The gradient of the gate weight is a sum over f, which no block sees whole: every tile leaves its 128 sums, and a second, small kernel of
XLA adds f / 128 of them. Atomic additions would need no second kernel, and give other bits in every run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.producers.reference import swiglu, swiglu_gradients
from pallas_kernels.producers.stream import TuningConfig, each_block, launch, ring_slot, shape_of, stream
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, scale_of, scales_shape

SLAB = 32  # rows of a warpgroup
SLABS = GROUP // SLAB
BOTH = TuningConfig(rows=GROUP, warpgroups=SLABS, stages=1)  # rows and warpgroups are given by the tile; slots and blocks may vary
ROW_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((16, GROUP), (4, GROUP), (32,), (4,))), warp_dims=(-6,), lane_dims=(-4, -2), vector_dim=-1)
COLUMN_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)  # [128 columns, rows]: a column per thread
COLUMN_BYTES_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE(16)  # the same, 16 rows together: the widest store
NUM_MAXIMA = 2  # of which one is filled while a slower warpgroup may still read the other


class Outputs(NamedTuple):
    """References of a kernel's results, of these shapes in global memory; in shared memory [warpgroups, ...], a part of a tile."""

    values: Any  # [m, groups, 128]
    scales: Any  # [groups, pad4(m)]
    values_t: Any  # [128 * groups, pad128(m)]
    scales_t: Any  # [pad128(m) / 128, 128 * groups]


def swiglu_quantize_both(
    hidden: Array, weight: Array | None, scale: Scale, config: TuningConfig = BOTH, interpret: Any = None
) -> tuple[Quantized, Quantized]:
    """Return silu(gate) * up (* weight) in tiles [m, f], and transposed in tiles [f, pad128(m)]."""

    def compute(inputs, weight, emit, turn, release):
        product = swiglu(*inputs, weight)
        release()
        emit(product, 0, lax.rem(turn, NUM_MAXIMA))

    return _run(compute, [hidden], weight, 1, scale, config, interpret)[:2]


def swiglu_backward_quantize(
    hidden: Array, grad: Array, weight: Array | None, scale: Scale, config: TuningConfig = BOTH, interpret: Any = None
) -> tuple[Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles [m, 2f] and transposed in tiles [2f, pad128(m)], and that of the weight."""

    def compute(inputs, weight, emit, turn, release):
        grad_gate, grad_up, product = swiglu_gradients(*inputs, weight)
        sums = None if weight is None else jnp.sum(product, axis=1)
        release()
        emit(grad_gate, 0, 0)
        emit(grad_up, 1, 1)
        return sums

    rows, columns, sums = _run(compute, [hidden, grad], weight, 2, scale, config, interpret)
    return rows, columns, None if sums is None else jnp.sum(sums, axis=0)[: hidden.shape[0]]


def _run(
    compute: Callable, operands: list[Array], weight: Array | None, halves: int, scale: Scale, config: TuningConfig, interpret: Any
) -> tuple[Quantized, Quantized, Array | None]:
    """Run `compute(inputs, weight, emit, turn, release)` on tiles of `operands` [m, multiple of f] and quantise what it emits.

    `inputs` are FP32 [32, 128], gate and up and what follows; `emit(x, half, maxima)` takes half `half` of `halves` of the result; what
    `compute` returns are the sums [32] of rows of the tile, if `halves` is 2 and there is a weight.
    """
    m, f = operands[0].shape[0], operands[0].shape[1] // 2
    groups, tall = f // GROUP, -(-m // GROUP)
    widths = [x.shape[1] // f for x in operands]
    weights = () if weight is None else (jnp.pad(weight, (0, tall * GROUP - m)),)
    summed = weight is not None and halves == 2

    def body(*refs):
        input_refs, refs = refs[: len(operands)], refs[len(operands) :]
        weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
        out, refs = Outputs(*refs[:4]), refs[4:]
        sums_refs, refs = refs[: int(summed)], refs[int(summed) :]
        inputs_s, *staging, exchange_s, maxima_s, sums_s, full, ready = refs
        wg = lax.axis_index("wg")

        def load(tile, turn):
            index, row = ring_slot(config, turn), _first_row(tile // groups)
            planes = [(ref, half) for ref, width in zip(input_refs, widths, strict=True) for half in range(width)]
            for plane, (ref, half) in enumerate(planes):
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(row, SLAB), half, tile % groups], inputs_s.at[index, plane], full.at[index])

        def compute_tile(tile, turn, release):
            index, row = ring_slot(config, turn), _first_row(tile // groups)
            inputs = [_load_rows(inputs_s.at[index, plane]) for plane in range(sum(widths))]
            factors = [plgpu.load(ref.at[pl.ds(row, SLAB)], layout=ROW_LAYOUT.reduce(1), optimized=False) for ref in weight_refs]
            factor = _over_columns(factors[0]) if factors else None

            def emit(x, half, maxima):
                place = tile // groups, half * groups + tile % groups
                _emit_rows(x, place, scale, m, out, Outputs(*staging))
                exchange_s[wg] = x
                _emit_columns(place, scale, out, Outputs(*staging), exchange_s, maxima_s.at[maxima], ready)

            sums = compute(inputs, factor, emit, turn, release)
            for ref in sums_refs:
                sums_s[wg] = sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums_s.at[wg], ref.at[tile % groups, pl.ds(row, SLAB)])

        stream(config, each_block(), tall * groups, full, load, compute_tile)

    slab, ring = (SLABS, SLAB), config.warpgroups * config.stages
    scratch = [
        plgpu.SMEM((ring, sum(widths), SLAB, GROUP), jnp.bfloat16),
        plgpu.SMEM((*slab, GROUP), E4M3),
        plgpu.SMEM(slab, jnp.float32),
        plgpu.SMEM((SLABS, GROUP, SLAB), E4M3),
        plgpu.SMEM((GROUP,), jnp.float32),
        plgpu.SMEM((*slab, GROUP), jnp.float32),
        plgpu.SMEM((NUM_MAXIMA, SLABS, GROUP), jnp.float32),
        plgpu.SMEM(slab, jnp.float32),
        plgpu.Barrier(num_arrivals=sum(widths), num_barriers=ring),
        plgpu.Barrier(num_arrivals=SLABS),
    ]
    shape, shape_t = (m, halves * f), (halves * f, tall * GROUP)
    outputs = [
        shape_of((m, halves * groups, GROUP), E4M3),
        shape_of(scales_shape(shape, "tile"), jnp.float32),
        shape_of(shape_t, E4M3),
        shape_of(scales_shape(shape_t, "tile"), jnp.float32),
        *([shape_of(scales_shape((m, f), "tile"), jnp.float32)] * summed),
    ]
    planes = [x.reshape(m, width, groups, GROUP) for x, width in zip(operands, widths, strict=True)]
    values, scales, values_t, scales_t, *sums = launch(body, config, tall * groups, outputs, scratch, interpret)(*planes, *weights)
    rows, columns = Quantized(values.reshape(shape), scales, "tile"), Quantized(values_t, scales_t, "tile")
    return rows, columns, sums[0] if sums else None


def _emit_rows(x: Array, place: tuple, scale: Scale, num_rows: int, out: Outputs, staging: Outputs) -> None:
    """Quantise this warpgroup's rows of the tile at `place` (row of tiles, column of groups), and send them."""
    wg, row = lax.axis_index("wg"), _first_row(place[0])
    scales = scale_of(jnp.max(jnp.abs(x), axis=1), scale)
    numbers = row + plgpu.broadcasted_iota(jnp.int32, (SLAB,), 0, layout=ROW_LAYOUT.reduce(1))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging.values[wg] = (x * _over_columns(1.0 / scales)).astype(E4M3)
    staging.scales[wg] = jnp.where(numbers < num_rows, scales, 1.0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.values.at[wg], out.values.at[pl.ds(row, SLAB), place[1]])
    plgpu.copy_smem_to_gmem(staging.scales.at[wg], out.scales.at[place[1], pl.ds(row, SLAB)])


def _emit_columns(place: tuple, scale: Scale, out: Outputs, staging: Outputs, exchange_s, maxima_s, ready) -> None:
    """Quantise the columns of the tile whose rows lie in `exchange_s`, and send this warpgroup's part of the transposed rows."""
    wg, at_columns = lax.axis_index("wg"), pl.ds(place[1] * GROUP, GROUP)
    x = plgpu.load(exchange_s.at[wg].transpose((1, 0)), layout=COLUMN_LAYOUT, optimized=False)
    maxima_s[wg] = jnp.max(jnp.abs(x), axis=1)
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)
    maxima = [plgpu.load(maxima_s.at[slab], layout=COLUMN_LAYOUT.reduce(1), optimized=False) for slab in range(SLABS)]
    scales = scale_of(jnp.maximum(jnp.maximum(maxima[0], maxima[1]), jnp.maximum(maxima[2], maxima[3])), scale)
    scaled = x * plgpu.layout_cast(lax.broadcast_in_dim(1.0 / scales, x.shape, (0,)), COLUMN_LAYOUT)
    staging.values_t[wg] = plgpu.layout_cast(scaled, COLUMN_BYTES_LAYOUT).astype(E4M3)

    @pl.when(wg == 0)
    def _():
        staging.scales_t[...] = scales

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.values_t.at[wg], out.values_t.at[at_columns, pl.ds(_first_row(place[0]), SLAB)])

    @pl.when(wg == 0)
    def _():
        plgpu.copy_smem_to_gmem(staging.scales_t, out.scales_t.at[place[0], at_columns])


def _first_row(tile_row: Array) -> Array:
    """The first row of this warpgroup in a row of tiles."""
    return tile_row * GROUP + lax.axis_index("wg") * SLAB


def _load_rows(ref) -> Array:
    return plgpu.load(ref, layout=ROW_LAYOUT, optimized=False).astype(jnp.float32)


def _over_columns(x: Array) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (SLAB, GROUP), (0,)), ROW_LAYOUT)
