"""The arrays of a model on this process's devices, while the rows of a checkpoint's tensors are written into them.

They are kept as matrices (`slices`). On an accelerator an array is donated to each write. On a CPU it is a NumPy array,
which JAX takes over without a copy. Scales and vectors are a thousandth of the bytes and half of the tensors: they are
filled on the host, whatever the device.
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
from deepseek_jax.huggingface.slices import find_overlap, index_ranges
from deepseek_jax.safetensors.reader import aligned
from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3

Key = tuple[str, ...]
STRIP = 16  # columns that are transposed at once
HOST_PLATFORMS = {"cpu"}  # arrays of these devices lie in the memory of the host


class ArraySpec(NamedTuple):
    """One array of the result: a leaf, or the values or the scales of a leaf in FP8.

    Attributes:
        matrices: shape of a shard as matrices.
        small: whether it holds scales or vectors.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.NamedSharding
    matrices: tuple[int, ...]
    small: bool


class DeviceArray:
    """One array while it is filled: a shard for each device of this process."""

    def __init__(self, spec: ArraySpec):
        self.spec = spec
        indices = spec.sharding.addressable_devices_indices_map(spec.shape)
        self.ranges = {device: index_ranges(index, spec.shape) for device, index in indices.items()}
        # FP8 as bytes: to write one tensor, XLA:CPU would convert the whole shard to FP16 and back.
        self.dtype = np.dtype(np.uint8 if spec.dtype == E4M3 else spec.dtype)
        self.on_host = spec.small or all(device.platform in HOST_PLATFORMS for device in self.ranges)
        self.locks = {device: threading.Lock() for device in self.ranges}  # a shard is donated to each write
        self.shards: dict[jax.Device, Any] = {}
        self.programs: dict[tuple, Future] = {}
        if self.on_host:
            size = math.prod(spec.matrices) * self.dtype.itemsize
            self.shards = {
                device: aligned(size, np.zeros).view(self.dtype).reshape(spec.matrices) for device in self.ranges
            }

    def holders(self, tensor: Tensor) -> tuple[jax.Device, ...]:
        """Return the devices of this process that hold a part of the tensor."""
        overlaps = {device: find_overlap(tensor, ranges, self.spec.shape) for device, ranges in self.ranges.items()}
        return tuple(device for device, overlap in overlaps.items() if overlap is not None)

    def prepare(self, compilers: Executor, tensor: Tensor, rows: range, dtype: np.dtype, scaled: bool) -> None:
        """Start compiling the programs with which `put` writes some rows of a tensor, times scales if `scaled`."""
        if self.on_host:
            return
        shape = (len(rows), *tensor.shape[1:])
        values = np.broadcast_to(np.zeros((), np.uint8 if self.spec.dtype == E4M3 else dtype), shape)  # takes no memory
        for block in self._blocks(tensor, values, rows.start):
            key = self._program(block, tensor, scaled)
            if key not in self.programs:
                self.programs[key] = compilers.submit(_compiled, self.spec.matrices, self.dtype, tensor, *key)

    def put(self, tensor: Tensor, values: np.ndarray, first_row: int, scales: np.ndarray | None) -> None:
        """Write some rows of a tensor to the devices that hold them.

        Args:
            tensor: of the table, or the scales of one.
            values: the rows, as stored.
            first_row: of `values` in the tensor.
            scales: of the whole tensor, as stored. The values are multiplied by them.
        """
        values = values.view(np.uint8) if self.spec.dtype == E4M3 else values
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
                # Without waiting, every chunk that was read would lie in line on the device.
                self.shards[block.device] = jax.block_until_ready(written)

    def _blocks(self, tensor: Tensor, values: np.ndarray, first_row: int) -> Iterator["_Block"]:
        """Divide rows of a tensor over the devices."""
        matrix = values.T if tensor.transposed else values.reshape(len(values), -1)
        origin = (0, first_row) if tensor.transposed else (first_row, 0)  # of `matrix` in the tensor's matrix
        for device, ranges in self.ranges.items():
            overlap = find_overlap(tensor, ranges, self.spec.shape)
            if overlap is None:
                continue
            rows = _common(overlap.rows, origin[0], matrix.shape[0])
            columns = _common(overlap.columns, origin[1], matrix.shape[1])
            if rows and columns:
                *lead, row, column = overlap.start
                block = matrix[
                    rows.start - origin[0] : rows.stop - origin[0], columns.start - origin[1] : columns.stop - origin[1]
                ]
                start = (*lead, row + rows.start - overlap.rows.start, column + columns.start - overlap.columns.start)
                yield _Block(device, block, start, (rows.start, columns.start))

    def _program(self, block: "_Block", tensor: Tensor, scaled: bool) -> tuple:
        return block.device, block.values.shape, block.values.dtype, tensor.scale_shape if scaled else None


def _common(kept: range, start: int, size: int) -> range:
    """Return the part of `kept` that is among the `size` indices from `start` on."""
    return range(max(kept.start, start), min(kept.stop, start + size))


class _Block(NamedTuple):
    """A matrix for one device.

    Attributes:
        start: where it begins in the device's shard.
        first: its first row and column in the tensor's matrix.
    """

    device: jax.Device
    values: np.ndarray
    start: tuple[int, ...]
    first: tuple[int, int]


