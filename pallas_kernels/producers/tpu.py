"""The producers as Pallas kernels for TPUs: correct and compiled, their speed on a TPU is unmeasured.

`pallas_kernels/tpu_tiles.py` says how a tensor is cut; the norm takes whole rows. Where 128 rows form a group, rows
beyond m are set to zero first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import GROUP
from pallas_kernels.producers import e5m6
from pallas_kernels.producers.reference import swiglu, swiglu_gradients
from pallas_kernels.quantized import Quantized, Scale, encode, largest_magnitude, scale_of, scales_shape
from pallas_kernels.tpu_tiles import (
    BLOCK_GROUPS,
    WIDTH,
    Interpret,
    call,
    grid_of,
    load_group,
    scale_rows,
    tile_specs,
    tile_types,
    transposed,
    transposed_specs,
    transposed_types,
    values_spec,
)


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale, interpret: Interpret = False) -> Quantized:
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
    kernel = call(body, (pl.cdiv(m, GROUP),), specs, out_specs, tile_types(m, k), interpret)
    return Quantized(*kernel(x, gain[None]), "tile")


def swiglu_quantize(hidden: Array, weight: Array | None, scale: Scale, interpret: Interpret = False) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]."""
    m, f = hidden.shape[0], hidden.shape[1] // 2

    def body(gate_ref, up_ref, *refs):
        *weight_ref, values_ref, scales_ref = refs
        factors = [ref[...] for ref in weight_ref]

        def activation(g):
            return swiglu(load_group(gate_ref, g), load_group(up_ref, g), *factors)

        scales_ref[...] = _rows(activation, BLOCK_GROUPS, scale, m, values_ref)

    inputs, specs = _swiglu_inputs(hidden, weight)
    kernel = call(body, grid_of(m, f), specs, tile_specs(), tile_types(m, f), interpret)
    return Quantized(*kernel(*inputs), "tile")


def swiglu_backward_quantize(
    hidden: Array, grad: Array, weight: Array | None, scale: Scale, interpret: Interpret = False
) -> tuple[Quantized, Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles and transposed, the output transposed, and the weight's gradient.

    The shapes are [m, 2f], [2f, pad128(m)], [f, pad128(m)] and [m].

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
            swiglu_gradients(load_group(gate_ref, g), load_group(up_ref, g), load_group(grad_ref, g), factor)
            for g in range(BLOCK_GROUPS)
        ]
        for half, (values_ref, scales_ref, values_t_ref, scales_t_ref) in enumerate((outputs[:4], outputs[4:])):
            x = [_inside(gradient[half], m) for gradient in gradients]
            scales_ref[...] = _rows(x.__getitem__, BLOCK_GROUPS, scale, m, values_ref)
            _columns(x, scale, values_t_ref, scales_t_ref)
        activations = (swiglu(load_group(gate_ref, g), load_group(up_ref, g), factor) for g in range(BLOCK_GROUPS))
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
    specs = [gate_spec, up_spec, values_spec(), *weight_specs]
    column = pl.BlockSpec((GROUP, 1), lambda i, j: (i, 0))
    half_types = [*tile_types(m, f), *transposed_types(m, f)]
    half_specs = [*tile_specs(), *transposed_specs()]
    out_types = [*half_types * 2, *transposed_types(m, f), *[jax.ShapeDtypeStruct((m, 1), jnp.float32)] * weighted]
    out_specs = [*half_specs * 2, *transposed_specs(), *[column] * weighted]
    kernel = call(body, grid_of(m, f), specs, out_specs, out_types, interpret)
    *results, sums = [*kernel(gate, up, grad, *weights), *([] if weighted else [None])]
    axes = (1, 0, 0, 2)
    joined = [jnp.concatenate(pair, axis) for *pair, axis in zip(results[:4], results[4:8], axes, strict=True)]
    return (
        Quantized(*joined[:2], "tile"),
        transposed(*joined[2:]),
        transposed(*results[8:]),
        None if sums is None else sums[:, 0],
    )


