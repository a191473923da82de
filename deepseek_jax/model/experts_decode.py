"""The routed experts' FFN for the few tokens of a decoding step: no slots, no exchange, weights read once.

That holds while an expert's rows are one visit of the kernels: 88 of them in BF16, 48 in FP8 (`experts_decode.hopper`).

This device's tokens meet the experts that live here. On a mesh every device calls it with all the tokens of the devices
that share its experts, counts experts from its own first one, so that those of others are out of range, and the results
are summed over the devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.precision import DISPATCH, transposed
from deepseek_jax.parameters import Fp8Weight
from pallas_kernels.experts_decode import experts_decode
from pallas_kernels.experts_decode.plan import Dense
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized

# Tokens. With more the experts that every token has are products of their own in BF16. Among the others one of them
# takes 7 of 72 visits for 512 tokens, and makes the work of the kernels five turns of all multiprocessors, not four.
MOST_BESIDE = 128


def expert_decode(
    h_TD: jax.Array,
    experts_TK: jax.Array,
    gates_TK: jax.Array,
    weights: dict[str, Any],
    *,
    dense: Dense | None = None,
    rows: Quantized | None = None,
    everybody: int = 0,
) -> jax.Array:
    """Return FP32 parts [., T, D], whose sum are the gated sums of the experts that are here (DeepSeek-V3 eq. 12).

    Args:
        h_TD: normed rows.
        experts_TK: int32; values outside [0, E) are no expert: padding, or another device's.
        gates_TK: FP32.
        weights: "gate_up_ED2F" and "down_EFD", arrays or `Fp8Weight`s.
        dense: what the routing has made of experts and gates.
        rows: `h_TD` in tiles with the scale `DISPATCH`, where there are any; read with weights in FP8.
        everybody: how many of the experts, the last ones, every token has.
    """
    gate_up, down = (_blocks(weights[name]) for name in ("gate_up_ED2F", "down_EFD"))
    if isinstance(gate_up, Quantized):
        operand = quantize_tiles(h_TD, scale=DISPATCH) if rows is None else rows
    else:
        operand, gate_up = h_TD, gate_up.reshape(*gate_up.shape[:-2], -1)
    if everybody and len(h_TD) > MOST_BESIDE and not isinstance(gate_up, Quantized):
        experts_TK, gates_TK = experts_TK[:, :-everybody], gates_TK[:, :-everybody]
        parts_XTD = experts_decode(operand, experts_TK, gates_TK, gate_up, down, parts=True, dense=dense)
        return (parts_XTD.sum(0) + _of_everybody(h_TD, gate_up[-everybody:], down[-everybody:]))[None]
    return experts_decode(operand, experts_TK, gates_TK, gate_up, down, parts=True, everybody=everybody, dense=dense)


def _of_everybody(h_TD: jax.Array, gate_up_ED2F: jax.Array, down_EFD: jax.Array) -> jax.Array:
    """Return the sums of experts that every token has, in FP32; activations are rounded as in the kernels."""
    y_TD = jnp.zeros(h_TD.shape, jnp.float32)
    for gate_up_D2F, down_FD in zip(gate_up_ED2F, down_EFD, strict=True):
        gate_TF, up_TF = jnp.split(jnp.matmul(h_TD, gate_up_D2F, preferred_element_type=jnp.float32), 2, axis=1)
        act_TF = (jax.nn.silu(gate_TF) * up_TF).astype(h_TD.dtype)
        y_TD += jnp.matmul(act_TF, down_FD, preferred_element_type=jnp.float32)
    return y_TD


def _blocks(weight: Any) -> Any:
    if not isinstance(weight, Fp8Weight):
        return weight
    values = weight.values
    if values.ndim > weight.scales.ndim:  # gate and up side by side
        values = values.reshape(*values.shape[:-2], -1)
    return transposed(values, weight.scales)
