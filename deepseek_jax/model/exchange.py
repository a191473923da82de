"""Dropless expert exchange: one seam, `exchange`, between routing and the experts' arithmetic.

Problem. Each of R devices has T tokens, each token wants K of E experts, and E / R experts live on each device. Nothing
may be dropped, shapes are static, and memory must not be sized for the worst case.

Choice. Forward and backward are the same walk (`model.rounds`), and one derivative is written around it:

    forward     pack x       as it travels: E4M3 with scales, quantised once and by the sender; or as it is
                send         one copy of a token per device that it is for          (`parallel.transport`)
                experts      rows in the order of slots, which the senders gave     (`parallel.slots`)
                bring        one sum per row back, added in FP32
    backward    pack the gradient of y, send it the same way; experts; bring the gradient of x, and of the gates

The gate weight travels with its row and is applied before the down projection (as in DeepSeek's own trace), so
combining is a plain sum and the gate's gradient comes out of the experts' backward pass.

Two things are sized for a multiple of the balanced load, the exchange's `slack`. If they do not suffice, the rest is
computed later, and in the backward pass once more:

    slots of a device       further ranges of slots, each device on its own
    rows for a device       further rounds of a hop, all devices together, because a round has collectives. There is one
                            round wherever a pair of devices has room for all rows (`choose_transport`): always on up to
                            slack * K devices

"local" is the specification: nothing moves, one round, one range. In FP8 the rows that arrive are bit for bit those
that "local" reads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.adapters import Adapted, base_of, halves
from deepseek_jax.model.experts_adapted import pair_of
from deepseek_jax.model.recompute import keep
from deepseek_jax.model.rounds import Experts, Static, add_all, arrive, backward_round, count_rounds, forward_round
from deepseek_jax.parallel.gradient_sums import GradientSum
from deepseek_jax.parallel.transport import choose_transport
from deepseek_jax.parameters import CastWeight, Fp8Weight
from pallas_kernels.quantized import ROW_ALIGNMENT


def exchange(
    x_TD: jax.Array,
    experts_TK: jax.Array,
    gates_TK: jax.Array,
    weights: dict[str, Any],
    experts: Experts,
    *,
    transport: str,
    num_experts: int,
    slack: float,
    groups: tuple[int, int] = (0, 0),
) -> jax.Array:
    """Apply each token's experts wherever they live; return the gated sums y_TD (DeepSeek-V3 eq. 12).

    Args:
        x_TD: this device's rows.
        experts_TK: global expert ids, int32; others than [0, num_experts) mean no expert (padding).
        gates_TK: gate weights, FP32.
        weights: this device's experts, leading dim E / devices: `Fp8Weight`s, `CastWeight`s or arrays; if any is
            `Adapted`, all others are frozen, too.
        experts: the experts' arithmetic.
        transport: "local" (every expert is here: the specification), "dense" (one hop) or "two_hop" (over `node`, then
            over `expert`); the last two inside a shard_map with the `EXPERTS` axes.
        num_experts: E.
        slack: room for rows and slots, in multiples of the balanced number.
        groups: into how many the experts are cut, and in how many of them those of a token are at most; (0, 0): any.
    """
    num_tokens, k = experts_TK.shape
    missing = 0 if transport == "local" else -num_tokens % ROW_ALIGNMENT
    if missing:
        x_TD, gates_TK = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x_TD, gates_TK))
        experts_TK = jnp.pad(experts_TK, ((0, missing), (0, 0)), constant_values=num_experts)
    way = choose_transport(transport, num_tokens + missing, k, groups, slack)
    carriers, numbers = {}, {}
    frozen = any(isinstance(weight, Adapted) for weight in weights.values())
    for name, weight in weights.items():
        if isinstance(weight, Adapted):
            pair = halves(weight)
            carriers[pair_of(name)] = pair
            numbers[pair_of(name)] = tuple(lax.stop_gradient(w).astype(x_TD.dtype) for w in pair)
        weight = base_of(weight)
        whole = weight if isinstance(weight, Fp8Weight) else CastWeight.of(weight)
        if not frozen:
            carriers[name] = whole.carrier
        numbers[name] = (whole.values, whole.scales) if isinstance(whole, Fp8Weight) else (whole.values,)
    static = Static(way, experts, num_experts, experts_TK.size, slack)
    y_TD: jax.Array = _exchange(static, x_TD, gates_TK, carriers, numbers, experts_TK)
    return y_TD[:num_tokens] if missing else y_TD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static, x_TD, gates_TK, carriers, numbers, experts_TK) -> Any:
    return _forward(static, x_TD, gates_TK, carriers, numbers, experts_TK)[0]


def _forward(static, x_TD, gates_TK, carriers, numbers, experts_TK):
    arrived = arrive(static, 0, experts_TK, gates_TK, x_TD)
    arrived = keep(arrived._replace(rows=None), "routing")._replace(rows=keep(arrived.rows, "expert_rows"))
    y_TD, kept = forward_round(static, arrived, numbers, keeps=True)

    def later(index, carried):
        later = arrive(static, index, experts_TK, gates_TK, x_TD)
        return forward_round(static, later, numbers, keeps=False)[0], carried

    count = count_rounds(static, arrived)
    inputs = None if count is None else (x_TD, gates_TK, experts_TK)
    sums = {name: carrier.total for name, carrier in carriers.items() if isinstance(carrier, GradientSum)}
    return add_all(count, (y_TD, ()), later, gates_TK)[0], (arrived, kept, numbers, inputs, sums)


def _backward(static, residuals, g_TD):
    arrived, kept, numbers, inputs, sums = residuals
    gradients = backward_round(static, arrived, numbers, kept, g_TD, sums)

    def later(index, dweights):
        x_TD, gates_TK, experts_TK = inputs
        later = arrive(static, index, experts_TK, gates_TK, x_TD)
        return backward_round(static, later, numbers, None, g_TD, dweights)

    (dx_TD, dgates_TK), dweights = add_all(count_rounds(static, arrived), gradients, later, g_TD)
    dweights = {name: GradientSum(g) if name in sums else g for name, g in dweights.items()}
    return dx_TD, dgates_TK, dweights, None, None


_exchange.defvjp(_forward, _backward)
