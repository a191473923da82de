"""How rows move between devices: out to the devices of their experts, and sums of what these make of them back.

A token is sent once to a device, however many of its experts live there. `Transport` says over which axes, in one hop
or in two, and `Places` which rows go, in one round. `send` and `bring` are each other's transpose:

    send(rows)     row t goes to every device that it is for: `cross`, the first hop, then `fan_out`, the second
    bring(y)       sum over those devices of what each made of row t, in FP32

First hop, over P devices. If a token is for most of them, all rows go to all (an all-gather; then no row needs an
index). Otherwise each pair of devices has room for `capacity` rows, and rows beyond it wait for the next round. T rows
for one pair are the most that can be, so there are at most T / capacity rounds.

Second hop, in "two_hop": the first goes over the slow axis, `node`, to the device of the same index there. That device
hands all that arrived to its neighbours in the node, over the fast axis. So a token crosses the slow axis once per node
(DeepSeek-V3 section 3.2.2), and on the way back a node sends one sum. Who needs the rows once more keeps those of the
first hop, and fans them out again.

On the wire, rows are what the experts read: E4M3 with scales, or BF16. Sums are in the dtype of the experts' results,
added in FP32.

What lost: one row per assignment (8 copies, room for twice the balanced load, in BF16: five times the bytes; four H200s
spent 231 of 660 ms on it); `lax.ragged_all_to_all` (1.0 to 25 times as slow as this, and absent on CPUs).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.rows import sum_rows, take_rows
from deepseek_jax.parameters import EXPERTS
from pallas_kernels.quantized import ROW_ALIGNMENT, Quantized


class Transport(NamedTuple):
    """The way of rows; static.

    Attributes:
        first: axes of the first hop; () if every expert is here.
        second: axes of the second hop, which everything takes; () if there is none.
        capacity: rows for one device of the first hop in one round; None: all rows go to all of them.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    capacity: int | None


class Rounds(NamedTuple):
    """Which rows wait for which round, where a pair of devices has no room for all."""

    hop_TK: jax.Array  # device of the first hop of each assignment, -1: nowhere
    position_TK: jax.Array  # of its token among the rows for that device
    first_TK: jax.Array  # bool: no earlier assignment of its token is for that device; the row goes once
    num_rounds: jax.Array  # how many there are, the same on every device of the exchange


class Places(NamedTuple):
    """The rows of one round, [device, capacity] of them."""

    token_W: jax.Array  # the token whose row fills each place, T where empty
    place_TK: jax.Array  # where the row of each assignment's token is; W: another assignment says it, or nowhere


def choose_transport(name: str, num_tokens: int, k: int, groups: tuple[int, int], slack: float) -> Transport:
    """Return the transport for `num_tokens` rows per device.

    Args:
        name: "local", "dense" or "two_hop".
        num_tokens: T.
        k: experts of a token.
        groups: as in `most_copies`.
        slack: room for one pair of devices, in multiples of the balanced number.
    """
    if name == "local":
        return Transport((), (), None)
    first, second = (EXPERTS, ()) if name == "dense" else (EXPERTS[:1], EXPERTS[1:])
    if second and lax.axis_size(second) == 1:
        second = ()
    parts = _parts(first)
    room = slack * num_tokens * most_copies(parts, k, groups) / parts
    room = math.ceil(room / ROW_ALIGNMENT) * ROW_ALIGNMENT
    return Transport(first, second, room if room < num_tokens else None)


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


