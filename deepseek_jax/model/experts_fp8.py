"""The routed experts' FFN in FP8 (DeepSeek-V3 sections 3.3.1 to 3.3.3): six products over all rows.

The kernel that makes an operand also quantises it. Assignments are sorted by expert, and zeros fill each expert's rows
up to a multiple of 128 (`experts_blocks.plan_blocks`), so 128 rows that share a scale in a weight gradient belong to
one expert. There are Z rows in all, a static number; the last ones may belong to no expert. H = 2F: gate, then up.

    forward     x        rows read by slot, quantised on the way             powers of two
                hidden = x gate_up
                act      silu(gate) * up * weight of the assignment
                y      = act down, summed per token
    backward    dy       rows read by slot, quantised on the way             powers of two
                dact   = dy down^T
                dhidden, act recomputed, and the gradient of the weight: one pass
                dx     = dhidden gate_up^T, summed per token
                dgate_up = x^T dhidden, ddown = act^T dy                     FP32

What lives from forward to backward: x in E4M3, hidden in BF16.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts_blocks import Routing, plan_blocks
from deepseek_jax.model.precision import DISPATCH, as_stored, transposed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.rows import sum_rows
from deepseek_jax.parameters import Fp8Weight
from pallas_kernels import GROUP
from pallas_kernels.grouped import grouped_matmul, grouped_matmul_accumulate
from pallas_kernels.producers import swiglu_backward_quantize, swiglu_quantize
from pallas_kernels.quantize import quantize_rows, requantize_transposed


def expert_ffn_fp8(
    weights: dict[str, Fp8Weight], x_TD: jax.Array, gates_TK: jax.Array, experts_TK: jax.Array
) -> jax.Array:
    """Return the gated sum of each row's experts: sum over k of gate_k * down_k(silu(x gate_k) * (x up_k)) (V3 eq. 12).

    Args:
        weights: `gate_up_ED2F` and `down_EFD` of the experts that are here.
        x_TD: BF16 rows; D and F are multiples of 128.
        gates_TK: FP32 gate weights.
        experts_TK: int32 ids into the weights; other ids contribute zero.
    """
    gate_up, down = (weights[name].as_matrix(stacked=1) for name in ("gate_up_ED2F", "down_EFD"))
    num_experts = down.values.shape[0]
    with jax.named_scope("route"):
        blocks = keep(plan_blocks(experts_TK, num_experts, GROUP, 1), "routing")
    routing = Routing(blocks.source_Z, blocks.slots_TK, blocks.rows_E)
    with jax.named_scope("experts"):
        return _ffn(
            x_TD,
            gates_TK,
            gate_up.carrier,
            down.carrier,
            (gate_up.values, gate_up.scales),
            (down.values, down.scales),
            routing,
        )


@jax.custom_vjp
def _ffn(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up, down, routing):
    return _forward(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up, down, routing)[0]


def _read(x_TD, gates_TK, source_Z):
    """Return rows in slot order, quantised; empty slots are zeros."""
    rows_Z = jnp.where(source_Z < gates_TK.size, source_Z // gates_TK.shape[1], -1)
    return quantize_rows(x_TD, rows_Z, scale=DISPATCH)


def _forward(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up, down, routing):
    source_Z, slots_TK, rows_E = routing
    x_ZD = keep(_read(x_TD, gates_TK, source_Z), "expert_rows")
    hidden_ZH = keep(grouped_matmul(x_ZD, transposed(*gate_up), rows_E), "expert_hidden")
    weight_Z = jnp.take(gates_TK.reshape(-1), source_Z, mode="fill", fill_value=0)
    y_ZD = grouped_matmul(swiglu_quantize(hidden_ZH, weight_Z), transposed(*down), rows_E)
    return sum_rows(y_ZD, source_Z, slots_TK), (gates_TK, gate_up, down, routing, x_ZD, hidden_ZH, weight_Z)


def _backward(residuals, g_TD):
    gates_TK, gate_up, down, routing, x_ZD, hidden_ZH, weight_Z = residuals
    source_Z, slots_TK, rows_E = routing
    with jax.named_scope("experts"):
        dy_ZD = _read(g_TD, gates_TK, source_Z)
        dact_ZF = grouped_matmul(dy_ZD, as_stored(*down), rows_E)
        dhidden_ZH, dhidden_HZ, act_FZ, dweight_Z = swiglu_backward_quantize(hidden_ZH, dact_ZF, weight_Z)
        ddown = grouped_matmul_accumulate(act_FZ, requantize_transposed(dy_ZD, scale=DISPATCH), rows_E)
        dx_ZD = grouped_matmul(dhidden_ZH, as_stored(*gate_up), rows_E)
        dgate_up = grouped_matmul_accumulate(requantize_transposed(x_ZD, scale=DISPATCH), dhidden_HZ, rows_E)
        dgates_TK = jnp.take(dweight_Z, slots_TK, mode="fill", fill_value=0)
        return sum_rows(dx_ZD, source_Z, slots_TK), dgates_TK, dgate_up, ddown, None, None, None


_ffn.defvjp(_forward, _backward)
