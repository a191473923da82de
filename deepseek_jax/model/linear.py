"""Linear layers in the precision of their weights: one product, or DeepSeek-V3's three in FP8 (section 3.3.1, fig. 6).

    forward           y = x W         x in tiles [T, in], W^T in blocks [out, in]                       BF16
    input gradient    dx = dy W^T     dy in tiles [T, out], W in blocks [in, out]                       BF16
    weight gradient   dW = x^T dy     both in tiles of 128 tokens: x regrouped from what was kept,     FP32
                                      dy quantised once more

The kernels sum over the last dim of both operands, so W is transposed for the forward product. Blocks are square, so
this changes no number. In names here, I stands for in and O for out.

In BF16 the same three products are XLA's. Written out, the weight gradient stays in FP32, in which it is summed.

Two layers with a SwiGLU between them are one function with one derivative. What stands between their products is
quantised as it is computed, in both groupings; in BF16 there is only the input of the SwiGLU.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.adapters import Adapted, base_of, halves, shape_of
from deepseek_jax.model.precision import HIDDEN, Input, Packed, as_stored, transposed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parameters import CastWeight, Fp8Weight
from pallas_kernels import GROUP
from pallas_kernels.matmul import matmul, matmul_accumulate
from pallas_kernels.producers import swiglu_backward_quantize, swiglu_quantize
from pallas_kernels.quantize import quantize_tiles, quantize_tiles_both, requantize_transposed


def linear(
    x: jax.Array,
    weight: jax.Array | CastWeight | Fp8Weight | Adapted,
    input_dims: int = 1,
    recipe: Input = HIDDEN,
    packed: Packed | None = None,
) -> jax.Array:
    """Return x W.

    Args:
        x: [..., *in], BF16 if the weight is in FP8.
        weight: [*in, *out].
        input_dims: how many dims `in` has.
        recipe: how x is quantised if the weight is in FP8.
        packed: x in E5M6 if something else keeps it in that form, too, and the recipe asks for it.

    Returns:
        [..., *out] in the dtype of `x`.
    """
    if isinstance(weight, Adapted):
        return linear(x, weight.base, input_dims, recipe, packed) + low_rank(x, weight, input_dims)
    if isinstance(weight, CastWeight):
        return _cast_linear(input_dims, x, weight.carrier, weight.values)
    if not isinstance(weight, Fp8Weight):
        last = tuple(range(x.ndim - input_dims, x.ndim))
        return lax.dot_general(x, weight, ((last, tuple(range(input_dims))), ((), ())))
    rows, out = x.shape[: x.ndim - input_dims], weight.values.shape[input_dims:]
    matrix = weight.as_matrix(input_dims)
    x_TI = x.reshape(math.prod(rows), -1)
    return _linear(recipe, x_TI, matrix.carrier, (matrix.values, matrix.scales), packed).reshape(*rows, *out)


def low_rank(x: jax.Array, weight: Adapted, input_dims: int = 1) -> jax.Array:
    """Return what an adapter adds to x W: scale (x A) B, multiplied in the dtype of `x`, gradients of A and B in FP32.

    Args:
        x: [..., *in].
        weight: [*in, *out], with its pair.
        input_dims: how many dims `in` has.
    """
    rows = x.shape[: x.ndim - input_dims]
    a_IU, b_UO = (CastWeight(w, lax.stop_gradient(w).astype(x.dtype)) for w in halves(weight))
    y_TO = linear(linear(x.reshape(math.prod(rows), -1), a_IU), b_UO) * weight.scale
    return y_TO.reshape(*rows, *shape_of(weight)[input_dims:])


def swiglu_linear(x: jax.Array, gate_up_D2F: Fp8Weight | Adapted, down_FD: Fp8Weight | Adapted) -> jax.Array:
    """Return down(silu(x gate) * (x up)) with both weights in FP8.

    Args:
        x: [..., D], BF16.
        gate_up_D2F: gate first; D and F are multiples of 128.
        down_FD: the projection back.

    Returns:
        BF16 [..., D].
    """
    if isinstance(gate_up_D2F, Adapted) or isinstance(down_FD, Adapted):
        return _adapted_swiglu_linear(x, gate_up_D2F, down_FD)
    gate_up, down = gate_up_D2F.as_matrix(), down_FD.as_matrix()
    weights = (gate_up.values, gate_up.scales), (down.values, down.scales)
    return _swiglu_linear(x.reshape(-1, x.shape[-1]), gate_up.carrier, down.carrier, *weights).reshape(x.shape)


def _adapted_swiglu_linear(x, gate_up_D2F, down_FD):
    """Do as `swiglu_linear` with frozen weights; the same numbers as that where adapters are zero."""
    hidden_TH = keep(linear(x, gate_up_D2F).reshape(math.prod(x.shape[:-1]), -1), "ffn_hidden")
    base = base_of(down_FD).as_matrix()
    y_TD = _frozen_down(hidden_TH, (base.values, base.scales))
    if isinstance(down_FD, Adapted):
        y_TD += low_rank(_act(hidden_TH), down_FD)
    return y_TD.reshape(x.shape)


def _act(hidden_TH: jax.Array) -> jax.Array:
    gate_TF, up_TF = jnp.split(hidden_TH.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate_TF) * up_TF).astype(hidden_TH.dtype)


@jax.custom_vjp
def _frozen_down(hidden_TH, down):
    return matmul(swiglu_quantize(hidden_TH), transposed(*down))


def _frozen_down_backward(residuals, g_TD):
    hidden_TH, down = residuals
    _, pull = jax.vjp(_act, hidden_TH)
    return *pull(matmul(quantize_tiles(g_TD), as_stored(*down))), None


_frozen_down.defvjp(lambda hidden_TH, down: (_frozen_down(hidden_TH, down), (hidden_TH, down)), _frozen_down_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cast_linear(input_dims, x, carrier, values):
    last = tuple(range(x.ndim - input_dims, x.ndim))
    return lax.dot_general(x, values, ((last, tuple(range(input_dims))), ((), ())))


def _cast_backward(input_dims, residuals, g):
    x, values = residuals
    num_inputs = math.prod(values.shape[:input_dims])
    g_TO = g.reshape(-1, values.size // num_inputs)
    dx_TI = g_TO @ values.reshape(num_inputs, -1).T
    dw_IO = jnp.matmul(x.reshape(-1, num_inputs).T, g_TO, preferred_element_type=jnp.float32)
    return dx_TI.reshape(x.shape), dw_IO.reshape(values.shape), None


_cast_linear.defvjp(
    lambda dims, x, carrier, values: (_cast_linear(dims, x, carrier, values), (x, values)), _cast_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(recipe, x_TI, carrier_IO, weight, packed):
    return _forward(recipe, x_TI, carrier_IO, weight, packed)[0]


def _forward(recipe, x_TI, carrier_IO, weight, packed):
    tiles = quantize_tiles(x_TI, scale=recipe.scale)
    y_TO = matmul(tiles, transposed(*weight))
    if recipe.kept == "e5m6":
        return y_TO, (packed or Packed.of(x_TI, 1), weight)
    return y_TO, (tiles, weight)


def _backward(recipe, residuals, g_TO):
    kept, weight = residuals
    num_rows, num_outputs = g_TO.shape
    g_tiles, g_columns = quantize_tiles_both(jnp.pad(g_TO, ((0, 0), (0, -num_outputs % GROUP))))
    dx_TI = matmul(g_tiles, as_stored(*weight))
    if recipe.kept == "e5m6":
        x_TI = kept.unpack((num_rows, weight[0].shape[0]))
        _, x_columns = quantize_tiles_both(x_TI, scale=recipe.scale)
    else:
        x_columns = requantize_transposed(kept, scale=recipe.scale)
    return dx_TI, matmul_accumulate(x_columns, g_columns)[:, :num_outputs], None, None


_linear.defvjp(_forward, _backward)


@jax.custom_vjp
def _swiglu_linear(x_TD, gate_up_carrier, down_carrier, gate_up, down):
    return _swiglu_forward(x_TD, gate_up_carrier, down_carrier, gate_up, down)[0]


def _swiglu_forward(x_TD, gate_up_carrier, down_carrier, gate_up, down):
    tiles = quantize_tiles(x_TD)
    hidden_TH = keep(matmul(tiles, transposed(*gate_up)), "ffn_hidden")
    return matmul(swiglu_quantize(hidden_TH), transposed(*down)), (tiles, hidden_TH, gate_up, down)


def _swiglu_backward(residuals, g_TD):
    tiles, hidden_TH, gate_up, down = residuals
    g_tiles, g_columns = quantize_tiles_both(g_TD)
    dhidden, dhidden_columns, act_columns, _ = swiglu_backward_quantize(hidden_TH, matmul(g_tiles, as_stored(*down)))
    dgate_up = matmul_accumulate(requantize_transposed(tiles), dhidden_columns)
    return matmul(dhidden, as_stored(*gate_up)), dgate_up, matmul_accumulate(act_columns, g_columns), None, None


_swiglu_linear.defvjp(_swiglu_forward, _swiglu_backward)
