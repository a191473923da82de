"""Dropless expert exchange: one seam, `exchange`, between routing and the experts' arithmetic.

Problem. Each of R devices has T tokens, each token wants K of E experts, and E / R experts live on each device. Nothing
may be dropped, shapes are static, and memory must not be sized for the worst case.

Choice. Forward and backward are the same walk, and one derivative is written around it:

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
    rows for a device       further rounds, all devices together, because a round has collectives. There is one round
                            wherever a pair of devices has room for all rows (`choose_transport`): always on up to
                            slack * K devices

"local" is the specification: nothing moves, one round, one range. In FP8 the rows that arrive are bit for bit those
that "local" reads.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.slots import Assigned, Routing, assign, num_ranges, routing
from deepseek_jax.parallel.transport import (
    Places,
    Rounds,
    Transport,
    bring,
    choose_transport,
    cross,
    fan_out,
    places_of,
    plan_rounds,
    send,
)
from deepseek_jax.parameters import EXPERTS, CastWeight, Fp8Weight
from pallas_kernels.quantized import ROW_ALIGNMENT


class Experts(Protocol):
    """The experts' arithmetic on rows that are here. Hashable: to the exchange's derivative it is static."""

    @property
    def unit(self) -> int:
        """Slots of an expert are a multiple of it."""
        ...

    def num_slots(self, assignments: int, num_experts: int) -> int:
        """Return how many slots `assignments` to `num_experts` experts fill at most, in whole steps of the work."""
        ...

    def pack(self, x_TD: jax.Array) -> Any:
        """Return rows as the experts read them and as they travel: an array [T, D], or `Quantized` tiles."""
        ...

    def forward(
        self, weights: dict[str, tuple], rows: Any, gates_WK: jax.Array, routing: Routing
    ) -> tuple[jax.Array, Any]:
        """Return the gated sum of each row's experts [W, D], and what the backward pass needs besides the inputs."""
        ...

    def backward(
        self, weights: dict[str, tuple], rows: Any, gates_WK: jax.Array, routing: Routing, hidden: Any, g_rows: Any
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return the gradients of rows [W, D], gates [W, K], and in FP32 of weights, from that of the sums."""
        ...


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
        weights: this device's experts, leading dim E / devices: `Fp8Weight`s, `CastWeight`s or arrays.
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
    for name, weight in weights.items():
        whole = weight if isinstance(weight, Fp8Weight) else CastWeight.of(weight)
        carriers[name] = whole.carrier
        numbers[name] = (whole.values, whole.scales) if isinstance(whole, Fp8Weight) else (whole.values,)
    y_TD: jax.Array = _exchange(
        _Static(way, experts, num_experts, slack), x_TD, gates_TK, carriers, numbers, experts_TK
    )
    return y_TD[:num_tokens] if missing else y_TD


class _Static(NamedTuple):
    """Static facts of an exchange."""

    transport: Transport
    experts: Experts
    num_experts: int
    slack: float

    @property
    def axes(self) -> tuple[str, ...]:
        return EXPERTS if self.transport.first else ()


class _Arrived(NamedTuple):
    """What one round brought."""

    places: Places | None
    rows: Any  # by the first hop: the second is done again in the backward pass, so that its copies are not kept
    gates_WK: jax.Array
    device_WK: jax.Array
    slot_WK: jax.Array
    rows_E: jax.Array


def _plan(static: _Static, experts_TK: jax.Array) -> Rounds | None:
    """Return which rows travel in which round; None if all do at once."""
    if static.transport.capacity is None:
        return None
    there = (experts_TK >= 0) & (experts_TK < static.num_experts)
    per_device = static.num_experts // lax.axis_size(EXPERTS)
    return plan_rounds(static.transport, jnp.where(there, experts_TK // per_device, -1))


def _arrive(static: _Static, rounds: Rounds | None, index, experts_TK, gates_TK, x_TD) -> _Arrived:
    """Send the rows of round `index`."""
    with jax.named_scope("route"):
        places, serves_TK = places_of(static.transport, rounds, index)
        served_TK = jnp.where(serves_TK, experts_TK, static.num_experts)
        assigned = assign(served_TK, static.num_experts, static.experts.unit, static.axes)
    with jax.named_scope("dispatch"):
        rows = cross(static.transport, places, static.experts.pack(x_TD))
        gates_WK, device_WK, slot_WK = _send_gates(static.transport, places, assigned, gates_TK)
        return _Arrived(places, rows, gates_WK, device_WK, slot_WK, assigned.rows_E)


def _send_gates(
    transport: Transport, places: Places | None, assigned: Assigned, gates_TK: jax.Array
) -> tuple[jax.Array, ...]:
    """Send gates, devices and slots, in one array; the device of an empty place is -1."""
    if not transport.first:
        return gates_TK, assigned.device_TK, assigned.slot_TK
    bits = lax.bitcast_convert_type(gates_TK, jnp.int32)
    words = jnp.concatenate([bits, assigned.device_TK + 1, assigned.slot_TK], axis=1)
    bits, device_WK, slot_WK = jnp.split(send(transport, places, words), 3, axis=1)
    return lax.bitcast_convert_type(bits, jnp.float32), device_WK - 1, slot_WK


def _num_slots(static: _Static, arrived: _Arrived, num_assignments: int) -> tuple[int, bool]:
    """Return the slots of a range, and whether they hold all that can come."""
    local = arrived.rows_E.size
    num_rows, k = arrived.slot_WK.shape
    most = num_rows * min(k, local)
    room = most if not static.axes else min(most, int(static.slack * num_assignments))
    return static.experts.num_slots(room, local), room == most


def _routing(static: _Static, arrived: _Arrived, num_slots: int, index) -> Routing:
    me = lax.axis_index(static.axes) if static.axes else 0
    with jax.named_scope("route"):
        return routing(arrived.device_WK, arrived.slot_WK, arrived.rows_E, num_slots, index, me)


def _sum_ranges(static: _Static, arrived: _Arrived, num_assignments: int, first, one_range):
    """Return `first` plus `one_range(routing)` of every further range of slots."""
    num_slots, enough = _num_slots(static, arrived, num_assignments)
    if enough:
        return first

    def body(index, total):
        return jax.tree.map(jnp.add, total, one_range(_routing(static, arrived, num_slots, index)))

    return lax.fori_loop(1, num_ranges(arrived.rows_E, num_slots), body, first)


def _forward_round(static: _Static, arrived: _Arrived, numbers, num_assignments: int):
    """Return this device's tokens' sums of one round, and what the first range keeps."""
    num_slots, _ = _num_slots(static, arrived, num_assignments)
    route = keep(_routing(static, arrived, num_slots, 0), "routing")
    with jax.named_scope("dispatch"):
        rows = fan_out(static.transport, arrived.rows)
    with jax.named_scope("experts"):
        y_WD, hidden = static.experts.forward(numbers, rows, arrived.gates_WK, route)
        y_WD = _sum_ranges(
            static,
            arrived,
            num_assignments,
            y_WD,
            lambda further: static.experts.forward(numbers, rows, arrived.gates_WK, further)[0],
        )
    with jax.named_scope("combine"):
        return bring(static.transport, arrived.places, y_WD), (route, hidden)


def _backward_round(static: _Static, arrived: _Arrived, numbers, num_assignments: int, kept, g_TD):
    """Return the gradients of rows, gates and weights of one round."""
    route, hidden = kept
    with jax.named_scope("dispatch"):
        g_rows = send(static.transport, arrived.places, static.experts.pack(g_TD))
        rows = fan_out(static.transport, arrived.rows)

    def one_range(route, hidden):
        return static.experts.backward(numbers, rows, arrived.gates_WK, route, hidden, g_rows)

    def further(route):
        return one_range(route, static.experts.forward(numbers, rows, arrived.gates_WK, route)[1])

    with jax.named_scope("experts"):
        dx_WD, dgates_WK, dweights = _sum_ranges(static, arrived, num_assignments, one_range(route, hidden), further)
    with jax.named_scope("combine"):
        dx_TD = bring(static.transport, arrived.places, dx_WD)
        dgates_TK = bring(static.transport, arrived.places, dgates_WK)
    return dx_TD, dgates_TK, dweights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static, x_TD, gates_TK, carriers, numbers, experts_TK) -> Any:
    return _forward(static, x_TD, gates_TK, carriers, numbers, experts_TK)[0]


def _forward(static, x_TD, gates_TK, carriers, numbers, experts_TK):
    rounds = _plan(static, experts_TK)
    arrived = _arrive(static, rounds, 0, experts_TK, gates_TK, x_TD)
    arrived = keep(arrived._replace(rows=None), "routing")._replace(rows=keep(arrived.rows, "expert_rows"))
    y_TD, kept = _forward_round(static, arrived, numbers, experts_TK.size)
    if rounds is None:
        return y_TD, (arrived, kept, numbers, None)

    def body(index, y):
        later = _arrive(static, rounds, index, experts_TK, gates_TK, x_TD)
        return y + _forward_round(static, later, numbers, experts_TK.size)[0]

    y_TD = lax.fori_loop(1, rounds.num_rounds, body, y_TD)
    return y_TD, (arrived, kept, numbers, (rounds, x_TD, gates_TK, experts_TK))


def _backward(static, residuals, g_TD):
    arrived, kept, numbers, inputs = residuals
    num_assignments = g_TD.shape[0] * arrived.gates_WK.shape[1]
    gradients = _backward_round(static, arrived, numbers, num_assignments, kept, g_TD)
    if inputs is not None:
        rounds, x_TD, gates_TK, experts_TK = inputs

        def body(index, total):
            later = _arrive(static, rounds, index, experts_TK, gates_TK, x_TD)
            kept = _forward_round(static, later, numbers, num_assignments)[1]
            return jax.tree.map(jnp.add, total, _backward_round(static, later, numbers, num_assignments, kept, g_TD))

        gradients = lax.fori_loop(1, rounds.num_rounds, body, gradients)
    dx_TD, dgates_TK, dweights = gradients
    return dx_TD, dgates_TK, dweights, None, None


_exchange.defvjp(_forward, _backward)
