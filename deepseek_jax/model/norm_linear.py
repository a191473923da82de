"""RMSNorm and the linear layers that read it: in FP8 one pass norms and quantises, with no copy in BF16 between.

Several layers of one norm (attention's two down-projections) share its tiles. Their backward pass is one product: their
gradients stand side by side, and so do their weights, so the product sums the layers' gradients by the norm in FP32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.adapters import Adapted, base_of
from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.linear import linear, low_rank
from deepseek_jax.model.precision import as_stored, transposed
from deepseek_jax.parameters import CastWeight, Fp8Weight
from pallas_kernels import GROUP
from pallas_kernels.matmul import matmul, matmul_accumulate
from pallas_kernels.producers import rms_norm_quantize
from pallas_kernels.quantize import quantize_tiles_both, requantize_transposed
from pallas_kernels.quantized import Quantized


def norm_linear(
    x: jax.Array, gain_D: jax.Array, eps: float, *weights: jax.Array | CastWeight | Fp8Weight | Adapted
) -> tuple[jax.Array, ...]:
    """Return rms_norm(x) W for each W.

    Args:
        x: [..., D], BF16 if the weights are in FP8.
        gain_D: FP32 gain of the norm.
        eps: added to the mean square.
        weights: [D, *out] each, all of one precision.

    Returns:
        one [..., *out] per weight, in the dtype of `x`.
    """
    if not isinstance(base_of(weights[0]), Fp8Weight):
        h = rms_norm(x, gain_D, eps)
        return tuple(linear(h, weight) for weight in weights)
    if any(isinstance(weight, Adapted) for weight in weights):
        h = rms_norm(x, gain_D, eps)  # adapters read the norm in BF16
        results = norm_linear(x, gain_D, eps, *map(base_of, weights))
        return tuple(
            y + low_rank(h, weight) if isinstance(weight, Adapted) else y
            for y, weight in zip(results, weights, strict=True)
        )
    matrices = [_in_fp8(weight).as_matrix() for weight in weights]
    carriers = tuple(matrix.carrier for matrix in matrices)
    quantized = tuple((matrix.values, matrix.scales) for matrix in matrices)
    results = _norm_linear(eps, x.reshape(-1, x.shape[-1]), gain_D.astype(jnp.float32), carriers, quantized)
    return tuple(y.reshape(*x.shape[:-1], *weight.values.shape[1:]) for y, weight in zip(results, weights, strict=True))


def _in_fp8(weight: jax.Array | CastWeight | Fp8Weight | Adapted) -> Fp8Weight:
    if not isinstance(weight, Fp8Weight):
        raise ValueError(
            f"a weight is {type(weight).__name__} beside others in FP8; weights of one norm need one precision:"
            " quantise all of them, or none"
        )
    return weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_linear(eps, x_TD, gain_D, carriers, weights):
    return _forward(eps, x_TD, gain_D, carriers, weights)[0]


def _forward(eps, x_TD, gain_D, carriers, weights):
    tiles = rms_norm_quantize(x_TD, gain_D, eps)
    return tuple(matmul(tiles, transposed(*weight)) for weight in weights), (x_TD, gain_D, tiles, weights)


def _backward(eps, residuals, grads):
    x_TD, gain_D, tiles, weights = residuals
    sizes = [g.shape[1] for g in grads]
    padded = [size + -size % GROUP for size in sizes]
    g_TO = jnp.concatenate([jnp.pad(g, ((0, 0), (0, -g.shape[1] % GROUP))) for g in grads], axis=1)
    g_tiles, g_columns = quantize_tiles_both(g_TO)
    stored = [as_stored(*weight) for weight in weights]
    values, scales = (
        jnp.concatenate(parts, axis=1) for parts in zip(*((w.values, w.scales) for w in stored), strict=True)
    )
    _, pull = jax.vjp(lambda x, gain: rms_norm(x, gain, eps), x_TD, gain_D)
    dx_TD, dgain_D = pull(matmul(g_tiles, Quantized(values, scales, "block")))
    parts = lax.split(matmul_accumulate(requantize_transposed(tiles), g_columns), padded, axis=1)
    return dx_TD, dgain_D, tuple(dw[:, :size] for dw, size in zip(parts, sizes, strict=True)), None


_norm_linear.defvjp(_forward, _backward)
