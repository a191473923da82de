"""Which slot of which device an assignment of a token to an expert takes: every sender knows it before it sends.

The rows of a device are multiplied in the order of its experts, and zeros fill the rows of each expert up to a multiple
of a unit. All devices tell each other how many assignments they have for every expert. So a sender knows

    first slot of the expert  +  assignments to it of the senders before  +  assignments to it of the tokens before

and no device sorts what arrives. The order is that of all tokens in one batch, whatever the mesh.

Worked example, one device, unit = 2, six assignments to experts [1 0 1 1 2 1]:

    sorted by expert      0: [1]   1: [0 2 3 5]   2: [4]
    slots                 2 0 3 4 6 5               (where each assignment goes)
    source                1 6 0 2 3 5 4 6           (which fills a slot; 6 = empty)

Slots are an array of fixed size, sized for a multiple of the balanced load. If more are taken, a device works through
them a range of that size at a time (`Range`), on its own: no collective is inside.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import vary


class Assigned(NamedTuple):
    """Where the assignments of this device's tokens go."""

    device_TK: jax.Array  # int32, along the axes of the experts; -1: nowhere
    slot_TK: jax.Array  # int32, on that device
    rows_E: jax.Array  # slots of each expert that lives here, empty ones included
    told_RX: jax.Array | None = None  # what each device tells all others besides


class Routing(NamedTuple):
    """The rows that are here, in the order of slots. Z = number of slots."""

    source_Z: jax.Array  # assignment in each slot, W * K where empty
    slots_WK: jax.Array  # slot of each assignment, Z where it has none
    rows_E: jax.Array  # slots of each expert, empty ones included

    @property
    def row_Z(self) -> jax.Array:
        """The row that fills each slot; W where empty."""
        return self.source_Z // self.slots_WK.shape[1]

    def to_slots(self, gates_WK: jax.Array) -> jax.Array:
        """Return a number of each assignment as one of each slot, 0 where empty."""
        return jnp.take(gates_WK.reshape(-1), self.source_Z, mode="fill", fill_value=0)

    def to_assignments(self, number_Z: jax.Array) -> jax.Array:
        """Return a number of each slot as one of each assignment [W, K], 0 without a slot: the transpose."""
        return jnp.take(number_Z, self.slots_WK, mode="fill", fill_value=0)


def assign(
    experts_TK: jax.Array, num_experts: int, unit: int, axes: Sequence[str], to_tell_X: jax.Array | None = None
) -> Assigned:
    """Give each assignment a slot.

    Args:
        experts_TK: global expert ids, int32; others than [0, num_experts) go nowhere.
        num_experts: E, over all devices of `axes`.
        unit: slots of an expert are a multiple of it.
        axes: mesh axes that hold the experts; () if all are here.
        to_tell_X: int32 numbers that travel with the counts.
    """
    flat = experts_TK.reshape(-1)
    there = (flat >= 0) & (flat < num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1), method="compare_all").astype(jnp.int32)
    count_E = jnp.diff(bounds)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    told = count_E if to_tell_X is None else jnp.concatenate([count_E, to_tell_X])
    told = lax.all_gather(told, axes) if axes else told[None]
    count_RE, told_RX = (told, None) if to_tell_X is None else (told[:, :num_experts], told[:, num_experts:])
    me = lax.axis_index(axes) if axes else 0
    parts = count_RE.shape[0]
    before_E = jnp.where(jnp.arange(parts)[:, None] < me, count_RE, 0).sum(0, dtype=jnp.int32)
    rows_RE = (-(-count_RE.sum(0, dtype=jnp.int32) // unit) * unit).reshape(parts, -1)
    first_E = (jnp.cumsum(rows_RE, axis=1, dtype=jnp.int32) - rows_RE).reshape(-1)
    expert = jnp.clip(flat, 0, num_experts - 1)
    slot = (first_E + before_E - bounds[:-1])[expert] + rank
    device = jnp.where(there, expert // rows_RE.shape[1], -1)
    return Assigned(device.reshape(experts_TK.shape), slot.reshape(experts_TK.shape), rows_RE[me], told_RX)


def num_ranges(rows_E: jax.Array, num_slots: int) -> jax.Array:
    """Return how many ranges of `num_slots` the slots of this device need."""
    return (rows_E.sum() + num_slots - 1) // num_slots


def routing(
    device_WK: jax.Array,
    slot_WK: jax.Array,
    rows_E: jax.Array,
    num_slots: int,
    index: jax.Array | int,
    me: jax.Array | int,
) -> Routing:
    """Return the routing of range `index` of this device's slots.

    Args:
        device_WK, slot_WK: of the rows that are here, as their senders assigned them.
        rows_E: of this device.
        num_slots: of a range: a multiple of the unit.
        index: of the range.
        me: this device along the axes of the experts.
    """
    start = index * num_slots
    slot = slot_WK - start
    here = (device_WK == me) & (slot >= 0) & (slot < num_slots)
    slots_WK = jnp.where(here, slot, num_slots)
    empty = vary(jnp.full((num_slots,), slots_WK.size, jnp.int32), slots_WK)
    source_Z = empty.at[slots_WK.reshape(-1)].set(
        jnp.arange(math.prod(slots_WK.shape), dtype=jnp.int32), mode="drop", unique_indices=True
    )
    end_E = jnp.cumsum(rows_E)
    inside_E = jnp.clip(end_E - start, 0, num_slots) - jnp.clip(end_E - rows_E - start, 0, num_slots)
    return Routing(source_Z, slots_WK, inside_E.astype(jnp.int32))
