"""The arrays of a model on this process's devices, as matrices (`slices`), while the rows of a checkpoint's tensors are
written into them.

An accelerator's are donated to each write. A CPU's are NumPy's, which JAX takes over as they are. Scales and vectors, a
thousandth of the bytes and half of the tensors, are put together on the host for any device.
"""

import functools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.huggingface.names import Tensor
from deepseek_jax.huggingface.slices import held, ranges_of
from deepseek_jax.safetensors.reader import aligned
from pallas_kernels.quantized import E4M3, GROUP

Key = tuple[str, ...]
STRIP = 16  # columns
HOST_PLATFORMS = {"cpu"}  # whose arrays lie in the memory of the host


class Part(NamedTuple):
    """One array of the result: a leaf, or the values or scales of one in FP8.

    Attributes:
        matrices: shape of a shard as matrices (`slices`).
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
        indices = part.sharding.addressable_devices_indices_map(part.shape)
        self.ranges = {device: ranges_of(index, part.shape) for device, index in indices.items()}
        # FP8 as bytes: to write one tensor, XLA:CPU would convert the whole buffer to FP16 and back.
        self.dtype = np.dtype(np.uint8 if part.dtype == E4M3 else part.dtype)
        self.on_host = part.small or all(device.platform in HOST_PLATFORMS for device in self.ranges)
        self.locks = {device: threading.Lock() for device in self.ranges}  # a shard is donated to each write
        self.shards: dict[jax.Device, Any] = {}
        self.programs: dict[tuple, Future] = {}
        if self.on_host:
            size = math.prod(part.matrices) * self.dtype.itemsize
            self.shards = {
                device: aligned(size, np.zeros).view(self.dtype).reshape(part.matrices) for device in self.ranges
            }

    def holders(self, tensor: Tensor) -> tuple[jax.Device, ...]:
        """Return the devices that hold a part of the tensor."""
        return tuple(
            device for device, ranges in self.ranges.items() if held(tensor, ranges, self.part.shape) is not None
        )

    def prepare(self, compilers: Executor, tensor: Tensor, rows: range, dtype: np.dtype, scaled: bool) -> None:
        """Have the programs compiled that `put` needs for some rows of a tensor."""
        if self.on_host:
            return
        shape = (len(rows), *tensor.shape[1:])
        values = np.broadcast_to(np.zeros((), np.uint8 if self.part.dtype == E4M3 else dtype), shape)  # takes no memory
        for block in self._blocks(tensor, values, rows.start):
            key = self._program(block, tensor, scaled)
            if key not in self.programs:
                self.programs[key] = compilers.submit(_compiled, self.part.matrices, self.dtype, tensor, *key)

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
        for block in self._blocks(tensor, values, first_row):
            *lead, row, column = block.start
            if self.on_host:
                rows, columns = block.values.shape
                copy_matrix(
                    self.shards[block.device][tuple(lead)][row : row + rows, column : column + columns],
                    block.values,
                    block.device,
                )
                continue
            # A GPU transposes faster than its host.
            sent = jax.block_until_ready(
                jax.device_put(block.values.T if tensor.transposed else block.values, block.device)
            )
            factors = None if scales is None else (*map(np.int32, block.first), np.ascontiguousarray(scales.T))
            write = self.programs[self._program(block, tensor, scales is not None)].result()
            with self.locks[block.device]:
                written = write(self.shards[block.device], sent, tuple(map(np.int32, block.start)), factors)
                self.shards[block.device] = jax.block_until_ready(
                    written
                )  # or chunks would wait in line, as many as were read

    def _blocks(self, tensor: Tensor, values: np.ndarray, first_row: int) -> Iterator["_Block"]:
        """Divide rows of a tensor over the devices."""
        matrix = values.T if tensor.transposed else values.reshape(len(values), -1)
        at = (0, first_row) if tensor.transposed else (first_row, 0)  # in the tensor's matrix
        for device, ranges in self.ranges.items():
            inside = held(tensor, ranges, self.part.shape)
            if inside is None:
                continue
            rows, columns = (
                range(max(kept.start, start), min(kept.stop, start + size))
                for kept, start, size in zip((inside.rows, inside.columns), at, matrix.shape, strict=True)
            )
            if rows and columns:
                *lead, row, column = inside.start
                block = matrix[rows.start - at[0] : rows.stop - at[0], columns.start - at[1] : columns.stop - at[1]]
                start = (*lead, row + rows.start - inside.rows.start, column + columns.start - inside.columns.start)
                yield _Block(device, block, start, (rows.start, columns.start))

    def _program(self, block: "_Block", tensor: Tensor, scaled: bool) -> tuple:
        return block.device, block.values.shape, block.values.dtype, tensor.scale_shape if scaled else None


class _Block(NamedTuple):
    """What a device gets: a matrix, where it begins in the shard, and where in the tensor's matrix."""

    device: jax.Device
    values: np.ndarray
    start: tuple[int, ...]
    first: tuple[int, int]


