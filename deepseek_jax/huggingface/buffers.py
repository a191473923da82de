"""The arrays of a model on this process's devices, as matrices (`places`), while the rows of a checkpoint's tensors are written into them.

An accelerator's are donated to each write. A CPU's are NumPy's, which JAX takes over as they are. Scales and vectors, a thousandth of the
bytes and half of the tensors, are put together on the host for any device.
"""

import functools
import math
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.huggingface.names import Tensor
from deepseek_jax.huggingface.pieces import aligned
from deepseek_jax.huggingface.places import held
from pallas_kernels.quantized import E4M3, GROUP

Key = tuple[str, ...]
STRIP = 32  # columns


class Part(NamedTuple):
    """One array of the result: a leaf, or the values or scales of one in FP8.

    Attributes:
        matrices: shape of a shard as matrices (`places`).
        small: scales or vectors, a thousandth of the bytes.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.NamedSharding
    matrices: tuple[int, ...]
    small: bool


class Buffers:
    """The shards of one array, being filled."""

    def __init__(self, part: Part):
        self.part = part
        self.indices = part.sharding.addressable_devices_indices_map(part.shape)
        # FP8 as bytes: to write one tensor, XLA:CPU would convert the whole buffer to FP16 and back.
        self.dtype = np.dtype(np.uint8 if part.dtype == E4M3 else part.dtype)
        self.on_host = part.small or all(device.platform == "cpu" for device in self.indices)
        self.locks = {device: threading.Lock() for device in self.indices}  # a shard is donated to each write
        self.shards: dict[jax.Device, Any] = {}
        if self.on_host:
            size = math.prod(part.matrices) * self.dtype.itemsize
            self.shards = {device: aligned(size, np.zeros).view(self.dtype).reshape(part.matrices) for device in self.indices}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a part of the tensor belongs to one of these shards."""
        return any(held(tensor, index, self.part.shape) is not None for index in self.indices.values())

    def put(self, tensor: Tensor, values: np.ndarray, first_row: int, scales: np.ndarray | None) -> None:
        """Write what each device holds of some rows of a tensor.

        Args:
            tensor: of the table, or the scales of one.
            values: rows as stored, from `first_row` on.
            first_row: of `values`.
            scales: of the whole tensor as stored, to multiply by.
        """
        values = values.view(np.uint8) if self.part.dtype == E4M3 else values
        if self.on_host and (scales is not None or values.dtype != self.dtype):
            values, scales = _converted(values, first_row, scales, self.dtype), None
        matrix = values.T if tensor.transposed else values.reshape(len(values), -1)
        first = (0, first_row) if tensor.transposed else (first_row, 0)
        for device, index in self.indices.items():
            inside = held(tensor, index, self.part.shape)
            if inside is None:
                continue
            # In the tensor's matrix: what is here of what is held.
            rows, columns = (
                range(max(kept.start, at), min(kept.stop, at + size))
                for kept, at, size in zip((inside.rows, inside.columns), first, matrix.shape, strict=True)
            )
            if not rows or not columns:
                continue
            block = matrix[rows.start - first[0] : rows.stop - first[0], columns.start - first[1] : columns.stop - first[1]]
            *lead, row, column = inside.start
            start = (*lead, row + rows.start - inside.rows.start, column + columns.start - inside.columns.start)
            if self.on_host:
                place = self.shards[device][tuple(lead)]
                copy_matrix(place[start[-2] : start[-2] + len(rows), start[-1] : start[-1] + len(columns)], block)
            else:
                self._send(device, block, tensor.transposed, start, (rows.start, columns.start), scales)

    def _send(self, device, block, transposed, start, first, scales) -> None:
        # A GPU transposes faster than its host.
        sent = jax.block_until_ready(jax.device_put(block.T if transposed else block, device))
        factors = None if scales is None else (np.int32(first[0]), np.int32(first[1]), scales.T)
        with self.locks[device]:
            written = _write(self.shards[device], sent, tuple(map(np.int32, start)), transposed, factors)
            self.shards[device] = jax.block_until_ready(written)  # or pieces would wait in line, as many as were read


