"""The routed experts' FFN in BF16 through grouped products, for GPUs that have the kernels.

It is `experts_fp8` without FP8. Rows lie in the order of `experts_blocks.plan_blocks`. Zeros fill each expert's rows up
to a multiple of 128, so no tile of a product belongs to two experts. Six products over all rows read the weights as
they are stored. The loop of `experts_blocks` gathers a weight per block and scatters its gradient; here neither moves.
H = 2F: gate, then up.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts_blocks import Routing, plan_blocks
from deepseek_jax.model.layers import silu_with_slope
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.rows import sum_rows
from deepseek_jax.parameters import CastWeight
from pallas_kernels import GROUP
from pallas_kernels.grouped import grouped_matmul_accumulate_bf16, grouped_matmul_bf16


def expert_ffn_grouped(
    weights: dict[str, jax.Array | CastWeight], x_TD: jax.Array, gates_TK: jax.Array, experts_TK: jax.Array
) -> jax.Array:
    """Return the gated sum of each row's experts: sum over k of gate_k * down_k(silu(x gate_k) * (x up_k)) (V3 eq. 12).

    Args:
        weights: BF16 `gate_up_ED2F` and `down_EFD` of the experts that are here.
        x_TD: BF16 rows.
        gates_TK: FP32 gate weights.
        experts_TK: int32 ids into the weights; other ids contribute zero.
    """
    gate_up, down = (CastWeight.of(weights[name]) for name in ("gate_up_ED2F", "down_EFD"))
    num_experts, hidden, width = down.values.shape
    with jax.named_scope("route"):
        blocks = keep(plan_blocks(experts_TK, num_experts, GROUP, 1), "routing")
    routing = Routing(blocks.source_Z, blocks.slots_TK, blocks.rows_E)
    with jax.named_scope("experts"):
        gate_up = jax.tree.map(lambda w: w.reshape(num_experts, width, 2 * hidden), gate_up)
        return _ffn(x_TD, gates_TK, gate_up.carrier, down.carrier, gate_up.values, down.values, routing)


@jax.custom_vjp
def _ffn(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up_EDH, down_EFD, routing):
    return _forward(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up_EDH, down_EFD, routing)[0]


def _read(x_TD, gates_TK, source_Z):
    """Return rows in slot order; empty slots are zeros."""
    return jnp.take(x_TD, source_Z // gates_TK.shape[1], axis=0, mode="fill", fill_value=0)


def _forward(x_TD, gates_TK, gate_up_carrier, down_carrier, gate_up_EDH, down_EFD, routing):
    source_Z, slots_TK, rows_E = routing
    x_ZD = keep(_read(x_TD, gates_TK, source_Z), "expert_rows")
    hidden_ZH = keep(grouped_matmul_bf16(x_ZD, gate_up_EDH, rows_E, transpose_b=True), "expert_hidden")
    weight_Z1 = jnp.take(gates_TK.reshape(-1), source_Z, mode="fill", fill_value=0)[:, None]
    act_ZF = _act(hidden_ZH, weight_Z1)
    y_ZD = grouped_matmul_bf16(act_ZF, down_EFD, rows_E, transpose_b=True)
    return sum_rows(y_ZD, source_Z, slots_TK), (gates_TK, gate_up_EDH, down_EFD, routing, x_ZD, hidden_ZH, weight_Z1)


def _halves(hidden_ZH):
    """Return gate and up in FP32."""
    return jnp.split(hidden_ZH.astype(jnp.float32), 2, axis=1)


def _act(hidden_ZH, weight_Z1):
    gate, up = _halves(hidden_ZH)
    return (jax.nn.silu(gate) * up * weight_Z1).astype(hidden_ZH.dtype)


def _backward(residuals, g_TD):
    gates_TK, gate_up_EDH, down_EFD, routing, x_ZD, hidden_ZH, weight_Z1 = residuals
    source_Z, slots_TK, rows_E = routing
    with jax.named_scope("experts"):
        dy_ZD = _read(g_TD, gates_TK, source_Z)
        dact_ZF = grouped_matmul_bf16(dy_ZD, down_EFD, rows_E).astype(jnp.float32)
        ddown = grouped_matmul_accumulate_bf16(_act(hidden_ZH, weight_Z1), dy_ZD, rows_E)
        gate, up = _halves(hidden_ZH)
        silu, slope = silu_with_slope(gate)
        dweight_Z = (dact_ZF * silu * up).sum(-1)
        dact_ZF = dact_ZF * weight_Z1
        dhidden_ZH = jnp.concatenate([dact_ZF * up * slope, dact_ZF * silu], axis=1).astype(hidden_ZH.dtype)
        dx_ZD = grouped_matmul_bf16(dhidden_ZH, gate_up_EDH, rows_E)
        dgate_up = grouped_matmul_accumulate_bf16(x_ZD, dhidden_ZH, rows_E)
        dgates_TK = jnp.take(dweight_Z, slots_TK, mode="fill", fill_value=0)
        return (
            sum_rows(dx_ZD, source_Z, slots_TK),
            dgates_TK,
            dgate_up,
            ddown,
            None,
            None,
            None,
        )


_ffn.defvjp(_forward, _backward)
