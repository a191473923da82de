"""What a forward pass keeps for its backward pass, in slots: arrays of any shapes in one flat array per dtype.

A stage of a pipeline runs forward in one tick and backward in a later one, and stages differ in what they keep. So a
slot has, for each dtype, as many numbers as the largest stage needs.

    slot 0   | x_BSD | query_latent | ... | -      a middle stage
    slot 1   | x_BSD | expert_rows  | ... | ... |  the largest one

Slots are read before the switch of a tick and written after it. If buffers passed through the branches, XLA would copy
all their slots in each of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import manual_axes

Flat = dict[str, jax.Array]  # numbers by dtype: [n] of a slot, [slots, n] of all


class Item(NamedTuple):
    """One array of a slot."""

    shape: tuple[int, ...]
    dtype: Any
    axes: frozenset[str]  # mesh axes that it varies over
    store: str  # the dtype of its numbers in the slot
    start: int


class Packing:
    """Where each of a list of arrays lies in a slot."""

    def __init__(self, arrays: Sequence[jax.Array]):
        self.sizes: dict[str, int] = {}
        self.items = [self._place(array) for array in arrays]

    def _place(self, array: jax.Array) -> Item:
        dtype = jnp.dtype(array.dtype)
        store = "uint8" if dtype.itemsize == 1 else dtype.name  # E4M3 as bytes: not every backend moves it
        start = self.sizes.get(store, 0)
        self.sizes[store] = start + array.size
        return Item(array.shape, dtype, manual_axes.varies_over(array), store, start)

    def pack(self, arrays: Sequence[jax.Array], like: Flat) -> Flat:
        """Return a slot with `arrays`, as large and as varying as `like`."""
        parts: dict[str, list[jax.Array]] = {store: [] for store in like}
        for item, array in zip(self.items, arrays, strict=True):
            parts[item.store].append(_stored(array).ravel())
        slot = {}
        for store, whole in like.items():
            axes = manual_axes.varies_over(whole)
            rest = jnp.zeros((whole.size - self.sizes.get(store, 0),), whole.dtype)
            slot[store] = jnp.concatenate([manual_axes.vary(part, axes) for part in (*parts[store], rest)])
        return slot

    def unpack(self, slot: Flat) -> list[jax.Array]:
        """Return the arrays of a slot, with the mesh axes over which they varied."""
        return [self._unpack(slot[item.store], item) for item in self.items]

    def _unpack(self, numbers: jax.Array, item: Item) -> jax.Array:
        flat = lax.slice(numbers, (item.start,), (item.start + math.prod(item.shape),))
        array = manual_axes.invariant(flat.reshape(item.shape))
        return manual_axes.vary(_restored(array, item.dtype), item.axes)


def empty(packings: Sequence[Packing], num_slots: int, axes: frozenset[str]) -> Flat:
    """Return so many slots, each of the size of the largest packing; they vary over `axes`."""
    stores = sorted({store for packing in packings for store in packing.sizes}) if num_slots else []
    largest = {store: max(packing.sizes.get(store, 0) for packing in packings) for store in stores}
    return {store: manual_axes.vary(jnp.zeros((num_slots, n), store), axes) for store, n in largest.items()}


def read(slots: Flat, index: jax.Array) -> Flat:
    """Return one slot."""
    return {store: lax.dynamic_index_in_dim(a, index, keepdims=False) for store, a in slots.items()}


def write(slots: Flat, slot: Flat, index: jax.Array) -> Flat:
    """Return the slots with one of them replaced."""
    return {store: lax.dynamic_update_index_in_dim(a, slot[store], index, 0) for store, a in slots.items()}


def _stored(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    return lax.bitcast_convert_type(array, jnp.uint8) if array.dtype.itemsize == 1 else array


def _restored(array: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return array != 0
    return lax.bitcast_convert_type(array, dtype) if dtype.itemsize == 1 else array
