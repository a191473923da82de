"""The producers as Pallas kernels for TPUs: correct and compiled, their speed on a TPU is unmeasured.

A block is 128 rows by 1024 columns (whole rows for the norm). Its groups of 128 are the lanes of a register, so the
largest of a group is one reduction along lanes. Scales come out as columns and are stored as rows: they are gathered in
the lanes of one matrix of 128 x 128, which is transposed once. Edge blocks hold rubbish beyond the tensor; what is
written there is dropped, and where 128 rows form a group, rows beyond m are set to zero first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP
from pallas_kernels.producers import e5m6
from pallas_kernels.producers.reference import swiglu, swiglu_gradients
from pallas_kernels.quantized import E4M3, Quantized, Scale, encode, scale_of, scales_shape

BLOCK_GROUPS = 8  # scales are stored in pieces of 8 x 128
WIDTH = BLOCK_GROUPS * GROUP
VMEM_BYTES = 48 * 2**20  # of 64 MiB, the least of v5p, v6e and tpu7x


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale, interpret: Any = False) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    m, k = x.shape

    def body(x_ref, gain_ref, values_ref, scales_ref):
        row = x_ref[...].astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(row * row, axis=1, keepdims=True) + eps)

        def group(g):
            at = pl.ds(g * GROUP, GROUP)
            return (
                (x_ref[:, at].astype(jnp.float32) * inverse * gain_ref[:, at]).astype(jnp.bfloat16).astype(jnp.float32)
            )

        for first in range(0, k // GROUP, GROUP):
            size = min(GROUP, k // GROUP - first)
            scales_ref[pl.ds(first, size)] = _rows(
                lambda g, first=first: group(first + g), size, scale, m, values_ref, first
            )

    specs = [pl.BlockSpec((GROUP, k), lambda i: (i, 0)), pl.BlockSpec((1, k), lambda i: (0, 0))]
    out_specs = [pl.BlockSpec((GROUP, k), lambda i: (i, 0)), pl.BlockSpec((k // GROUP, GROUP), lambda i: (0, i))]
    call = _call(body, (pl.cdiv(m, GROUP),), specs, out_specs, _tile_shapes((m, k)), interpret)
    return Quantized(*call(x, gain[None]), "tile")


def swiglu_quantize(hidden: Array, weight: Array | None, scale: Scale, interpret: Any = False) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]."""
    m, f = hidden.shape[0], hidden.shape[1] // 2

    def body(gate_ref, up_ref, *refs):
        *weight_ref, values_ref, scales_ref = refs
        factors = [ref[...] for ref in weight_ref]
        scales_ref[...] = _rows(
            lambda g: swiglu(_group(gate_ref, g), _group(up_ref, g), *factors), BLOCK_GROUPS, scale, m, values_ref
        )

    inputs, specs = _swiglu_inputs(hidden, weight)
    call = _call(body, _grid(m, f), specs, _both_specs()[:2], _tile_shapes((m, f)), interpret)
    return Quantized(*call(*inputs), "tile")


