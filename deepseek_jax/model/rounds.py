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

What comes first (round, delivery and range of slots 0) is written out, and nearly always all. The rest of each of the
three is a loop that then does not run (`add_all`). Inside a loop all is computed anew, also in the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.slots import Routing, assign, num_ranges, routing
from deepseek_jax.parallel.transport import (
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
        self,
        weights: dict[str, tuple],
        rows: Any,
        gates_WK: jax.Array,
        routing: Routing,
        hidden: Any,
        g_rows: Any,
        dweights: dict[str, jax.Array],
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return the gradients of rows [W, D], gates [W, K], and in FP32 of weights, from that of the sums.

        Those of weights are added to `dweights`, where it has some.
        """
        ...


class Static(NamedTuple):
    """Static facts of an exchange."""

    transport: Transport
    experts: Experts
    num_experts: int
    num_assignments: int  # of this device's tokens
    slack: float

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that hold the experts; () if all are here."""
        return EXPERTS if self.transport.first.axes else ()

    def num_slots(self, arrived: "Arrived") -> tuple[int, bool]:
        """Return the slots of a range, and whether they hold all that can come in one round of the first hop."""
        local = arrived.rows_E.size
        num_rows, k = arrived.routes.slot_WK.shape
        most = num_rows * self.transport.second.parts * min(k, local)
        room = most if not self.axes else min(most, int(self.slack * self.num_assignments))
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


# (index, carried) -> (terms of a sum, carried on): one round, delivery or range
One = Callable[[Any, Any], tuple[Any, Any]]


def add_all(count: jax.Array | None, first: tuple[Any, Any] | None, one: One, like: jax.Array, carried: Any = ()):
    """Return the sum of the terms of `one` for every index below `count`, and what it carries on.

    Gradients of weights are carried: loops inside loops add to one copy of them.

    Args:
        count: traced; None: there is one.
        first: `one(0, carried)`, or None to have the loop compute it.
        one: of a traced index.
        like: varies over the mesh axes that terms vary over.
        carried: to start with, without `first`.
    """
    if count is None:
        return one(0, carried) if first is None else first
    start, total = 1, first
    if total is None:
        terms = jax.eval_shape(one, 0, carried)[0]
        start, total = 0, (jax.tree.map(lambda a: vary(jnp.zeros(a.shape, a.dtype), like), terms), carried)

    def body(index, total):
        terms, carried = one(index, total[1])
        return jax.tree.map(jnp.add, total[0], terms), carried

    return lax.fori_loop(start, count, body, total)


def count_rounds(static: Static, arrived: Arrived) -> jax.Array | None:
    """Return how many rounds there are, the same on every device of the exchange; None: one."""
    return None if static.transport.first.capacity is None or arrived.rounds is None else arrived.rounds[0]


def _count_deliveries(static: Static, arrived: Arrived) -> jax.Array | None:
    return None if static.transport.second.capacity is None or arrived.rounds is None else arrived.rounds[1]


def _count_ranges(static: Static, arrived: Arrived) -> jax.Array | None:
    num_slots, enough = static.num_slots(arrived)
    return None if enough else num_ranges(arrived.rows_E, num_slots)


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


def _routing(static: Static, arrived: Arrived, routes: Routes, index) -> Routing:
    """Return the routing of range `index` of the slots."""
    me = lax.axis_index(static.axes) if static.axes else 0
    with jax.named_scope("route"):
        return routing(routes.device_WK, routes.slot_WK, arrived.rows_E, static.num_slots(arrived)[0], index, me)


def _forward_delivery(static: Static, arrived: Arrived, numbers, index, keeps: bool):
    """Return the sums of the rows that arrived here, and, if it `keeps`, what its first range keeps."""
    rows, delivered = _deliver(static, arrived, index)
    if keeps and static.transport.second.axes:
        delivered = keep(delivered, "routing")
    gates_WK = delivered.routes.gates_WK

    def one_range(index, carried):
        route = _routing(static, arrived, delivered.routes, index)
        return static.experts.forward(numbers, rows, gates_WK, route)[0], carried

    first = kept = None
    if keeps:
        route = keep(_routing(static, arrived, delivered.routes, 0), "routing")
        with jax.named_scope("experts"):
            y_WD, hidden = static.experts.forward(numbers, rows, gates_WK, route)
        first, kept = (y_WD, ()), (delivered if static.transport.second.axes else None, route, hidden)
    with jax.named_scope("experts"):
        y_WD, _ = add_all(_count_ranges(static, arrived), first, one_range, gates_WK)
    with jax.named_scope("combine"):
        return bring(static.transport.second, delivered.places, y_WD), kept


def forward_round(static: Static, arrived: Arrived, numbers, keeps: bool):
    """Return this device's tokens' sums of one round, and, if it `keeps`, what the backward pass needs of it."""
    first = kept = None
    if keeps:
        y_WD, kept = _forward_delivery(static, arrived, numbers, 0, True)
        first = y_WD, ()

    def one(index, carried):
        return _forward_delivery(static, arrived, numbers, index, False)[0], carried

    y_WD, _ = add_all(_count_deliveries(static, arrived), first, one, arrived.routes.gates_WK)
    with jax.named_scope("combine"):
        return bring(static.transport.first, arrived.places, y_WD), kept


def _backward_delivery(static: Static, arrived: Arrived, numbers, g_rows, index, kept, dweights):
    """Return the gradients of (the rows that arrived here, gates), and of weights, added to those so far."""
    hop = static.transport.second
    if kept is None:
        rows, (places, routes) = _deliver(static, arrived, index)
    else:
        rows, (places, routes) = arrived.rows, kept[0] or (None, arrived.routes)
    with jax.named_scope("dispatch"):
        if kept is None:
            g_rows = send(hop, places, g_rows)
        else:
            g_rows, rows = send(hop, places, (g_rows, rows))

    def one_range(index, dweights):
        route = _routing(static, arrived, routes, index)
        hidden = static.experts.forward(numbers, rows, routes.gates_WK, route)[1]
        *terms, dweights = static.experts.backward(numbers, rows, routes.gates_WK, route, hidden, g_rows, dweights)
        return tuple(terms), dweights

    with jax.named_scope("experts"):
        first = None
        if kept is not None:
            _, route, hidden = kept
            *terms, dweights = static.experts.backward(numbers, rows, routes.gates_WK, route, hidden, g_rows, dweights)
            first = tuple(terms), dweights
        terms, dweights = add_all(_count_ranges(static, arrived), first, one_range, routes.gates_WK, dweights)
    with jax.named_scope("combine"):
        return tuple(bring(hop, places, term) for term in terms), dweights


def backward_round(static: Static, arrived: Arrived, numbers, kept, g_TD, dweights):
    """Return the gradients of (rows, gates) of one round, and those of weights.

    Args:
        static, arrived, numbers: as before.
        kept: from the forward pass; None: compute all once more.
        g_TD: gradient of the sums.
        dweights: gradients of weights so far, to add to; with `kept` it may have none or some of them.
    """
    with jax.named_scope("dispatch"):
        g_rows = send(static.transport.first, arrived.places, static.experts.pack(g_TD))

    def one(index, dweights, kept=None):
        return _backward_delivery(static, arrived, numbers, g_rows, index, kept, dweights)

    first = None if kept is None else one(0, dweights, kept)
    terms, dweights = add_all(_count_deliveries(static, arrived), first, one, arrived.routes.gates_WK, dweights)
    with jax.named_scope("combine"):
        return tuple(bring(static.transport.first, arrived.places, term) for term in terms), dweights
