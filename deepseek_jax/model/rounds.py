"""One round of the exchange (`model.exchange`), in both passes: rows out, the experts' arithmetic, sums back.

A round of the first hop brings rows, and with them the slots that their senders gave them. If there is a second hop,
its rounds, "deliveries", follow until every row is where its experts are:

    forward     rows of the first hop arrive                        then for each delivery: rows to the neighbours,
                sums of all deliveries go back over it              experts, sums back to who sent the rows on
    backward    the same with the gradients, and rows once more

Slots are given for all deliveries together. In each of them the slots of rows that come in another one are empty, so
the experts compute ranges of slots as often as there are deliveries: once, unless a pair of neighbours has no room.

Rows of the first hop are kept for the backward pass. Their copies inside a node, several times as many, are sent once
more.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.slots import Routing, assign, num_ranges, routing
from deepseek_jax.parallel.transport import (
    Hop,
    Places,
    Routes,
    Transport,
    bring,
    first_parts,
    num_rounds,
    places_of,
    plan_rounds,
    rounds_to_tell,
    second_parts,
    send,
    send_routed,
)
from deepseek_jax.parameters import EXPERTS


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


class Static(NamedTuple):
    """Static facts of an exchange."""

    transport: Transport
    experts: Experts
    num_experts: int
    slack: float

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that hold the experts; () if all are here."""
        return EXPERTS if self.transport.first.axes else ()

    def num_slots(self, arrived: "Arrived", num_assignments: int) -> tuple[int, bool]:
        """Return the slots of a range, and whether they hold all that can come in one round of the first hop."""
        local = arrived.rows_E.size
        num_rows, k = arrived.routes.slot_WK.shape
        most = num_rows * self.transport.second.parts * min(k, local)
        room = most if not self.axes else min(most, int(self.slack * num_assignments))
        return self.experts.num_slots(room, local), room == most


class Arrived(NamedTuple):
    """What one round of the first hop brought."""

    places: Places | None
    rows: Any
    routes: Routes
    rows_E: jax.Array
    rounds: tuple[jax.Array, jax.Array] | None  # how many the first hop has, and the second after this one


class Delivered(NamedTuple):
    """What one round of the second hop made of it, besides rows."""

    places: Places | None
    routes: Routes


def arrive(static: Static, index, experts_TK, gates_TK, x_TD) -> Arrived:
    """Send the rows of round `index` of the first hop."""
    way = static.transport
    with jax.named_scope("route"):
        places, serves_TK, told = None, True, None
        if static.axes:
            device_TK = _device(static, experts_TK)
            rounds = plan_rounds(way.first, first_parts(way, device_TK))
            places, serves_TK = places_of(way.first, rounds, index)
            told = rounds_to_tell(way, rounds, jnp.where(serves_TK, device_TK, -1))
        served_TK = jnp.where(serves_TK, experts_TK, static.num_experts)
        assigned = assign(served_TK, static.num_experts, static.experts.unit, static.axes, told)
    with jax.named_scope("dispatch"):
        routes = Routes(gates_TK, assigned.device_TK, assigned.slot_TK)
        rows, routes = send_routed(way.first, places, static.experts.pack(x_TD), routes)
    return Arrived(places, rows, routes, assigned.rows_E, None if told is None else num_rounds(way, assigned.told_RX))


