"""What the benchmark runs: every public operation with its shapes and random operands.

A new benchmark is one line of `operations`.

Operands are what `quantize_*` emits from normal data: speed depends on the bits (products of zeros draw less power, so
clocks stay high).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP, grouped, matmul, producers, quantize
from pallas_kernels.bench.operation import Operation
from pallas_kernels.bench.shapes import (
    ATTENTION_ROWS,
    DENSE,
    DENSE_GRADIENTS,
    FEW_TILES,
    FFN_ROWS,
    GRADIENTS,
    GROUPED,
    LINEAR,
    MASKED,
    MODEL_ROWS,
    NORM_ROWS,
    WEIGHTS,
    Dense,
    Gradients,
    Grouped,
    Linear,
    Masked,
    Rows,
    Weights,
    draw_dense,
)
from pallas_kernels.quantized import Quantized

NORM_EPS = 1e-6


# Random operands, one function per kind of shape.


def _normal(key: Array, *shape: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Array:
    return jax.random.normal(key, shape, dtype)


def _dense(key: Array, shape: Dense) -> tuple:
    a, b = jax.random.split(key)
    return quantize.quantize_tiles(_normal(a, shape.m, shape.k)), quantize.quantize_blocks(_normal(b, shape.n, shape.k))


def _dense_gradient(key: Array, shape: Dense) -> tuple:
    a, b, c = jax.random.split(key, 3)
    factors = (quantize.quantize_tiles(_normal(key, size, shape.k)) for key, size in ((a, shape.m), (b, shape.n)))
    return (*factors, _normal(c, shape.m, shape.n, dtype=jnp.float32))


def _grouped(key: Array, shape: Grouped) -> tuple:
    a, b, sizes = _grouped_bf16(key, shape)
    return quantize.quantize_tiles(a), quantize.quantize_blocks(b), sizes


def _grouped_bf16(key: Array, shape: Grouped) -> tuple:
    a, b = jax.random.split(key)
    rows = shape.groups * shape.rows
    return _normal(a, rows, shape.k), _normal(b, shape.groups, shape.n, shape.k), jnp.asarray(shape.sizes)


def _masked(key: Array, shape: Masked) -> tuple:
    a, b = jax.random.split(key)
    tiles = quantize.quantize_tiles(_normal(a, shape.experts * shape.room, shape.k))
    values = tiles.values.reshape(shape.experts, shape.room, shape.k)
    scales = tiles.scales.reshape(shape.k // GROUP, shape.experts, shape.room).swapaxes(0, 1)
    return (
        Quantized(values, scales, "tile"),
        quantize.quantize_blocks(_normal(b, shape.experts, shape.n, shape.k)),
        jnp.asarray(shape.sizes),
    )


def _gradients(key: Array, shape: Gradients) -> tuple:
    a, b, sizes, c = _gradients_bf16(key, shape)
    return quantize.quantize_tiles(a.T), quantize.quantize_tiles(b.T), sizes, c


def _gradients_bf16(key: Array, shape: Gradients) -> tuple:
    a, b, c = jax.random.split(key, 3)
    total = _normal(c, shape.groups, shape.m, shape.n, dtype=jnp.float32)
    return _normal(a, shape.rows, shape.m), _normal(b, shape.rows, shape.n), jnp.asarray(shape.sizes), total


def _without_c(operands: Callable[[Array, Any], tuple]) -> Callable[[Array, Any], tuple]:
    """The operands of a gradient that begins at zero."""
    return lambda key, shape: operands(key, shape)[:-1]


def _rows(key: Array, shape: Rows) -> tuple:
    return (_normal(key, shape.m, shape.k),)


def _permutation(key: Array, shape: Rows) -> tuple:
    return _normal(key, shape.m, shape.k), jax.random.permutation(key, shape.m).astype(jnp.int32)


def _tiles(key: Array, shape: Rows) -> tuple:
    return (quantize.quantize_tiles(_normal(key, shape.m, shape.k)),)


def _weights(key: Array, shape: Weights) -> tuple:
    lead = (shape.groups,) if shape.groups > 1 else ()
    return (_normal(key, *lead, shape.n, shape.k, dtype=jnp.float32),)


def _norm(key: Array, shape: Rows) -> tuple:
    return _normal(key, shape.m, shape.k), jnp.ones(shape.k, jnp.float32)


def _swiglu(key: Array, shape: Rows) -> tuple:
    hidden, weight = jax.random.split(key)
    return _normal(hidden, shape.m, 2 * shape.k), jax.random.uniform(weight, (shape.m,))


def _swiglu_backward(key: Array, shape: Rows) -> tuple:
    hidden, weight = _swiglu(key, shape)
    return hidden, _normal(jax.random.fold_in(key, 1), shape.m, shape.k), weight


def _packed(key: Array, shape: Rows) -> tuple:
    return producers.e5m6_pack(_normal(key, shape.m, shape.k))


def _linear(key: Array, shape: Linear) -> tuple:
    x, dy, w, dw = _linear_bf16(key, shape)
    return x, dy, quantize.quantize_blocks(w), quantize.quantize_blocks(w.T), dw


def _linear_bf16(key: Array, shape: Linear) -> tuple:
    x, dy, w = (
        _normal(jax.random.fold_in(key, i), *dims) for i, dims in enumerate([(shape.m, shape.k), shape[:2], shape[1:]])
    )
    return x, dy, w, jnp.zeros((shape.n, shape.k), jnp.float32)


# Calls that are not one public function on its operands.


def _rms_norm_quantize(x: Array, gain: Array, **how: Any) -> Quantized:
    return producers.rms_norm_quantize(x, gain, NORM_EPS, **how)


def _e5m6_unpack(packed: Array, scales: Array, **how: Any) -> Array:
    return producers.e5m6_unpack(packed, scales, m=packed.shape[0], **how)


def linear(
    x: Array, dy: Array, w: Quantized, w_transposed: Quantized, dw: Array, **how: Any
) -> tuple[Array, Array, Array]:
    """Return y, dx and dw of a linear layer from BF16 `x` [m, k] and `dy` [m, n].

    Weights are given in FP8: they are quantised once per optimizer step.
    """
    x_tiles, x_columns = quantize.quantize_tiles_both(x, **how)
    dy_tiles, dy_columns = quantize.quantize_tiles_both(dy, **how)
    y, dx = matmul.matmul(x_tiles, w, **how), matmul.matmul(dy_tiles, w_transposed, **how)
    return y, dx, matmul.matmul_accumulate(dy_columns, x_columns, dw, **how)


def linear_with_weights(x: Array, dy: Array, w: Array, dw: Array, **how: Any) -> tuple[Array, Array, Array]:
    """Return what `linear` does from BF16 weights, quantised both ways for this call alone."""
    return linear(x, dy, quantize.quantize_blocks(w, **how), quantize.quantize_blocks(w.T, **how), dw, **how)


def operations(seed: int) -> list[Operation]:
    """Return all benchmarks; `seed` draws the shapes of "matmul_drawn"."""
    fp32 = {"out_dtype": jnp.float32}
    drawn, dense_gradients = dict.fromkeys(draw_dense(seed)), {**DENSE_GRADIENTS, **FEW_TILES}
    accumulate_bf16, gradients_bf16 = grouped.grouped_matmul_accumulate_bf16, dict.fromkeys(GRADIENTS)
    return [
        Operation("matmul", matmul.matmul, DENSE, _dense, exact=fp32),
        Operation("matmul_drawn", matmul.matmul, drawn, _dense, exact=fp32),
        Operation("matmul_accumulate", matmul.matmul_accumulate, dense_gradients, _dense_gradient, accumulates=True),
        Operation("matmul_gradient", matmul.matmul_accumulate, dense_gradients, _without_c(_dense_gradient)),
        Operation("grouped_matmul", grouped.grouped_matmul, GROUPED, _grouped, exact=fp32),
        Operation("masked_matmul", grouped.masked_matmul, MASKED, _masked, exact=fp32, hint="expected_rows"),
        Operation(
            "grouped_matmul_accumulate", grouped.grouped_matmul_accumulate, GRADIENTS, _gradients, accumulates=True
        ),
        Operation(
            "grouped_matmul_gradient",
            grouped.grouped_matmul_accumulate,
            dict.fromkeys(GRADIENTS),
            _without_c(_gradients),
        ),
        Operation(
            "grouped_matmul_bf16",
            grouped.grouped_matmul_bf16,
            dict.fromkeys(GROUPED),
            _grouped_bf16,
            "bf16",
            exact=fp32,
        ),
        Operation(
            "grouped_matmul_accumulate_bf16", accumulate_bf16, gradients_bf16, _gradients_bf16, "bf16", accumulates=True
        ),
        Operation("grouped_matmul_gradient_bf16", accumulate_bf16, gradients_bf16, _without_c(_gradients_bf16), "bf16"),
        Operation("linear", linear, LINEAR, _linear, accumulates=True),
        Operation("linear_with_weights", linear_with_weights, LINEAR, _linear_bf16, accumulates=True),
        Operation("quantize_tiles", quantize.quantize_tiles, MODEL_ROWS, _rows),
        Operation("quantize_tiles_both", quantize.quantize_tiles_both, MODEL_ROWS, _rows),
        Operation("quantize_rows", quantize.quantize_rows, MODEL_ROWS, _permutation),
        Operation("requantize_transposed", quantize.requantize_transposed, MODEL_ROWS, _tiles),
        Operation("quantize_blocks", quantize.quantize_blocks, WEIGHTS, _weights),
        Operation("rms_norm_quantize", _rms_norm_quantize, NORM_ROWS, _norm),
        Operation("swiglu_quantize", producers.swiglu_quantize, FFN_ROWS, _swiglu),
        Operation("swiglu_backward_quantize", producers.swiglu_backward_quantize, FFN_ROWS, _swiglu_backward),
        Operation("e5m6_pack", producers.e5m6_pack, ATTENTION_ROWS, _rows),
        Operation("e5m6_unpack", _e5m6_unpack, ATTENTION_ROWS, _packed),
    ]