def _compiled(
    buffer: tuple[int, ...], buffer_dtype, tensor: Tensor, device, block: tuple[int, int], dtype, scales
) -> Any:
    """Compile `_write` for a block on a device; `scales` is the shape of the scales as stored, if there are any."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    sent = block[::-1] if tensor.transposed else block
    index = jax.ShapeDtypeStruct((), jnp.int32)
    factors = None if scales is None else (index, index, jax.ShapeDtypeStruct(scales[::-1], jnp.float32))
    arrays = (
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in ((buffer, buffer_dtype), (sent, dtype))
    )
    return _write.lower(*arrays, (index,) * len(buffer), factors, tensor.transposed).compile()


def allocate(parts: dict[Key, Part]) -> dict[Key, Buffers]:
    """Make the arrays, zeros, with one program per device."""
    buffers = {key: Buffers(part) for key, part in parts.items()}
    elsewhere = [buffer for buffer in buffers.values() if not buffer.on_host]
    for device in elsewhere[0].ranges if elsewhere else ():
        with jax.default_device(device):
            zeros = _zeros(tuple((buffer.part.matrices, buffer.dtype) for buffer in elsewhere))
        for buffer, shard in zip(elsewhere, zeros, strict=True):
            buffer.shards[device] = shard
    return buffers


def hand_over(buffers: dict[Key, Buffers]) -> dict[Key, jax.Array]:
    """Return the arrays in their own shapes and dtypes; nothing can be written any more."""
    found: dict[Key, list[jax.Array]] = {key: [] for key in buffers}
    final = {
        key: (np.dtype(buffer.part.dtype), buffer.part.sharding.shard_shape(buffer.part.shape))
        for key, buffer in buffers.items()
    }
    for device in next(iter(buffers.values())).ranges:
        elsewhere = [key for key, buffer in buffers.items() if not buffer.on_host]
        whole = (
            _as([buffers[key].shards.pop(device) for key in elsewhere], tuple(final[key] for key in elsewhere))
            if elsewhere
            else []
        )
        for key, array in zip(elsewhere, whole, strict=True):
            found[key].append(array)
        for key, buffer in buffers.items():
            if buffer.on_host:
                dtype, shape = final[key]
                found[key].append(jax.device_put(buffer.shards.pop(device).view(dtype).reshape(shape), device))
    parts = {key: buffer.part for key, buffer in buffers.items()}
    return {
        key: jax.make_array_from_single_device_arrays(parts[key].shape, parts[key].sharding, arrays)
        for key, arrays in found.items()
    }


def copy_matrix(target: np.ndarray, source: np.ndarray, device: jax.Device) -> None:
    """`target[...] = source` of two matrices on the host, of which `source` may be transposed."""
    source = in_order(source, device)
    if source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for at in range(
        0, source.shape[1], STRIP
    ):  # whose lines of cache are used whole: 1.1 GB/s, 2.3 of FP32, where at once 0.5
        target[:, at : at + STRIP] = source[:, at : at + STRIP]


def in_order(matrix: np.ndarray, device: jax.Device) -> np.ndarray:
    """Return a transposed matrix in its own memory order, where XLA does that faster than `copy_matrix`: 2 GB/s of E4M3
    or BF16.
    """
    transposed = matrix.strides[0] < matrix.strides[1]
    return (
        np.asarray(jax.device_put(matrix, device))
        if transposed and matrix.itemsize < 4 and device.platform == "cpu"
        else matrix
    )


def _converted(values: np.ndarray, first_row: int, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor as stored, in another dtype."""
    return values.astype(dtype) if values.ndim == 1 else np.asarray(_multiplied(values, first_row, scales, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _zeros(arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in arrays]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _as(shards: list[jax.Array], final: tuple[tuple[Any, tuple[int, ...]], ...]) -> list[jax.Array]:
    return [
        jax.lax.bitcast_convert_type(shard, dtype).reshape(shape)
        for shard, (dtype, shape) in zip(shards, final, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=3)
def _multiplied(values: jax.Array, first_row: jax.Array, scales: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows of a matrix, times the scales of its blocks."""
    if scales is not None:
        values = values.astype(jnp.float32) * _factors(scales, first_row, 0, values.shape)
    return values.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(buffer, block, start, factors, transposed):
    """Put a block into `buffer`; `factors` are the first row and column of the block in its matrix, and the scales of
    that.
    """
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
