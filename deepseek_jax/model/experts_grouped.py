"""The routed experts' FFN in BF16 through grouped products, for GPUs that have the kernels.

It is `experts_fp8` without FP8. Rows lie in the order of `parallel.slots`. Zeros fill each expert's rows up
to a multiple of 128, so no tile of a product belongs to two experts. Six products over all rows read the weights as
they are stored. The loop of `experts_blocks` gathers a weight per block and scatters its gradient; here neither moves.
H = 2F: gate, then up.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.model.layers import weighted_swiglu_backward
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.rows import sum_rows, take_rows
from deepseek_jax.parallel.slots import Routing
from pallas_kernels import GROUP
from pallas_kernels.grouped import grouped_matmul_accumulate_bf16, grouped_matmul_bf16


@dataclasses.dataclass(frozen=True)
class GroupedExperts:
    """The arithmetic of `model.rounds.Experts` in BF16 by grouped products."""

    unit: int = GROUP  # slots of an expert are a multiple of it

    def num_slots(self, assignments: int, num_experts: int) -> int:
        """Return the slots that hold `assignments` in any distribution."""
        return (assignments // self.unit + num_experts) * self.unit

    def pack(self, x_TD: jax.Array) -> jax.Array:
        """Return BF16 rows as they are."""
        return x_TD

    def forward(self, weights: dict[str, tuple], rows: jax.Array, gates_WK: jax.Array, routing: Routing):
        """Return the BF16 sums [W, D] and the pre-activations [Z, H]."""
        gate_up_EDH, down_EFD = _matrices(weights)
        x_ZD = take_rows(rows, routing.row_Z)
        hidden_ZH = keep(grouped_matmul_bf16(x_ZD, gate_up_EDH, routing.rows_E, transpose_b=True), "expert_hidden")
        act_ZF = _act(hidden_ZH, routing.to_slots(gates_WK)[:, None])
        y_ZD = grouped_matmul_bf16(act_ZF, down_EFD, routing.rows_E, transpose_b=True)
        return sum_rows(y_ZD, routing.slots_WK), hidden_ZH

    def backward(
        self,
        weights: dict[str, tuple],
        rows: jax.Array,
        gates_WK: jax.Array,
        routing: Routing,
        hidden: jax.Array,
        g_rows: jax.Array,
        dweights: dict[str, jax.Array],
    ):
        """Return the gradients of rows (BF16) and gates, and of weights (FP32), added to those in `dweights`."""
        gate_up_EDH, down_EFD = _matrices(weights)
        gate_up_sum, down_sum = sums_of(dweights)
        rows_E, weight_Z1 = routing.rows_E, routing.to_slots(gates_WK)[:, None]
        dy_ZD = take_rows(g_rows, routing.row_Z)
        dact_ZF = grouped_matmul_bf16(dy_ZD, down_EFD, rows_E).astype(jnp.float32)
        ddown = grouped_matmul_accumulate_bf16(_act(hidden, weight_Z1), dy_ZD, rows_E, down_sum)
        dhidden_ZH, dweight_Z = weighted_swiglu_backward(hidden, weight_Z1, dact_ZF)
        dx_ZD = grouped_matmul_bf16(dhidden_ZH, gate_up_EDH, rows_E)
        dgate_up = grouped_matmul_accumulate_bf16(take_rows(rows, routing.row_Z), dhidden_ZH, rows_E, gate_up_sum)
        dgates_WK = routing.to_assignments(dweight_Z)
        dweights = {"gate_up_ED2F": dgate_up.reshape(weights["gate_up_ED2F"][0].shape), "down_EFD": ddown}
        return sum_rows(dx_ZD, routing.slots_WK), dgates_WK, dweights


def _matrices(weights: dict[str, tuple]) -> tuple[jax.Array, jax.Array]:
    """Return gate and up as one matrix [D, H] per expert, and down."""
    (values_ED2F,), (down_EFD,) = weights["gate_up_ED2F"], weights["down_EFD"]
    return values_ED2F.reshape(*values_ED2F.shape[:2], -1), down_EFD


def sums_of(dweights: dict[str, jax.Array]) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the sums that products add to, of gate and up as one matrix [D, H] per expert, and of down; or None."""
    gate_up_ED2F, down_EFD = dweights.get("gate_up_ED2F"), dweights.get("down_EFD")
    return None if gate_up_ED2F is None else gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1), down_EFD


def _act(hidden_ZH: jax.Array, weight_Z1: jax.Array) -> jax.Array:
    gate, up = jnp.split(hidden_ZH.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up * weight_Z1).astype(hidden_ZH.dtype)
