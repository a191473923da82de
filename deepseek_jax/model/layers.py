"""The small parts of every layer: parameters, RMSNorm, and the dense SwiGLU feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.adapters import base_of
from deepseek_jax.config import Model
from deepseek_jax.model.linear import linear, swiglu_linear
from deepseek_jax.model.recompute import keep
from deepseek_jax.parameters import Fp8Weight, layout_of


def matrix(rngs: nnx.Rngs, name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Make a normally distributed FP32 weight; on an explicit mesh it is born in the layout of its name."""
    explicit = jax.sharding.get_abstract_mesh().are_all_axes_explicit
    born = layout_of(name, shape, num_experts=shape[0]) if explicit else None
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=born))


def gain(size: int) -> nnx.Param:
    """Make the gain of a norm: ones."""
    return nnx.Param(jnp.ones((size,), jnp.float32))


def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """Apply the root-mean-square norm over the last dim.

    Statistics and gain are FP32, with one cast back at the end; Hugging Face casts before the gain.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * gain_D).astype(x.dtype)


def silu_with_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return silu(x) and its derivative."""
    sigmoid = jax.nn.sigmoid(x)
    silu = x * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@jax.custom_vjp
def swiglu(hidden: jax.Array) -> jax.Array:
    """Return silu(gate) * up of pre-activations [..., 2, F] (gate first), in their dtype.

    The derivative is written out, because JAX's derivative of two slices is two padded arrays and their sum.
    """
    return jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]


def _swiglu_backward(hidden, g):
    gate, up = hidden[..., 0, :], hidden[..., 1, :]
    silu, slope = silu_with_slope(gate)
    return (jnp.stack([g * up * slope, g * silu], axis=-2),)


swiglu.defvjp(lambda hidden: (swiglu(hidden), hidden), _swiglu_backward)


def weighted_swiglu_backward(
    hidden_ZH: jax.Array, weight_Z1: jax.Array, dact_ZF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of hidden, in its dtype, and of the weights [Z] in act = silu(gate) * up * weight, in FP32.

    Args:
        hidden_ZH: pre-activations, gate first.
        weight_Z1: of each row, FP32.
        dact_ZF: the gradient of act, FP32.
    """
    gate, up = jnp.split(hidden_ZH.astype(jnp.float32), 2, axis=1)
    silu, slope = silu_with_slope(gate)
    dweight_Z = (dact_ZF * silu * up).sum(-1)
    dact_ZF = dact_ZF * weight_Z1
    return jnp.concatenate([dact_ZF * up * slope, dact_ZF * silu], axis=1).astype(hidden_ZH.dtype), dweight_Z


class FeedForward(nnx.Module):
    """down(silu(x gate) * (x up)): the shared expert, and with a norm in front the FFN of dense layers."""

    def __init__(self, hidden: int, model: Model, rngs: nnx.Rngs):
        self.gate_up_D2F = matrix(rngs, "gate_up_D2F", (model.width, 2, hidden), model.init_std)
        self.down_FD = matrix(rngs, "down_FD", (hidden, model.width), model.residual_std)

    @jax.named_scope("ffn")
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Map [B, S, D] to [B, S, D]."""
        gate_up, down = self.gate_up_D2F.get_value(), self.down_FD.get_value()
        if isinstance(base_of(gate_up), Fp8Weight):
            return swiglu_linear(x_BSD, gate_up, down)
        hidden = keep(linear(x_BSD, gate_up), "ffn_hidden")
        return linear(swiglu(hidden.astype(jnp.float32)).astype(x_BSD.dtype), down)


class DenseFeedForward(FeedForward):
    """The feed-forward half of a dense layer, norm included."""

    def __init__(self, hidden: int, model: Model, rngs: nnx.Rngs):
        super().__init__(hidden, model, rngs)
        self.norm_D = gain(model.width)
        self.eps = model.norm_eps

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """Normalise and map [B, S, D] to [B, S, D]; the caller adds the residual."""
        return super().__call__(rms_norm(x_BSD, self.norm_D[...], self.eps))

    def normed(self, h_BSD: jax.Array) -> jax.Array:
        """Map what the norm gave."""
        return super().__call__(h_BSD)