def _compiled(
    shard: tuple[int, ...], shard_dtype, tensor: Tensor, device, block: tuple[int, int], dtype, scales
) -> Any:
    """Compile `_write` for blocks of one shape; `scales` is the shape of the scales as stored, if there are any."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    sent = block[::-1] if tensor.transposed else block
    index = jax.ShapeDtypeStruct((), jnp.int32)
    factors = None if scales is None else (index, index, jax.ShapeDtypeStruct(scales[::-1], jnp.float32))
    arrays = (
        jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in ((shard, shard_dtype), (sent, dtype))
    )
    return _write.lower(*arrays, (index,) * len(shard), factors, tensor.transposed).compile()


def allocate(specs: dict[Key, ArraySpec]) -> dict[Key, DeviceArray]:
    """Make the arrays, filled with zeros, with one program per device."""
    arrays = {key: DeviceArray(spec) for key, spec in specs.items()}
    on_devices = [array for array in arrays.values() if not array.on_host]
    for device in on_devices[0].ranges if on_devices else ():
        with jax.default_device(device):
            zeros = _zeros(tuple((array.spec.matrices, array.dtype) for array in on_devices))
        for array, shard in zip(on_devices, zeros, strict=True):
            array.shards[device] = shard
    return arrays


def hand_over(arrays: dict[Key, DeviceArray]) -> dict[Key, jax.Array]:
    """Return the arrays in their own shapes and dtypes. Nothing can be written into them any more."""
    shards: dict[Key, list[jax.Array]] = {key: [] for key in arrays}
    forms = {
        key: (np.dtype(array.spec.dtype), array.spec.sharding.shard_shape(array.spec.shape))
        for key, array in arrays.items()
    }
    on_devices = [key for key, array in arrays.items() if not array.on_host]
    for device in next(iter(arrays.values())).ranges:
        if on_devices:
            matrices = [arrays[key].shards.pop(device) for key in on_devices]
            for key, shard in zip(on_devices, _in_form(matrices, tuple(forms[key] for key in on_devices)), strict=True):
                shards[key].append(shard)
        for key, array in arrays.items():
            if array.on_host:
                dtype, shape = forms[key]
                shards[key].append(jax.device_put(array.shards.pop(device).view(dtype).reshape(shape), device))
    return {
        key: jax.make_array_from_single_device_arrays(array.spec.shape, array.spec.sharding, shards[key])
        for key, array in arrays.items()
    }


def copy_matrix(target: np.ndarray, source: np.ndarray, device: jax.Device) -> None:
    """Copy a matrix on the host, `target[...] = source`; `source` may be the transposed of one in memory order."""
    source = contiguous(source, device)
    if source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    # A strip uses whole lines of the cache: 1.1 GB/s, and 2.3 of FP32. All columns at once make 0.5.
    for column in range(0, source.shape[1], STRIP):
        target[:, column : column + STRIP] = source[:, column : column + STRIP]


def contiguous(matrix: np.ndarray, device: jax.Device) -> np.ndarray:
    """Bring a transposed matrix into memory order if XLA is faster at it than `copy_matrix`: 2 GB/s of E4M3 or BF16."""
    transposed = matrix.strides[0] < matrix.strides[1]
    return (
        np.asarray(jax.device_put(matrix, device))
        if transposed and matrix.itemsize < 4 and device.platform == "cpu"
        else matrix
    )


def _converted(values: np.ndarray, first_row: int, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor, times their scales if there are any, in another dtype."""
    return values.astype(dtype) if values.ndim == 1 else np.asarray(_multiplied(values, first_row, scales, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _zeros(arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in arrays]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _in_form(shards: list[jax.Array], forms: tuple[tuple[Any, tuple[int, ...]], ...]) -> list[jax.Array]:
    return [
        jax.lax.bitcast_convert_type(shard, dtype).reshape(shape)
        for shard, (dtype, shape) in zip(shards, forms, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=3)
def _multiplied(values: jax.Array, first_row: jax.Array, scales: jax.Array | None, dtype: Any) -> jax.Array:
    """Rows of a matrix, times the scales of their blocks if there are any."""
    if scales is not None:
        values = values.astype(jnp.float32) * _factors(scales, first_row, 0, values.shape)
    return values.astype(dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(shard, block, start, factors, transposed):
    """Put a block into a shard. `factors`: the block's first row and column in its matrix, and the matrix's scales."""
    block = block.T if transposed else block
    if factors is not None:
        first_row, first_column, scales = factors
        block = block.astype(jnp.float32) * _factors(scales, first_row, first_column, block.shape)
    block = block.reshape((1,) * (shard.ndim - 2) + block.shape)
    return jax.lax.dynamic_update_slice(shard, block.astype(shard.dtype), start)


def _factors(scales: jax.Array, first_row: jax.Array, first_column: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The scale of every number of a part of a matrix, which has one scale per block of 128 x 128."""
    rows, columns = (first_row + jnp.arange(shape[0])) // GROUP, (first_column + jnp.arange(shape[1])) // GROUP
    return scales[rows][:, columns]
