"""The routed experts' FFN with adapters of low rank beside frozen weights (`adapters`), in every precision.

    hidden = x gate_up + s (x A1) B1              base products as without adapters, s = alpha / rank
    act    = silu(gate) * up * weight of the assignment
    y      = act down + s (act A2) B2             summed per token

    dact    = dy down^T + s (dy B2^T) A2^T        dB2 = s (act A2)^T dy           dA2 = s act^T (dy B2^T)
    dhidden = of the SwiGLU
    dx      = dhidden gate_up^T + s (dhidden B1^T) A1^T       dB1, dA1 as above

No weight gradient of the base is made: of the six products two are not there, and those of the pairs are small. Rows
lie in the order of slots, in blocks of one expert each. A product of low rank is a batched product of blocks with
gathered A or B: at rank U and `unit` rows a block that gathers U / unit of what the rows themselves are. Gradients of
pairs are grouped products, as those of the weights would be; where the base has none, each block's are added to its
expert's.

In FP8 the adapters read the dispatched rows as these arrived, in E4M3: what the experts read. The gradient of hidden is
rounded to BF16 before it is quantised, and nothing is regrouped, as no product sums over tokens in FP8.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts_blocks import BlockedExperts, cut_blocks, over_blocks
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.model.layers import silu_with_slope, weighted_swiglu_backward
from deepseek_jax.model.precision import as_stored, transposed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.rows import sum_rows, take_rows
from deepseek_jax.parallel.slots import Routing
from pallas_kernels.grouped import grouped_matmul, grouped_matmul_accumulate_bf16, grouped_matmul_bf16
from pallas_kernels.producers import swiglu_quantize
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize

GATE_UP, DOWN = "gate_up_ED2F", "down_EFD"


def pair_of(name: str) -> str:
    """Return the key of the pair of a weight, beside that of the weight itself."""
    return f"{name} pair"


@dataclasses.dataclass(frozen=True)
class AdaptedExperts:
    """The arithmetic of `model.rounds.Experts` with a pair (A, B) in `weights[pair_of(name)]` for some weights.

    Attributes:
        inner: the arithmetic of the base.
        scales: alpha / rank of each weight that has a pair, by name.
    """

    inner: Fp8Experts | GroupedExperts | BlockedExperts
    scales: tuple[tuple[str, float], ...]

    @property
    def unit(self) -> int:
        """Slots of an expert are a multiple of it."""
        return self.inner.unit

    def num_slots(self, assignments: int, num_experts: int) -> int:
        """Return the slots that hold `assignments` in any distribution."""
        return self.inner.num_slots(assignments, num_experts)

    def pack(self, x_TD: jax.Array) -> Any:
        """Return rows as the base reads them."""
        return self.inner.pack(x_TD)

    def forward(self, weights: dict[str, Any], rows: Any, gates_WK: jax.Array, routing: Routing):
        """Return the sums [W, D] and the pre-activations [Z, H]."""
        base, low = _products(self.inner, weights, routing), self._low(weights, routing)
        x, weight_Z = take_rows(rows, routing.row_Z), routing.to_slots(gates_WK)
        hidden_ZH = base.up(x)
        if GATE_UP in low:
            hidden_ZH += low[GATE_UP].product(_plain(x, hidden_ZH.dtype))
        hidden_ZH = keep(hidden_ZH, "expert_hidden")
        y_ZD = base.down(hidden_ZH, weight_Z)
        if DOWN in low:
            y_ZD += low[DOWN].product(_act(hidden_ZH, weight_Z))
        return sum_rows(y_ZD, routing.slots_WK), hidden_ZH

    def backward(
        self,
        weights: dict[str, Any],
        rows: Any,
        gates_WK: jax.Array,
        routing: Routing,
        hidden: jax.Array,
        g_rows: Any,
        dweights: dict[str, Any],
    ):
        """Return the gradients of rows and gates, and in FP32 of the pairs, added to those in `dweights`."""
        base, low = _products(self.inner, weights, routing), self._low(weights, routing)
        used_Z1 = (jnp.arange(routing.source_Z.size) < routing.rows_E.sum())[:, None]
        weight_Z, dtype = routing.to_slots(gates_WK), hidden.dtype
        hidden = jnp.where(used_Z1, hidden, 0)  # a kernel need not write slots of no expert
        dy = take_rows(g_rows, routing.row_Z)
        dact_ZF, dpairs = base.down_back(dy).astype(jnp.float32), {}
        if DOWN in low:
            more, dpairs[pair_of(DOWN)] = low[DOWN].backward(_act(hidden, weight_Z), _plain(dy, dtype))
            dact_ZF += more
        dact_ZF = jnp.where(used_Z1, dact_ZF, 0)
        dhidden_ZH, dweight_Z = weighted_swiglu_backward(hidden, weight_Z[:, None], dact_ZF)
        dx_ZD = base.up_back(dhidden_ZH)
        if GATE_UP in low:
            x_ZD = _plain(take_rows(rows, routing.row_Z), dtype)
            more, dpairs[pair_of(GATE_UP)] = low[GATE_UP].backward(x_ZD, dhidden_ZH)
            dx_ZD += more
        dpairs = {
            name: jax.tree.map(jnp.add, dweights[name], d) if name in dweights else d for name, d in dpairs.items()
        }
        return sum_rows(dx_ZD, routing.slots_WK), routing.to_assignments(dweight_Z), dpairs

    def _low(self, weights: dict[str, Any], routing: Routing) -> dict[str, "_LowRank"]:
        rows_E, grouped = routing.rows_E, not isinstance(self.inner, BlockedExperts)
        expert = cut_blocks(rows_E, routing.source_Z.size, self.unit, 1).expert
        pairs = {name: weights[pair_of(name)] for name, _ in self.scales}
        sizes = rows_E if grouped else None
        return {name: _LowRank(pairs[name][0], pairs[name][1], expert, sizes, scale) for name, scale in self.scales}


class _LowRank(NamedTuple):
    """scale (x A) B of rows in blocks of one expert each."""

    a_EIU: jax.Array
    b_EUO: jax.Array
    expert: jax.Array  # of each block
    rows_E: jax.Array | None  # slots of each expert, if gradients of A and B are grouped products
    scale: float

    def product(self, x_ZI: jax.Array) -> jax.Array:
        """Return the rows [Z, O]."""
        return self._times(self._times(x_ZI, self.a_EIU), self.b_EUO) * self.scale

    def backward(self, x_ZI: jax.Array, g_ZO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Return the gradients of the rows, and of A and B in FP32; rows of no expert are zero in both."""
        du_ZU = self._times(g_ZO, self.b_EUO.swapaxes(1, 2)) * self.scale  # the scale of what is narrow: one pass less
        da = self._outer(du_ZU, x_ZI).swapaxes(1, 2)
        db = self._outer(self._times(x_ZI, self.a_EIU) * self.scale, g_ZO)
        return self._times(du_ZU, self.a_EIU.swapaxes(1, 2)), (da, db)

    def _blocks(self, x_ZI: jax.Array) -> jax.Array:
        return x_ZI.reshape(self.expert.size, -1, x_ZI.shape[1])

    def _times(self, x_ZI: jax.Array, w_EIO: jax.Array) -> jax.Array:
        y = jnp.einsum("nbi,nio->nbo", self._blocks(x_ZI), w_EIO[self.expert])
        return y.reshape(x_ZI.shape[0], -1)

    def _outer(self, u_ZU: jax.Array, g_ZO: jax.Array) -> jax.Array:
        """Return each expert's sum over its rows [E, U, O]: narrow rows first, so that A and B share a kernel."""
        if self.rows_E is not None:
            return grouped_matmul_accumulate_bf16(u_ZU, g_ZO, self.rows_E)
        each = jnp.einsum("nbu,nbo->nuo", self._blocks(u_ZU), self._blocks(g_ZO), preferred_element_type=jnp.float32)
        # not said to be sorted: on a GPU that made a kernel for which the assembler took minutes (experiments/log.md)
        return jax.ops.segment_sum(each, self.expert, self.a_EIU.shape[0])