def plan_rounds(transport: Transport, device_TK: jax.Array) -> Rounds | None:
    """Return which rows travel in which round; None if all do at once.

    Args:
        transport: the way.
        device_TK: of each assignment's expert along `EXPERTS`; -1: nowhere.
    """
    if transport.capacity is None:
        return None
    hop_TK = jnp.where(device_TK < 0, -1, device_TK // _parts(transport.second))
    wanted_TP = (hop_TK[..., None] == jnp.arange(_parts(transport.first))).any(1)
    position_TP = jnp.cumsum(wanted_TP, axis=0, dtype=jnp.int32) - 1
    position_TK = jnp.take_along_axis(position_TP, jnp.maximum(hop_TK, 0), axis=1)
    earlier_KK = jnp.tril(jnp.ones((hop_TK.shape[1],) * 2, bool), -1)
    repeated_TK = ((hop_TK[:, :, None] == hop_TK[:, None, :]) & earlier_KK).any(2)
    count = -(-(position_TP.max() + 1) // transport.capacity)
    return Rounds(hop_TK, position_TK, ~repeated_TK & (hop_TK >= 0), lax.pmax(count, EXPERTS))


def places_of(transport: Transport, rounds: Rounds | None, index: Any) -> tuple[Places | None, jax.Array | bool]:
    """Return the rows of round `index`, and which assignments it serves: [T, K], or True for all."""
    if rounds is None or transport.capacity is None:
        return None, True
    num_places = transport.capacity * _parts(transport.first)
    serves_TK = rounds.position_TK // transport.capacity == index
    place_TK = rounds.hop_TK * transport.capacity + rounds.position_TK % transport.capacity
    place_TK = jnp.where(serves_TK & rounds.first_TK, place_TK, num_places)
    num_tokens, k = place_TK.shape
    empty = vary(jnp.full((num_places,), num_tokens, jnp.int32), place_TK)
    token = jnp.arange(num_tokens * k, dtype=jnp.int32) // k
    token_W = empty.at[place_TK.reshape(-1)].set(token, mode="drop", unique_indices=True)
    return Places(token_W, place_TK), serves_TK


def send(transport: Transport, places: Places | None, rows: Any) -> Any:
    """Send rows [T, ...] (an array, or `Quantized` tiles) to the devices that they are for; return those that arrive.

    Without `places` every row goes everywhere. An empty place is a row of zeros.
    """
    return fan_out(transport, cross(transport, places, rows))


def cross(transport: Transport, places: Places | None, rows: Any) -> Any:
    """Do the first hop of `send`."""
    if not transport.first:
        return rows
    if places is None:
        return _each_part(lambda part, dim: _gather(part, transport.first, dim), rows)
    return _each_part(lambda part, dim: _swap(part, transport.first, dim), take_rows(rows, places.token_W))


def fan_out(transport: Transport, rows: Any) -> Any:
    """Do the second hop of `send`: hand what the first one brought to all devices of the node."""
    if not transport.second:
        return rows
    return _each_part(lambda part, dim: _gather(part, transport.second, dim), rows)


def bring(transport: Transport, places: Places | None, y_WD: jax.Array) -> jax.Array:
    """Return the sums [T, D] of what the devices made of this device's rows: the transpose of `send`."""
    if not transport.first:
        return y_WD
    if transport.second:
        y_WD = _sum_parts(y_WD, transport.second)
    if places is None:
        return _sum_parts(y_WD, transport.first)
    return sum_rows(_swap(y_WD, transport.first, 0), places.place_TK)


def _parts(axes: tuple[str, ...]) -> int:
    return math.prod(lax.axis_size(axis) for axis in axes)


def _each_part(move, rows: Any) -> Any:
    """Apply `move(array, dim of its rows)` to the arrays that rows are made of; E4M3 moves as bytes."""
    if isinstance(rows, Quantized):
        values = move(lax.bitcast_convert_type(rows.values, jnp.uint8), 0)
        return Quantized(lax.bitcast_convert_type(values, rows.values.dtype), move(rows.scales, 1), rows.grouping)
    return move(rows, 0)


def _gather(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _swap(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    return lax.all_to_all(x, axes, dim, dim, tiled=True)


def _sum_parts(y_WD: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Send part p of the rows to device p, and sum what arrives in FP32; a reduce-scatter would round each sum."""
    arrived = _swap(y_WD, axes, 0).reshape(_parts(axes), -1, *y_WD.shape[1:])
    return arrived.astype(jnp.float32).sum(0).astype(y_WD.dtype)
