"""A linear layer in the precision of its weight: one product, or DeepSeek-V3's three in FP8 (section 3.3.1, figure 6).

    forward           y = x W         x in tiles [T, in], W^T in blocks [out, in]                                           BF16
    input gradient    dx = dy W^T     dy in tiles [T, out], W in blocks [in, out]                                           BF16
    weight gradient   dW = x^T dy     both in tiles of 128 tokens: x regrouped from what was kept, dy quantised once more   FP32

The kernels sum over the last dim of both operands, so W is transposed for the forward product: blocks are square, and no number changes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.precision import HIDDEN, Fp8Weight, Input, as_stored, transposed
from deepseek_jax.parallel.mesh import vary
from pallas_kernels.matmul import matmul, matmul_accumulate
from pallas_kernels.producers import e5m6_pack, e5m6_unpack
from pallas_kernels.quantize import quantize_tiles, quantize_tiles_both, requantize_transposed
from pallas_kernels.quantized import GROUP


def linear(x: jax.Array, weight: jax.Array | Fp8Weight, input_dims: int = 1, recipe: Input = HIDDEN) -> jax.Array:
    """Return x W.

    Args:
        x: [..., *in], BF16 if the weight is in FP8.
        weight: [*in, *out].
        input_dims: how many dims `in` has.
        recipe: how FP8 treats x.

    Returns:
        [..., *out] in the dtype of `x`.
    """
    if not isinstance(weight, Fp8Weight):
        last = tuple(range(x.ndim - input_dims, x.ndim))
        return lax.dot_general(x, weight, ((last, tuple(range(input_dims))), ((), ())))
    rows, out = x.shape[: x.ndim - input_dims], weight.values.shape[input_dims:]
    matrix = math.prod(x.shape[x.ndim - input_dims :]), math.prod(out)
    carrier, values = weight.carrier.reshape(matrix), weight.values.reshape(matrix)
    return _linear(recipe, x.reshape(-1, matrix[0]), carrier, values, weight.scales).reshape(*rows, *out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(recipe, x_TI, carrier_IO, values_IO, scales):
    return _forward(recipe, x_TI, carrier_IO, values_IO, scales)[0]


def _forward(recipe, x_TI, carrier_IO, values_IO, scales):
    tiles = quantize_tiles(x_TI, scale=recipe.scale)
    y_TO = matmul(tiles, transposed(values_IO, scales))
    return y_TO, (e5m6_pack(x_TI) if recipe.kept == "e5m6" else tiles, values_IO, scales)


def _backward(recipe, residuals, g_TO):
    kept, values_IO, scales = residuals
    (num_inputs, num_outputs), num_rows = values_IO.shape, g_TO.shape[0]
    g_tiles, g_columns = quantize_tiles_both(jnp.pad(g_TO, ((0, 0), (0, -num_outputs % GROUP))))
    dx_TI = matmul(g_tiles, as_stored(values_IO, scales))
    if recipe.kept == "e5m6":
        _, x_columns = quantize_tiles_both(e5m6_unpack(*kept, m=num_rows), scale=recipe.scale)
    else:
        x_columns = requantize_transposed(kept, scale=recipe.scale)
    zeros = vary(jnp.zeros((num_inputs, g_columns.shape[0])), g_TO)
    return dx_TI, matmul_accumulate(x_columns, g_columns, zeros)[:, :num_outputs], None, None


_linear.defvjp(_forward, _backward)
