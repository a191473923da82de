"""How rows move between devices: out to the devices of their experts, and sums of what these make of them back.

A token is sent once to a device, however many of its experts live there. `Transport` says in which hops, and `Places`
which rows a hop takes in one round. Of every hop, `send` and `bring` are each other's transpose:

    send(rows)     row t goes to every device of the hop that it is for
    bring(y)       sum over those devices of what each made of row t, in FP32

One hop has P devices. If a row is for most of them, all rows go to all (an all-gather; then no row needs an index).
Otherwise each pair of devices has room for `capacity` rows, and rows beyond it wait for the next round.

"dense" is one hop over all devices that share the experts. "two_hop" goes over the slow axis first, `node`, to the
device of the same index there. So a token crosses the slow axis once per node (DeepSeek-V3 section 3.2.2), and on the
way back a node sends one sum. That device reads in the routes, which travel with the rows, who in its node wants which
row, and hands it on over the fast axis. The second hop has room and rounds of its own: each round of the first is
followed by as many of the second as its fullest pair of devices needs. Example, 2 nodes of 2 devices, three tokens of
device (0, 0), whose experts are on

    token 0: (0, 0) (1, 1)      to itself; to (1, 0), which hands it to (1, 1)
    token 1: (1, 0) (1, 1)      once to (1, 0), which keeps it and hands it to (1, 1)
    token 2: (0, 1)             stays in the first hop; (0, 0) hands it to (0, 1)

(1, 0) has two rows for (1, 1). If the second hop has room for one row a pair, token 1 comes in its second round.

How many rounds there are follows from counts that every device tells all others beforehand (`rounds_to_tell`), so all
devices of the exchange agree on them.

On the wire, rows are what the experts read: E4M3, or BF16. All that is narrow travels beside them in one array of
words: scales, and what is told of each assignment. (Behind the rows, in the same array, it would save one launch, about
15 us, and cost one pass over all rows that arrive: 0.12 ms for 268 MB on an H200.) Sums are in the dtype of the
experts' results, added in FP32.

What lost: one row per assignment (8 copies, room for twice the balanced load, in BF16: five times the bytes; four H200s
spent 231 of 660 ms on it); all rows to all devices of a node in the second hop (V3 on 8 nodes of 8: four times the
bytes and the rows); `lax.ragged_all_to_all` (1.0 to 25 times as slow as this, and absent on CPUs).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.rows import sum_rows, take_bytes, take_rows
from deepseek_jax.parameters import EXPERTS
from pallas_kernels.quantized import ROW_ALIGNMENT, Quantized


class Hop(NamedTuple):
    """One move of rows between the devices along some axes; static.

    Attributes:
        axes: of the mesh; () if nothing moves.
        capacity: rows for one device in one round; None: all rows go to all devices.
    """

    axes: tuple[str, ...]
    capacity: int | None

    @property
    def parts(self) -> int:
        """How many devices it joins."""
        return math.prod(lax.axis_size(axis) for axis in self.axes)


class Transport(NamedTuple):
    """The way of rows: one hop after the other; static. Without a first hop there is no second."""

    first: Hop
    second: Hop


class Rounds(NamedTuple):
    """Which rows wait for which round of a hop, where a pair of devices has no room for all."""

    part_TK: jax.Array  # device of the hop of each assignment, -1: nowhere
    position_TK: jax.Array  # of its token among the rows for that device
    first_TK: jax.Array  # bool: no earlier assignment of its token is for that device; the row goes once
    fullest: jax.Array  # rows for the device that gets the most


class Places(NamedTuple):
    """The rows of one round of a hop, [device, capacity] of them."""

    token_W: jax.Array  # the token whose row fills each place, T where empty
    place_TK: jax.Array  # where the row of each assignment's token is; W: another assignment says it, or nowhere


class Routes(NamedTuple):
    """What each assignment of a row is; it travels with the row."""

    gates_WK: jax.Array  # FP32
    device_WK: jax.Array  # int32, along the axes of the experts; -1: nowhere
    slot_WK: jax.Array  # int32, on that device


def choose_transport(name: str, num_tokens: int, k: int, groups: tuple[int, int], slack: float) -> Transport:
    """Return the transport for `num_tokens` rows per device.

    Args:
        name: "local", "dense" or "two_hop".
        num_tokens: T.
        k: experts of a token.
        groups: as in `most_copies`.
        slack: room for one pair of devices, in multiples of the balanced number.
    """
    nothing = Hop((), None)
    if name == "local":
        return Transport(nothing, nothing)

    def hop(axes, places, num_rows):
        """Return the hop of `num_rows` rows where tokens are for at most so many `places`, wherever they come from."""
        parts = Hop(axes, None).parts
        room = slack * num_tokens * most_copies(places, k, groups) / parts
        room = math.ceil(room / ROW_ALIGNMENT) * ROW_ALIGNMENT
        return Hop(axes, room if room < num_rows else None)

    everywhere = Hop(EXPERTS, None).parts
    if name == "dense":
        return Transport(hop(EXPERTS, everywhere, num_tokens), nothing)
    slow, fast = EXPERTS[:1], EXPERTS[1:]
    nodes = Hop(slow, None).parts
    first = hop(slow, nodes, num_tokens)
    arriving = nodes * (num_tokens if first.capacity is None else first.capacity)
    return Transport(first, hop(fast, everywhere, arriving) if everywhere > nodes else nothing)


def most_copies(parts: int, k: int, groups: tuple[int, int]) -> int:
    """Return for how many of `parts` devices (or nodes) a token can be at most.

    Args:
        parts: how many share the experts, each an equal and consecutive part.
        k: experts of a token.
        groups: (G, M): the experts are cut into G groups, and those of a token are in at most M. (0, 0): in any.
    """
    num_groups, kept = groups
    if num_groups and num_groups % parts == 0:
        return min(k, parts, kept)
    if num_groups and parts % num_groups == 0:
        return min(k, parts, kept * parts // num_groups)
    return min(k, parts)


def first_parts(transport: Transport, device_TK: jax.Array) -> jax.Array:
    """Return the device of the first hop that each assignment's row goes to; -1: nowhere.

    Args:
        transport: the way.
        device_TK: of each assignment's expert along `EXPERTS`; -1: nowhere.
    """
    return jnp.where(device_TK < 0, -1, device_TK // transport.second.parts)


def second_parts(transport: Transport, device_WK: jax.Array) -> jax.Array:
    """Return the same of the second hop, for rows that the first one brought here; -1: in no device of this node."""
    inside = transport.second.parts
    mine = device_WK // inside == lax.axis_index(transport.first.axes)
    return jnp.where(mine, device_WK % inside, -1)


def plan_rounds(hop: Hop, part_TK: jax.Array) -> Rounds | None:
    """Return which rows travel in which round, given the device of the hop of each assignment; None: all at once."""
    if hop.capacity is None:
        return None
    position_TP = jnp.cumsum(_wanted(part_TK, hop.parts), axis=0, dtype=jnp.int32) - 1
    position_TK = jnp.take_along_axis(position_TP, jnp.maximum(part_TK, 0), axis=1)
    earlier_KK = jnp.tril(jnp.ones((part_TK.shape[1],) * 2, bool), -1)
    repeated_TK = ((part_TK[:, :, None] == part_TK[:, None, :]) & earlier_KK).any(2)
    return Rounds(part_TK, position_TK, ~repeated_TK & (part_TK >= 0), position_TP.max() + 1)


def rounds_to_tell(transport: Transport, rounds: Rounds | None, device_TK: jax.Array) -> jax.Array | None:
    """Return the numbers by which all devices learn how many rounds there are: int32 [X], or None if there is one.

    Args:
        transport: the way.
        rounds: of the first hop.
        device_TK: of the assignments that this round of the first hop serves.
    """
    told = [] if rounds is None else [rounds.fullest[None]]
    if transport.second.capacity is not None:  # rows for every device of every node
        told.append(_wanted(device_TK, transport.first.parts * transport.second.parts).sum(0, dtype=jnp.int32))
    return jnp.concatenate(told) if told else None


def num_rounds(transport: Transport, told_RX: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return how many rounds the first hop has, and this round's second hop, from what all devices told."""
    first = second = jnp.ones((), jnp.int32)
    if told_RX is None:
        return first, second
    if transport.first.capacity is not None:
        first = -(-told_RX[:, 0].max() // transport.first.capacity)
    if transport.second.capacity is not None:
        nodes, inside = transport.first.parts, transport.second.parts
        # what device (m, i) has for device (n, j) passes (n, i): add over m
        rows = told_RX[:, -nodes * inside :].reshape(nodes, inside, nodes, inside).sum(0)
        second = -(-rows.max() // transport.second.capacity)
    return first, second


def places_of(hop: Hop, rounds: Rounds | None, index: Any) -> tuple[Places | None, jax.Array | bool]:
    """Return the rows of round `index`, and which assignments it serves: [T, K], or True for all."""
    if rounds is None or hop.capacity is None:
        return None, True
    num_places = hop.capacity * hop.parts
    serves_TK = rounds.position_TK // hop.capacity == index
    place_TK = rounds.part_TK * hop.capacity + rounds.position_TK % hop.capacity
    place_TK = jnp.where(serves_TK & rounds.first_TK, place_TK, num_places)
    num_tokens, k = place_TK.shape
    empty = vary(jnp.full((num_places,), num_tokens, jnp.int32), place_TK)
    token = jnp.arange(num_tokens * k, dtype=jnp.int32) // k
    token_W = empty.at[place_TK.reshape(-1)].set(token, mode="drop", unique_indices=True)
    return Places(token_W, place_TK), serves_TK


def send(hop: Hop, places: Places | None, rows: Any) -> Any:
    """Send rows to the devices that they are for; return those that arrive.

    Without `places` every row goes everywhere. An empty place is zeros, scales included.

    Args:
        hop: the hop.
        places: of this round.
        rows: an array [T, ...], `Quantized` tiles, or a tuple of these, whose scales then travel together.
    """
    return _send(hop, places, rows, [])[0] if hop.axes else rows


def send_routed(hop: Hop, places: Places | None, rows: Any, routes: Routes) -> tuple[Any, Routes]:
    """Send rows as `send` does, with their routes. The assignments of an empty place are for no device."""
    if not hop.axes:
        return rows, routes
    gates = lax.bitcast_convert_type(routes.gates_WK, jnp.int32)
    rows, words = _send(hop, places, rows, [gates, routes.device_WK + 1, routes.slot_WK])
    gates, device, slot = jnp.split(words, 3, axis=1)
    return rows, Routes(lax.bitcast_convert_type(gates, jnp.float32), device - 1, slot)


def bring(hop: Hop, places: Places | None, y_WD: jax.Array) -> jax.Array:
    """Return the sums [T, D] of what the devices made of this device's rows: the transpose of `send`."""
    if not hop.axes:
        return y_WD
    if places is not None:
        return sum_rows(_swap(hop, y_WD), places.place_TK)
    # Part p of the rows to device p, then a sum in FP32; a reduce-scatter would round each sum.
    arrived = _swap(hop, y_WD).reshape(hop.parts, -1, *y_WD.shape[1:])
    return arrived.astype(jnp.float32).sum(0).astype(y_WD.dtype)


def _wanted(part_TK: jax.Array, parts: int) -> jax.Array:
    """Return for which of the parts each token is: bool [T, parts]."""
    return (part_TK[..., None] == jnp.arange(parts)).any(1)


def _send(hop: Hop, places: Places | None, rows: Any, words: list[jax.Array]) -> tuple[Any, jax.Array]:
    """Send rows, and words of each (int32): an array for each kind of row, and one for scales and words."""
    kinds, tree = jax.tree.flatten(rows, is_leaf=_is_tiles)
    wide = [_move(hop, places, kind.values if _is_tiles(kind) else kind) for kind in kinds]
    scales = [lax.bitcast_convert_type(kind.scales.T, jnp.int32) for kind in kinds if _is_tiles(kind)]
    narrow = jnp.concatenate([*scales, *words], axis=1) if scales or words else jnp.zeros((0, 0), jnp.int32)
    narrow = _move(hop, places, narrow) if narrow.size else narrow
    arrived = []
    for kind, array in zip(kinds, wide, strict=True):
        if _is_tiles(kind):
            groups = kind.scales.shape[0]
            scales_GW = lax.bitcast_convert_type(narrow[:, :groups], jnp.float32).T
            array, narrow = Quantized(array, scales_GW, kind.grouping), narrow[:, groups:]
        arrived.append(array)
    return jax.tree.unflatten(tree, arrived), narrow


def _is_tiles(rows: Any) -> bool:
    return isinstance(rows, Quantized)


def _move(hop: Hop, places: Places | None, x: jax.Array) -> jax.Array:
    """Send one array; E4M3 as bytes."""
    dtype = x.dtype
    if dtype.itemsize == 1:
        x = lax.bitcast_convert_type(x if places is None else take_bytes(x, places.token_W), jnp.uint8)
    elif places is not None:
        x = take_rows(x, places.token_W)
    x = lax.all_gather(x, hop.axes, tiled=True) if places is None else _swap(hop, x)
    return lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 1 else x


def _swap(hop: Hop, x: jax.Array) -> jax.Array:
    return lax.all_to_all(x, hop.axes, 0, 0, tiled=True)
