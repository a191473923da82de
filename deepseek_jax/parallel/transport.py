"""How rows move between devices: out to the devices of their experts, and sums of what these make of them back.

A token is sent once to a device, however many of its experts live there. `Transport` says over which axes, in one hop
or in two, and `Sending` which rows go, in one round. `send` and `bring` are each other's transpose:

    send(rows)     row t goes to every device that it is for
    bring(y)       sum over those devices of what each made of row t, in FP32

First hop, over P devices. If a token is for most of them, all rows go to all (an all-gather; then no row needs an
index). Otherwise each pair of devices has room for `capacity` rows, and rows beyond it wait for the next round. T rows
for one pair are the most that can be, so there are at most T / capacity rounds.

Second hop, in "two_hop": the first goes over the slow axis, `node`, to the device of the same index there. That device
hands all that arrived to its neighbours in the node, over the fast axis. So a token crosses the slow axis once per node
(DeepSeek-V3 section 3.2.2), and on the way back a node sends one sum.

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


class Sending(NamedTuple):
    """The rows of one round. There is none where all rows go to all devices."""

    source_W: jax.Array  # the token that fills each place [device, capacity], T where empty
    slots_TK: jax.Array  # the place of each assignment's token; W where another assignment of it has it, or none


def choose(name: str, num_tokens: int, k: int, groups: tuple[int, int], slack: float) -> Transport:
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
    parts = math.prod(lax.axis_size(axis) for axis in first)
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


def hop_of(transport: Transport, device_TK: jax.Array) -> jax.Array:
    """Return the device of the first hop for each assignment; -1 stays."""
    inside = math.prod(lax.axis_size(axis) for axis in transport.second)
    return jnp.where(device_TK < 0, -1, device_TK // inside)


def positions(transport: Transport, hop_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return, for each assignment, the position of its token among the rows for the same device, and whether it is the
    first assignment of its token for that device; its row goes once.
    """
    parts = math.prod(lax.axis_size(axis) for axis in transport.first)
    wanted_TP = (hop_TK[..., None] == jnp.arange(parts)).any(1)
    position_TP = jnp.cumsum(wanted_TP, axis=0, dtype=jnp.int32) - 1
    position_TK = jnp.take_along_axis(position_TP, jnp.maximum(hop_TK, 0), axis=1)
    same = hop_TK[:, :, None] == hop_TK[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    return position_TK, ~(same & earlier).any(2) & (hop_TK >= 0)


def sending(
    transport: Transport, capacity: int, hop_TK: jax.Array, position_TK: jax.Array, first_TK: jax.Array, index: Any
) -> Sending:
    """Return the rows of round `index`, in which each pair of devices has room for `capacity` rows."""
    num_places = capacity * math.prod(lax.axis_size(axis) for axis in transport.first)
    now = first_TK & (position_TK // capacity == index)
    slots_TK = jnp.where(now, hop_TK * capacity + position_TK % capacity, num_places)
    num_tokens, k = hop_TK.shape
    token = jnp.arange(num_tokens * k, dtype=jnp.int32) // k
    empty = vary(jnp.full((num_places,), num_tokens, jnp.int32), slots_TK)
    source_W = empty.at[slots_TK.reshape(-1)].set(token, mode="drop", unique_indices=True)
    return Sending(source_W, slots_TK)


def send(transport: Transport, sending: Sending | None, rows: Any, fill: int = 0) -> Any:
    """Send rows [T, ...] (an array, or `Quantized` tiles) to the devices that they are for; return those that arrive.

    `fill` is what an empty place has in an array of integers.
    """
    if not transport.first:
        return rows
    if sending is None:
        arrived = _each_part(lambda part, dim: _gather(part, transport.first, dim), rows)
    else:
        if jnp.issubdtype(getattr(rows, "dtype", jnp.float32), jnp.integer):
            out = jnp.take(rows, sending.source_W, axis=0, mode="fill", fill_value=fill)
        else:
            out = take_rows(rows, sending.source_W)
        arrived = _each_part(lambda part, dim: _swap(part, transport.first, dim), out)
    if transport.second:
        arrived = _each_part(lambda part, dim: _gather(part, transport.second, dim), arrived)
    return arrived


def bring(transport: Transport, sending: Sending | None, y_WD: jax.Array) -> jax.Array:
    """Return the sums [T, D] of what the devices made of this device's rows: the transpose of `send`."""
    if not transport.first:
        return y_WD
    if transport.second:
        y_WD = _sum_parts(y_WD, transport.second)
    if sending is None:
        return _sum_parts(y_WD, transport.first)
    return sum_rows(_swap(y_WD, transport.first, 0), sending.slots_TK)


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
    parts = math.prod(lax.axis_size(axis) for axis in axes)
    arrived = _swap(y_WD, axes, 0).reshape(parts, -1, *y_WD.shape[1:])
    return arrived.astype(jnp.float32).sum(0).astype(y_WD.dtype)