def swiglu_backward_quantize(
    hidden: Array, grad: Array, weight: Array | None, scale: Scale, interpret: Any = False
) -> tuple[Quantized, Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles [m, 2f] and transposed, the output transposed [f, pad128(m)], and the
    weight's gradient.

    Gate and up leave as two tensors, because a block of one cannot span both, and are joined by XLA.
    """
    m, f = hidden.shape[0], hidden.shape[1] // 2
    weighted = int(weight is not None)

    def body(gate_ref, up_ref, grad_ref, *refs):
        weight_ref, outputs, act_refs, sums_ref = (
            refs[:weighted],
            refs[weighted : weighted + 8],
            refs[weighted + 8 : weighted + 10],
            refs[weighted + 10 :],
        )
        factor = weight_ref[0][...] if weighted else None
        gradients = [
            swiglu_gradients(_group(gate_ref, g), _group(up_ref, g), _group(grad_ref, g), factor)
            for g in range(BLOCK_GROUPS)
        ]
        for half, (values_ref, scales_ref, values_t_ref, scales_t_ref) in enumerate((outputs[:4], outputs[4:])):
            x = [_inside(gradient[half], m) for gradient in gradients]
            scales_ref[...] = _rows(x.__getitem__, BLOCK_GROUPS, scale, m, values_ref)
            _columns(x, scale, values_t_ref, scales_t_ref)
        activations = (swiglu(_group(gate_ref, g), _group(up_ref, g), factor) for g in range(BLOCK_GROUPS))
        _columns([_inside(x, m) for x in activations], scale, *act_refs)
        for ref in sums_ref:
            first_group = pl.program_id(1) * BLOCK_GROUPS
            products = [
                jnp.where(first_group + g < f // GROUP, gradient[2], 0.0) for g, gradient in enumerate(gradients)
            ]
            ref[...] = jnp.where(pl.program_id(1) == 0, 0.0, ref[...]) + sum(
                jnp.sum(x, axis=1, keepdims=True) for x in products
            )

    (gate, up, *weights), (gate_spec, up_spec, *weight_specs) = _swiglu_inputs(hidden, weight)
    specs = [gate_spec, up_spec, pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j)), *weight_specs]
    column = pl.BlockSpec((GROUP, 1), lambda i, j: (i, 0))
    both_shapes, both_specs = _both_shapes(m, f), _both_specs()
    shapes = both_shapes * 2 + both_shapes[2:] + [jax.ShapeDtypeStruct((m, 1), jnp.float32)] * weighted
    call = _call(body, _grid(m, f), specs, both_specs * 2 + both_specs[2:] + [column] * weighted, shapes, interpret)
    *results, sums = [*call(gate, up, grad, *weights), *([] if weighted else [None])]
    axes = (1, 0, 0, 2)
    joined = [jnp.concatenate(pair, axis) for *pair, axis in zip(results[:4], results[4:8], axes, strict=True)]
    return (
        Quantized(*joined[:2], "tile"),
        _transposed(*joined[2:]),
        _transposed(*results[8:]),
        None if sums is None else sums[:, 0],
    )


def e5m6_pack(x: Array, interpret: Any = False) -> tuple[Array, Array]:
    """Return x [m, k] as uint8 [m, k * 3 // 2] and FP32 scales [k / 128, pad4(m)]."""
    m, k = x.shape

    def body(x_ref, packed_ref, scales_ref):
        def pack(g):
            codes = _group(x_ref, g)
            scales = e5m6.scale_of(jnp.max(jnp.abs(codes), axis=1, keepdims=True))
            codes = e5m6.encode(codes * (1.0 / scales))
            return scales, jnp.concatenate(e5m6.pack(codes[:, : e5m6.HALF], codes[:, e5m6.HALF :]), axis=1)

        scales, planes = zip(*(pack(g) for g in range(BLOCK_GROUPS)), strict=True)
        packed_ref[...] = jnp.concatenate(planes, axis=1).astype(jnp.uint8)
        scales_ref[...] = _scale_rows(scales, m)

    packed_width = k // GROUP * e5m6.TILE_BYTES
    shapes = [
        jax.ShapeDtypeStruct((m, packed_width), jnp.uint8),
        jax.ShapeDtypeStruct(scales_shape(x.shape, "tile"), jnp.float32),
    ]
    packed_spec = pl.BlockSpec((GROUP, BLOCK_GROUPS * e5m6.TILE_BYTES), lambda i, j: (i, j))
    values_spec, scales_spec = _both_specs()[:2]
    return tuple(_call(body, _grid(m, k), [values_spec], [packed_spec, scales_spec], shapes, interpret)(x))


def e5m6_unpack(packed: Array, scales: Array, m: int, dtype: jnp.dtype, interpret: Any = False) -> Array:
    """Return [m, k] of `dtype`."""
    k = packed.shape[1] // e5m6.TILE_BYTES * GROUP

    def body(packed_ref, scales_ref, x_ref):
        planes = packed_ref[...].astype(jnp.int32)
        columns = scales_ref[...].T
        for g in range(BLOCK_GROUPS):
            tile = planes[:, g * e5m6.TILE_BYTES : (g + 1) * e5m6.TILE_BYTES]
            codes = e5m6.unpack(tile[:, : e5m6.HALF], tile[:, e5m6.HALF : GROUP], tile[:, GROUP:])
            values = jnp.concatenate([e5m6.decode(half) for half in codes], axis=1)
            x_ref[:, pl.ds(g * GROUP, GROUP)] = (values * columns[:, g : g + 1]).astype(dtype)

    packed_spec = pl.BlockSpec((GROUP, BLOCK_GROUPS * e5m6.TILE_BYTES), lambda i, j: (i, j))
    values_spec, scales_spec = _both_specs()[:2]
    call = _call(
        body, _grid(m, k), [packed_spec, scales_spec], [values_spec], [jax.ShapeDtypeStruct((m, k), dtype)], interpret
    )
    return call(packed, scales)[0]


def _call(
    body: Callable, grid: tuple[int, ...], in_specs: list, out_specs: list, out_shape: list, interpret: Any
) -> Callable:
    params = pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=params,
        interpret=interpret,
    )


def _grid(m: int, columns: int) -> tuple[int, int]:
    return pl.cdiv(m, GROUP), pl.cdiv(columns, WIDTH)


def _swiglu_inputs(hidden: Array, weight: Array | None) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Gate, up and the weight as a column. The halves are blocks of `hidden` itself, unless a block would span both."""
    m, f = hidden.shape[0], hidden.shape[1] // 2
    whole = f % WIDTH == 0
    halves = [hidden, hidden] if whole else jnp.split(hidden, 2, axis=1)
    first_of_up = f // WIDTH if whole else 0
    specs = [
        pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j)),
        pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j + first_of_up)),
    ]
    if weight is None:
        return halves, specs
    return [*halves, weight.reshape(m, 1)], [*specs, pl.BlockSpec((GROUP, 1), lambda i, j: (i, 0))]


def _tile_shapes(shape: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scales_shape(shape, "tile"), jnp.float32)]


def _both_shapes(m: int, f: int) -> list[jax.ShapeDtypeStruct]:
    """Tiles and their scales, transposed tiles and their scales [pad128(m) / 128, 1, f], the 1 so that a block may be
    one row of them.
    """
    tall = pl.cdiv(m, GROUP)
    return [
        *_tile_shapes((m, f)),
        jax.ShapeDtypeStruct((f, tall * GROUP), E4M3),
        jax.ShapeDtypeStruct((tall, 1, f), jnp.float32),
    ]


def _both_specs() -> list[pl.BlockSpec]:
    return [
        pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j)),
        pl.BlockSpec((BLOCK_GROUPS, GROUP), lambda i, j: (j, i)),
        pl.BlockSpec((WIDTH, GROUP), lambda i, j: (j, i)),
        pl.BlockSpec((1, 1, WIDTH), lambda i, j: (i, 0, j)),
    ]


def _transposed(values: Array, scales: Array) -> Quantized:
    return Quantized(values, scales[:, 0], "tile")


def _group(ref, g: int) -> Array:
    """FP32 group g [128, 128] of a block."""
    return ref[:, pl.ds(g * GROUP, GROUP)].astype(jnp.float32)


def _inside(x: Array, m: int) -> Array:
    """Zero the rows of a block that are beyond m."""
    return jnp.where(pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, x.shape, 0) < m, x, 0.0)


def _rows(group: Callable[[int], Array], count: int, scale: Scale, m: int, values_ref, first: int = 0) -> Array:
    """Quantise the rows of `count` groups of a block into `values_ref` from group `first` on; return the scales [count,
    128].
    """
    columns = []
    for g in range(count):
        x = group(g)
        columns.append(scale_of(jnp.max(jnp.abs(x), axis=1, keepdims=True), scale))
        values_ref[:, pl.ds((first + g) * GROUP, GROUP)] = encode(x, columns[-1])
    return _scale_rows(columns, m)


def _scale_rows(columns: Any, m: int) -> Array:
    """Return scales of groups, a column [128, 1] each, as rows; 1 beyond m."""
    lanes = lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    matrix = functools.reduce(
        lambda matrix, g: jnp.where(lanes == g, columns[g], matrix), range(len(columns)), jnp.ones((GROUP, GROUP))
    )
    rows = pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 0)
    return jnp.where(rows < m, matrix, 1.0).T[: len(columns)]


def _columns(groups: list[Array], scale: Scale, values_t_ref, scales_t_ref) -> None:
    """Quantise the columns of a block, given as groups [128, 128], into the transposed block."""
    for g, x in enumerate(groups):
        at, x_t = pl.ds(g * GROUP, GROUP), x.T
        values_t_ref[at] = encode(x_t, scale_of(jnp.max(jnp.abs(x_t), axis=1, keepdims=True), scale))
        scales_t_ref[0, :, at] = scale_of(jnp.max(jnp.abs(x), axis=0, keepdims=True), scale)
