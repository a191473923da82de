"""The routed experts' FFN in FP8 (DeepSeek-V3 sections 3.3.1 to 3.3.3): six products over all rows.

The kernel that makes an operand also quantises it. Assignments are sorted by expert, and zeros fill each expert's rows
up to a multiple of 128 (`parallel.slots`), so 128 rows that share a scale in a weight gradient belong to
one expert. There are Z rows in all, a static number; the last ones may belong to no expert: kernels need not work on
them, and nobody reads what they hold. H = 2F: gate, then up.

    forward     x        quantised by the sender, read by slot                powers of two
                hidden = x gate_up
                act      silu(gate) * up * weight of the assignment
                y      = act down, summed per token
    backward    dy       quantised by the sender, read by slot                powers of two
                dact   = dy down^T
                dhidden, act recomputed, and the gradient of the weight: one pass
                dx     = dhidden gate_up^T, summed per token
                dgate_up = x^T dhidden, ddown = act^T dy                     FP32

What lives from forward to backward: the rows that arrived, in E4M3 (not in the order of slots, in which a row is
repeated), and hidden in BF16.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts_grouped import sums_of
from deepseek_jax.model.precision import DISPATCH, as_stored, transposed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.rows import sum_rows, take_rows
from deepseek_jax.parallel.slots import Routing
from pallas_kernels import GROUP
from pallas_kernels.grouped import grouped_matmul, grouped_matmul_accumulate
from pallas_kernels.producers import swiglu_backward_quantize, swiglu_quantize
from pallas_kernels.quantize import quantize_tiles, requantize_transposed
from pallas_kernels.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Fp8Experts:
    """The arithmetic of `model.rounds.Experts` in FP8. Widths D and F are multiples of 128."""

    unit: int = GROUP  # slots of an expert are a multiple of it

    def num_slots(self, assignments: int, num_experts: int) -> int:
        """Return the slots that hold `assignments` in any distribution."""
        return (assignments // self.unit + num_experts) * self.unit

    def pack(self, x_TD: jax.Array) -> Quantized:
        """Return BF16 rows as tiles of one row x 128 channels, with scales that are powers of two."""
        return quantize_tiles(x_TD, scale=DISPATCH)

    def forward(self, weights: dict[str, tuple], rows: Quantized, gates_WK: jax.Array, routing: Routing):
        """Return the BF16 sums [W, D] and the pre-activations [Z, H]."""
        gate_up, down = _matrices(weights)
        x_ZD = take_rows(rows, routing.row_Z)
        hidden_ZH = keep(grouped_matmul(x_ZD, transposed(*gate_up), routing.rows_E), "expert_hidden")
        act_ZF = swiglu_quantize(hidden_ZH, routing.to_slots(gates_WK), num_rows=_used(routing))
        y_ZD = grouped_matmul(act_ZF, transposed(*down), routing.rows_E)
        return sum_rows(y_ZD, routing.slots_WK), hidden_ZH

    def backward(
        self,
        weights: dict[str, tuple],
        rows: Quantized,
        gates_WK: jax.Array,
        routing: Routing,
        hidden: Any,
        g_rows: Quantized,
        dweights: dict[str, jax.Array],
    ):
        """Return the gradients of rows (BF16) and gates, and of weights (FP32), added to those in `dweights`."""
        gate_up, down = _matrices(weights)
        gate_up_sum, down_sum = sums_of(dweights)
        rows_E, used = routing.rows_E, _used(routing)
        dy_ZD = take_rows(g_rows, routing.row_Z)
        dact_ZF = grouped_matmul(dy_ZD, as_stored(*down), rows_E)
        weight_Z = routing.to_slots(gates_WK)
        dhidden_ZH, dhidden_HZ, act_FZ, dweight_Z = swiglu_backward_quantize(hidden, dact_ZF, weight_Z, num_rows=used)
        assert dweight_Z is not None  # there are weights
        dy_DZ = requantize_transposed(dy_ZD, num_rows=used, scale=DISPATCH)
        ddown = grouped_matmul_accumulate(act_FZ, dy_DZ, rows_E, down_sum)
        dx_ZD = grouped_matmul(dhidden_ZH, as_stored(*gate_up), rows_E)
        x_DZ = requantize_transposed(take_rows(rows, routing.row_Z), num_rows=used, scale=DISPATCH)
        dgate_up = grouped_matmul_accumulate(x_DZ, dhidden_HZ, rows_E, gate_up_sum)
        dgates_WK = routing.to_assignments(dweight_Z)
        dweights = {
            "gate_up_ED2F": dgate_up.reshape(weights["gate_up_ED2F"][0].shape),
            "down_EFD": ddown,
        }
        return sum_rows(dx_ZD, routing.slots_WK), dgates_WK, dweights


def _used(routing: Routing) -> jax.Array:
    """Return how many slots belong to an expert, those that fill it up included: the first ones."""
    return routing.rows_E.sum(dtype=jnp.int32)


def _matrices(weights: dict[str, tuple]) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return (values, scales) of gate and up as one matrix [D, H] per expert, and of down."""
    values_ED2F, scales = weights["gate_up_ED2F"]
    return (values_ED2F.reshape(*values_ED2F.shape[:2], -1), scales), weights["down_EFD"]