def _device(static: Static, experts_TK: jax.Array) -> jax.Array:
    """Return the device of each assignment's expert along `EXPERTS`; -1: nowhere."""
    there = (experts_TK >= 0) & (experts_TK < static.num_experts)
    return jnp.where(there, experts_TK // (static.num_experts // lax.axis_size(EXPERTS)), -1)


def _deliver(static: Static, arrived: Arrived, index) -> tuple[Any, Delivered]:
    """Send what arrived on, in round `index` of the second hop; return rows and the rest."""
    way = static.transport
    if not way.second.axes:
        return arrived.rows, Delivered(None, arrived.routes)
    with jax.named_scope("route"):
        rounds = plan_rounds(way.second, second_parts(way, arrived.routes.device_WK))
        places, _ = places_of(way.second, rounds, index)
    with jax.named_scope("dispatch"):
        rows, routes = send_routed(way.second, places, arrived.rows, arrived.routes)
    return rows, Delivered(places, routes)


def _routing(static: Static, arrived: Arrived, routes: Routes, num_slots: int, index) -> Routing:
    me = lax.axis_index(static.axes) if static.axes else 0
    with jax.named_scope("route"):
        return routing(routes.device_WK, routes.slot_WK, arrived.rows_E, num_slots, index, me)


def _sum_ranges(static: Static, arrived: Arrived, routes: Routes, num_assignments: int, first, one_range):
    """Return `first` plus `one_range(routing)` of every further range of slots."""
    num_slots, enough = static.num_slots(arrived, num_assignments)
    if enough:
        return first

    def body(index, total):
        return jax.tree.map(jnp.add, total, one_range(_routing(static, arrived, routes, num_slots, index)))

    return lax.fori_loop(1, num_ranges(arrived.rows_E, num_slots), body, first)


def sum_rounds(hop: Hop, arrived: Arrived, number: int, first, one_round):
    """Return `first` plus `one_round(index)` of every further round of a hop, the first (0) or the second (1)."""
    if hop.capacity is None or arrived.rounds is None:
        return first

    def body(index, total):
        return jax.tree.map(jnp.add, total, one_round(index))

    return lax.fori_loop(1, arrived.rounds[number], body, first)


def _forward_delivery(static: Static, arrived: Arrived, numbers, num_assignments: int, index):
    """Return the sums of the rows that arrived here, of one round of the second hop, and what its first range keeps."""
    rows, delivered = _deliver(static, arrived, index)
    if static.transport.second.axes:
        delivered = keep(delivered, "routing")
    num_slots, _ = static.num_slots(arrived, num_assignments)
    routes = delivered.routes
    route = keep(_routing(static, arrived, routes, num_slots, 0), "routing")
    with jax.named_scope("experts"):
        y_WD, hidden = static.experts.forward(numbers, rows, routes.gates_WK, route)
        y_WD = _sum_ranges(
            static,
            arrived,
            routes,
            num_assignments,
            y_WD,
            lambda further: static.experts.forward(numbers, rows, routes.gates_WK, further)[0],
        )
    with jax.named_scope("combine"):
        y_WD = bring(static.transport.second, delivered.places, y_WD)
    return y_WD, (delivered if static.transport.second.axes else None, route, hidden)


def forward_round(static: Static, arrived: Arrived, numbers, num_assignments: int):
    """Return this device's tokens' sums of one round, and what its first delivery keeps."""
    one = functools.partial(_forward_delivery, static, arrived, numbers, num_assignments)
    y_WD, kept = one(0)
    y_WD = sum_rounds(static.transport.second, arrived, 1, y_WD, lambda index: one(index)[0])
    with jax.named_scope("combine"):
        return bring(static.transport.first, arrived.places, y_WD), kept


def _backward_delivery(static: Static, arrived: Arrived, numbers, num_assignments: int, g_rows, kept):
    """Return the gradients of the rows that arrived here, of gates and of weights, of one round of the second hop."""
    delivered, route, hidden = kept
    hop = static.transport.second
    places, routes = delivered or (None, arrived.routes)
    with jax.named_scope("dispatch"):
        g_rows, rows = send(hop, places, (g_rows, arrived.rows))

    def one_range(route, hidden):
        return static.experts.backward(numbers, rows, routes.gates_WK, route, hidden, g_rows)

    def further(route):
        return one_range(route, static.experts.forward(numbers, rows, routes.gates_WK, route)[1])

    with jax.named_scope("experts"):
        dx_WD, dgates_WK, dweights = _sum_ranges(
            static, arrived, routes, num_assignments, one_range(route, hidden), further
        )
    with jax.named_scope("combine"):
        return bring(hop, places, dx_WD), bring(hop, places, dgates_WK), dweights


def backward_round(static: Static, arrived: Arrived, numbers, num_assignments: int, kept, g_TD):
    """Return the gradients of rows, gates and weights of one round."""
    with jax.named_scope("dispatch"):
        g_rows = send(static.transport.first, arrived.places, static.experts.pack(g_TD))
    one = functools.partial(_backward_delivery, static, arrived, numbers, num_assignments, g_rows)

    def again(index):
        return one(_forward_delivery(static, arrived, numbers, num_assignments, index)[1])

    dx_WD, dgates_WK, dweights = sum_rounds(static.transport.second, arrived, 1, one(kept), again)
    with jax.named_scope("combine"):
        dx_TD, dgates_TK = (bring(static.transport.first, arrived.places, d) for d in (dx_WD, dgates_WK))
    return dx_TD, dgates_TK, dweights