def allocate(parts: dict[Key, Part]) -> dict[Key, Buffers]:
    """Make the arrays, zeros, with one program per device."""
    buffers = {key: Buffers(part) for key, part in parts.items()}
    elsewhere = [buffer for buffer in buffers.values() if not buffer.on_host]
    for device in elsewhere[0].indices if elsewhere else ():
        with jax.default_device(device):
            zeros = _zeros(tuple((buffer.part.matrices, buffer.dtype) for buffer in elsewhere))
        for buffer, shard in zip(elsewhere, zeros, strict=True):
            buffer.shards[device] = shard
    return buffers


def hand_over(buffers: dict[Key, Buffers]) -> dict[Key, jax.Array]:
    """Return the arrays in their own shapes and dtypes; nothing can be written any more."""
    found: dict[Key, list[jax.Array]] = {key: [] for key in buffers}
    final = {key: (np.dtype(buffer.part.dtype), buffer.part.sharding.shard_shape(buffer.part.shape)) for key, buffer in buffers.items()}
    for device in next(iter(buffers.values())).indices:
        elsewhere = [key for key, buffer in buffers.items() if not buffer.on_host]
        whole = _as([buffers[key].shards.pop(device) for key in elsewhere], tuple(final[key] for key in elsewhere)) if elsewhere else []
        for key, array in zip(elsewhere, whole, strict=True):
            found[key].append(array)
        for key, buffer in buffers.items():
            if buffer.on_host:
                dtype, shape = final[key]
                found[key].append(jax.device_put(buffer.shards.pop(device).view(dtype).reshape(shape), device))
    parts = {key: buffer.part for key, buffer in buffers.items()}
    return {key: jax.make_array_from_single_device_arrays(parts[key].shape, parts[key].sharding, arrays) for key, arrays in found.items()}


def copy_matrix(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` of two matrices; a transposed source in strips, whose lines of cache are used whole (3x as fast)."""
    if source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for at in range(0, source.shape[1], STRIP):
        target[:, at : at + STRIP] = source[:, at : at + STRIP]


def _converted(values: np.ndarray, first_row: int, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor as stored, in another dtype."""
    return values.astype(dtype) if values.ndim == 1 else np.asarray(_multiplied(values, first_row, scales, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _zeros(arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in arrays]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _as(shards: list[jax.Array], final: tuple[tuple[Any, tuple[int, ...]], ...]) -> list[jax.Array]:
    return [jax.lax.bitcast_convert_type(shard, dtype).reshape(shape) for shard, (dtype, shape) in zip(shards, final, strict=True)]


@functools.partial(jax.jit, static_argnums=3)
def _multiplied(values: jax.Array, first_row: jax.Array, scales: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows of a matrix, times the scales of its blocks."""
    if scales is not None:
        values = values.astype(jnp.float32) * _factors(scales, first_row, 0, values.shape)
    return values.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(buffer, block, start, transposed, factors):
    """Put a block into `buffer`; `factors` are the first row and column of the block in its matrix, and the scales of that."""
    block = block.T if transposed else block
    if factors is not None:
        first_row, first_column, scales = factors
        block = block.astype(jnp.float32) * _factors(scales, first_row, first_column, block.shape)
    block = block.reshape((1,) * (buffer.ndim - 2) + block.shape)
    return jax.lax.dynamic_update_slice(buffer, block.astype(buffer.dtype), start)


def _factors(scales: jax.Array, first_row: jax.Array, first_column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The scale of every number of a block of a matrix."""
    rows, columns = (first_row + jnp.arange(shape[0])) // GROUP, (first_column + jnp.arange(shape[1])) // GROUP
    return scales[rows][:, columns]
