"""The fused producers in plain jnp: what the kernels must compute, and the arithmetic that all faces share.

Where numbers are rounded on the way to E4M3:

    rms_norm_quantize           statistics, product with the gain: FP32; then BF16; then E4M3 (norm, then quantise)
    swiglu_quantize             everything FP32; then E4M3
    swiglu_backward_quantize    everything FP32; then E4M3, twice from the same numbers: neither copy is made of the
                                other

The rounding to BF16 is a `reduce_precision`: a cast to BF16 and back is one that XLA may leave out of a compiled
program.

The kernels differ from this file where a machine's rsqrt and exp do, by the last bits of FP32, and where they add in
another order: a value then lies one step of E4M3 away, a scale some units in the last place. Shares of all that differ
between the Hopper kernel and this file on one H200 (jax 0.11.2, 2026-11-24):

                                               values    scales    transposed values    scales
    rms_norm_quantize           (4096, 7168)   4.8e-7    0
    swiglu_quantize             (8192, 2048)   0         0.2%
    swiglu_backward_quantize    (8192, 2048)   5.4e-7    8.7%      4.2e-7               8.8%   weight's gradient: 81%

The gradients of the weight are sums of 2048 numbers, added in another order. `e5m6` and all of `quantize` are equal in
every bit.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize.reference import quantize_tiles, quantize_tiles_both
from pallas_kernels.quantized import Quantized, Scale

BF16 = jnp.finfo(jnp.bfloat16)


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    return quantize_tiles(rms_norm(x, gain, eps), scale)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Return the root-mean-square norm of x [m, k] in FP32, rounded to BF16 after the gain."""
    x = x.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps) * gain
    return lax.reduce_precision(normed, BF16.nexp, BF16.nmant).astype(jnp.bfloat16)


def swiglu_quantize(hidden: Array, weight: Array | None, scale: Scale) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]."""
    return quantize_tiles(_swiglu(hidden, weight), scale)


def swiglu_backward_quantize(
    hidden: Array, grad: Array, weight: Array | None, scale: Scale
) -> tuple[Quantized, Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles and transposed, the output transposed, and the weight's gradient.

    The shapes are [m, 2f], [2f, pad128(m)], [f, pad128(m)] and [m].
    """
    gate, up = _halves(hidden)
    grad_gate, grad_up, product = swiglu_gradients(gate, up, grad.astype(jnp.float32), _column(weight))
    rows, columns = quantize_tiles_both(jnp.concatenate([grad_gate, grad_up], axis=1), scale)
    _, activation_columns = quantize_tiles_both(swiglu(gate, up, _column(weight)), scale)
    return rows, columns, activation_columns, None if weight is None else product.sum(axis=1)


def swiglu(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """Return silu(gate) * up, times `weight` (of a shape that broadcasts).

    FP32 in and out, inside a kernel and outside.
    """
    product = gate * sigmoid(gate) * up
    return product if weight is None else product * weight


def swiglu_gradients(gate: Array, up: Array, grad: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Return the gradients of gate and up, and the elements whose sum along a row is the gradient of `weight`.

    FP32 in and out, inside a kernel and outside. `grad` is that of the weighted product.
    """
    gates = sigmoid(gate)
    silu = gate * gates
    weighted = grad if weight is None else grad * weight
    return weighted * up * (gates + silu * (1.0 - gates)), weighted * silu, grad * (silu * up)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), written out so that every face computes it alike."""
    return 1.0 / (1.0 + jnp.exp(-x))


def _swiglu(hidden: Array, weight: Array | None) -> Array:
    return swiglu(*_halves(hidden), _column(weight))


def _halves(hidden: Array) -> list[Array]:
    return jnp.split(hidden.astype(jnp.float32), 2, axis=1)


def _column(weight: Array | None) -> Array | None:
    return None if weight is None else weight[:, None]