class _Products(NamedTuple):
    """The four products with the frozen weights."""

    up: Callable[[Any], jax.Array]  # rows in slots -> hidden [Z, H]
    down: Callable[[jax.Array, jax.Array], jax.Array]  # hidden, weight of each slot -> [Z, D]
    up_back: Callable[[jax.Array], jax.Array]  # gradient of hidden -> of rows
    down_back: Callable[[Any], jax.Array]  # gradient of the sums in slots -> [Z, F]


def _products(inner: Any, weights: dict[str, Any], routing: Routing) -> _Products:
    rows_E = routing.rows_E
    if isinstance(inner, Fp8Experts):
        used = rows_E.sum(dtype=jnp.int32)
        values, scales = weights[GATE_UP]
        gate_up, down = (values.reshape(*values.shape[:2], -1), scales), weights[DOWN]
        return _Products(
            lambda x: grouped_matmul(x, transposed(*gate_up), rows_E),
            lambda hidden, weight_Z: grouped_matmul(
                swiglu_quantize(hidden, weight_Z, num_rows=used), transposed(*down), rows_E
            ),
            lambda g: grouped_matmul(quantize_tiles(g), as_stored(*gate_up), rows_E),
            lambda g: grouped_matmul(g, as_stored(*down), rows_E),
        )
    (gate_up_ED2F,), (down_EFD,) = weights[GATE_UP], weights[DOWN]
    gate_up_EDH = gate_up_ED2F.reshape(*gate_up_ED2F.shape[:2], -1)

    def multiply(x, w_EIO, forward=True):
        if isinstance(inner, GroupedExperts):
            return grouped_matmul_bf16(x, w_EIO, rows_E, transpose_b=forward)
        return over_blocks(inner, routing, x, w_EIO if forward else w_EIO.swapaxes(1, 2))

    def up(x):
        if isinstance(inner, GroupedExperts):
            return multiply(x, gate_up_EDH)
        halves = (multiply(x, gate_up_ED2F[:, :, half]) for half in range(2))  # sums in the order of `experts_blocks`
        return jnp.concatenate(list(halves), axis=1)

    return _Products(
        up,
        lambda hidden, weight_Z: multiply(_act(hidden, weight_Z), down_EFD),
        lambda g: multiply(g, gate_up_EDH, forward=False),
        lambda g: multiply(g, down_EFD, forward=False),
    )


def _act(hidden_ZH: jax.Array, weight_Z: jax.Array) -> jax.Array:
    gate, up = jnp.split(hidden_ZH.astype(jnp.float32), 2, axis=1)
    return (silu_with_slope(gate)[0] * up * weight_Z[:, None]).astype(hidden_ZH.dtype)


def _plain(rows: Any, dtype: jnp.dtype) -> jax.Array:
    """Return rows as an array: dequantised tiles, in `dtype`, which are the numbers that FP8 products read."""
    return dequantize(rows).astype(dtype) if isinstance(rows, Quantized) else rows
