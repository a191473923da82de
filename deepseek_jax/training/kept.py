"""What a forward pass keeps for its backward pass, in slots: arrays of any shapes in a flat array per dtype.

A stage of a pipeline runs forward in one tick and backward in a later one, and stages differ in what they keep. So a
slot has, for each dtype, as many numbers as the largest stage needs.

    slot 0   | x_BSD | query_latent | ... | -      a middle stage
    slot 1   | x_BSD | expert_rows  | ... | ... |  the largest one

The slots pass through the switch of a tick, and a branch reads and writes just its own arrays. Compiled for GPUs
or TPUs they are buffers that are written in place, whatever the branch. XLA for CPUs copies them in every branch, which
costs the tests some time: bytes must be counted in a program for an accelerator.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import manual_axes

Store = tuple[str, int]  # a dtype, and which of its arrays
Flat = dict[Store, jax.Array]  # numbers [slots, n]

MOST_NUMBERS = 2**31 - 1  # of a slot in one array: XLA's indices are int32, and a larger one would wrap


class Item(NamedTuple):
    """One array of a slot."""

    shape: tuple[int, ...]
    dtype: Any
    axes: frozenset[str]  # mesh axes that it varies over
    store: Store  # where its numbers lie
    start: int


class Packing:
    """Where each of a list of arrays lies in a slot."""

    def __init__(self, arrays: Sequence[jax.Array]):
        self.sizes: dict[Store, int] = {}
        self.items = [self._place(array) for array in arrays]

    def _place(self, array: jax.Array) -> Item:
        dtype = jnp.dtype(array.dtype)
        name = "uint8" if dtype.itemsize == 1 else dtype.name  # E4M3 as bytes: not every backend moves it
        store = name, 0
        while self.sizes.get(store, 0) + array.size > MOST_NUMBERS and store in self.sizes:
            store = name, store[1] + 1
        start = self.sizes.get(store, 0)
        self.sizes[store] = start + array.size
        return Item(array.shape, dtype, manual_axes.varies_over(array), store, start)

    def write(self, slots: Flat, index: jax.Array, arrays: Sequence[jax.Array]) -> Flat:
        """Return the slots with `arrays` in one of them."""
        slots = dict(slots)
        for item, array in zip(self.items, arrays, strict=True):
            whole = slots[item.store]
            numbers = manual_axes.vary(_stored(array).reshape(1, -1), manual_axes.varies_over(whole))
            slots[item.store] = lax.dynamic_update_slice(whole, numbers, (index, item.start))
        return slots

    def read(self, slots: Flat, index: jax.Array) -> tuple[list[jax.Array], Flat]:
        """Return the arrays of a slot, with the mesh axes over which they varied, and the slots.

        What comes later takes these slots: nothing is written, or passed on, before all is read. Without this order XLA
        copies all slots, in every branch, if it finds a read behind a write in one.
        """
        arrays = [self._read(slots[item.store], index, item) for item in self.items]
        return lax.optimization_barrier((arrays, slots))

    def _read(self, whole: jax.Array, index: jax.Array, item: Item) -> jax.Array:
        numbers = lax.dynamic_slice(whole, (index, item.start), (1, math.prod(item.shape)))
        array = manual_axes.invariant(numbers.reshape(item.shape))
        return manual_axes.vary(_restored(array, item.dtype), item.axes)


def empty(packings: Sequence[Packing], num_slots: int, axes: frozenset[str]) -> Flat:
    """Return so many slots, each of the size of the largest packing; they vary over `axes`."""
    stores = sorted({store for packing in packings for store in packing.sizes}) if num_slots else []
    largest = {store: max(packing.sizes.get(store, 0) for packing in packings) for store in stores}
    return {store: manual_axes.vary(jnp.zeros((num_slots, n), store[0]), axes) for store, n in largest.items()}


def _stored(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    return lax.bitcast_convert_type(array, jnp.uint8) if array.dtype.itemsize == 1 else array


def _restored(array: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return array != 0
    return lax.bitcast_convert_type(array, dtype) if dtype.itemsize == 1 else array