def e5m6_pack(x: Array, interpret: Interpret = False) -> tuple[Array, Array]:
    """Return x [m, k] as uint8 [m, k * 3 // 2] and FP32 scales [k / 128, pad4(m)]."""
    m, k = x.shape

    def body(x_ref, packed_ref, scales_ref):
        def pack(g):
            codes = load_group(x_ref, g)
            scales = e5m6.scale_of(largest_magnitude(codes, axis=1, keepdims=True))
            codes = e5m6.encode(codes * (1.0 / scales))
            return scales, jnp.concatenate(e5m6.pack(codes[:, : e5m6.HALF], codes[:, e5m6.HALF :]), axis=1)

        scales, planes = zip(*(pack(g) for g in range(BLOCK_GROUPS)), strict=True)
        packed_ref[...] = jnp.concatenate(planes, axis=1).astype(jnp.uint8)
        scales_ref[...] = scale_rows(scales, m)

    packed_width = k // GROUP * e5m6.TILE_BYTES
    shapes = [
        jax.ShapeDtypeStruct((m, packed_width), jnp.uint8),
        jax.ShapeDtypeStruct(scales_shape(x.shape, "tile"), jnp.float32),
    ]
    packed_spec = pl.BlockSpec((GROUP, BLOCK_GROUPS * e5m6.TILE_BYTES), lambda i, j: (i, j))
    x_spec, scales_spec = tile_specs()
    return tuple(call(body, grid_of(m, k), [x_spec], [packed_spec, scales_spec], shapes, interpret)(x))


def e5m6_unpack(packed: Array, scales: Array, m: int, dtype: jnp.dtype, interpret: Interpret = False) -> Array:
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
    x_spec, scales_spec = tile_specs()
    out_types = [jax.ShapeDtypeStruct((m, k), dtype)]
    return call(body, grid_of(m, k), [packed_spec, scales_spec], [x_spec], out_types, interpret)(packed, scales)[0]


def _swiglu_inputs(hidden: Array, weight: Array | None) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Gate, up and the weight as a column. The halves are blocks of `hidden` itself, unless a block would span both."""
    m, f = hidden.shape[0], hidden.shape[1] // 2
    whole = f % WIDTH == 0
    halves = [hidden, hidden] if whole else jnp.split(hidden, 2, axis=1)
    first_of_up = f // WIDTH if whole else 0
    specs = [values_spec(), pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j + first_of_up))]
    if weight is None:
        return halves, specs
    return [*halves, weight.reshape(m, 1)], [*specs, pl.BlockSpec((GROUP, 1), lambda i, j: (i, 0))]


def _inside(x: Array, m: int) -> Array:
    """Zero the rows of a block that are beyond m."""
    return jnp.where(pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, x.shape, 0) < m, x, 0.0)


def _rows(group: Callable[[int], Array], count: int, scale: Scale, m: int, values_ref, first: int = 0) -> Array:
    """Quantise the rows of `count` groups of a block into `values_ref` from group `first` on.

    Return the scales [count, 128].
    """
    columns = []
    for g in range(count):
        x = group(g)
        columns.append(scale_of(largest_magnitude(x, axis=1, keepdims=True), scale))
        values_ref[:, pl.ds((first + g) * GROUP, GROUP)] = encode(x, columns[-1])
    return scale_rows(columns, m)


def _columns(groups: list[Array], scale: Scale, values_t_ref, scales_t_ref) -> None:
    """Quantise the columns of a block, given as groups [128, 128], into the transposed block."""
    for g, x in enumerate(groups):
        at, x_t = pl.ds(g * GROUP, GROUP), x.T
        values_t_ref[at] = encode(x_t, scale_of(largest_magnitude(x_t, axis=1, keepdims=True), scale))
        scales_t_ref[0, :, at] = scale_of(largest_magnitude(x, axis=0, keepdims=True), scale)
