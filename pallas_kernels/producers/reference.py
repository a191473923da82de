"""The fused producers in plain jnp: the specification of the kernels, and the arithmetic of one element that all faces share.

Where numbers are rounded on the way to E4M3:

    rms_norm_quantize           statistics, product with the gain: FP32; then BF16; then E4M3   (the numbers of norm, then quantise)
    swiglu_quantize             everything FP32; then E4M3
    swiglu_quantize_both        the same, twice from the same FP32 numbers: neither copy is made of the other
    swiglu_backward_quantize    everything FP32; then E4M3, twice

The kernels differ from this file where a machine's rsqrt and exp do: by the last bit of FP32, so that about one in 10^6 values lands on
the other side of a rounding boundary, one step of E4M3 away.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize.reference import quantize_tiles, quantize_tiles_both
from pallas_kernels.quantized import Quantized, Scale


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    return quantize_tiles(rms_norm(x, gain, eps), scale)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Return the root-mean-square norm of x [m, k] in FP32, rounded to BF16 after the gain."""
    x = x.astype(jnp.float32)
    return (x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps) * gain).astype(jnp.bfloat16)


def swiglu_quantize(hidden: Array, weight: Array | None, scale: Scale) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]."""
    return quantize_tiles(_swiglu(hidden, weight), scale)


def swiglu_quantize_both(hidden: Array, weight: Array | None, scale: Scale) -> tuple[Quantized, Quantized]:
    """Return the same in tiles [m, f], and transposed in tiles [f, pad128(m)]."""
    return quantize_tiles_both(_swiglu(hidden, weight), scale)


def swiglu_backward_quantize(hidden: Array, grad: Array, weight: Array | None, scale: Scale) -> tuple[Quantized, Quantized, Array | None]:
    """Return the gradient of hidden in tiles [m, 2f] and transposed in tiles [2f, pad128(m)], and that of the weight."""
    gate, up = _halves(hidden)
    grad_gate, grad_up, product = swiglu_gradients(gate, up, grad.astype(jnp.float32), _column(weight))
    rows, columns = quantize_tiles_both(jnp.concatenate([grad_gate, grad_up], axis=1), scale)
    return rows, columns, None if weight is None else product.sum(axis=1)


def swiglu(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """Return silu(gate) * up, times `weight` (of a shape that broadcasts). FP32 in and out, inside a kernel and outside."""
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
