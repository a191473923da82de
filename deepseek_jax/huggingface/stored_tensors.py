"""The tensors of a checkpoint, made from our weights on a mesh one at a time.

This is what `load` does, backwards. The blocks of a tensor are fetched from the devices that hold them, put together on
the host and transposed to [out, in]. A weight in FP8 goes back byte for byte. An array is cast to BF16, or quantised in
blocks of 128 x 128.

FP8 that became FP32 masters and was not trained also comes back bit for bit. For the E4M3 numbers q of a block and its
scale s, w = round(q s). The largest q is 448, so max|w| / 448 equals s except perhaps in its last bit. So the scales
one unit below and above are tried, too, and the one that gives back every w exactly is taken. For trained weights there
is no such scale, and max|w| / 448 stays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Model
from deepseek_jax.huggingface import device_arrays
from deepseek_jax.huggingface.names import Tensor, tensors
from deepseek_jax.huggingface.slices import Overlap, find_overlap, index_ranges
from deepseek_jax.parameters import Fp8Weight, P, Weights, matrix_shape
from deepseek_jax.safetensors.header import DTYPES
from pallas_kernels import GROUP
from pallas_kernels.quantized import Quantized, decode, dequantize, encode, largest_magnitude, scale_of

Array = np.ndarray | jax.Array


class StoredTensors:
    """The tensors of a checkpoint by name; several threads may ask for them.

    Scales are made with the values of their weight, and kept until they are asked for.

    Args:
        weights: `params` and `router_bias`.
        model: of the weights.
        fp8: whether quantised weights are stored in FP8 with scales, or in BF16.
    """

    def __init__(self, weights: Weights, model: Model, fp8: bool):
        self.weights, self.model, self.fp8 = weights, model, fp8
        self.table = {tensor.name: tensor for tensor in tensors(model)}
        self.weight_of_scales = {tensor.scale_name: tensor for tensor in self.table.values() if tensor.quantized}
        self.device = jax.tree.leaves(weights)[0].addressable_shards[0].device
        self._scales: dict[str, np.ndarray] = {}

    def get(self, name: str) -> np.ndarray:
        """Return one tensor."""
        if name in self._scales:  # not if its weight is in another shard
            return self._scales.pop(name)
        values, scales = self.stored(name, *self.fetch(name))
        if name in self.weight_of_scales:
            return scales
        if scales is not None:
            self._scales[self.table[name].scale_name] = scales
        return values

    def fetch(self, name: str) -> tuple[Array, Array | None]:
        """Return the matrix of a weight as its leaf has it, and its scales if it is in FP8.

        If the weights are spread over processes, all of them must call this for the same names in the same order.

        Args:
            name: of the weight, or of its scales.
        """
        tensor = self._tensor(name)
        leaf = functools.reduce(lambda node, key: node[key], tensor.leaf, self.weights._asdict())
        if isinstance(leaf, Fp8Weight):
            return _fetch_matrix(leaf.values, tensor), _fetch_matrix(leaf.scales, tensor.scales)
        return _fetch_matrix(leaf, tensor), None

    def stored(self, name: str, matrix: Array, scales: Array | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Turn what `fetch` returned into a stored tensor and, if that is in FP8, its scales."""
        tensor = self._tensor(name)
        if self.fp8 and tensor.quantized:
            if scales is None:
                matrix, scales = _quantize(matrix)
            return self._on_host(matrix, transposed=True), np.ascontiguousarray(np.asarray(scales).T)
        if scales is not None:
            matrix = _dequantize(matrix, scales)
        dtype = DTYPES["BF16" if tensor.quantized else tensor.dtype]
        matrix = matrix if matrix.dtype == dtype else _cast(matrix, dtype)
        return self._on_host(matrix, tensor.transposed).reshape(tensor.shape), None

    def _tensor(self, name: str) -> Tensor:
        return self.weight_of_scales[name] if name in self.weight_of_scales else self.table[name]

    def _on_host(self, matrix: Array, transposed: bool) -> np.ndarray:
        """Return the matrix, or the transposed one, in the memory of the host and in its own order."""
        if isinstance(matrix, jax.Array) and self.device.platform not in device_arrays.HOST_PLATFORMS:
            return np.asarray(_transposed(matrix) if transposed else matrix)  # a device transposes faster than its host
        matrix = np.asarray(matrix)
        view = matrix.T if transposed else matrix
        if not view.flags.c_contiguous:
            view = device_arrays.contiguous(view, self.device)
        if view.flags.c_contiguous:
            return view
        copy = np.empty(view.shape, view.dtype)
        device_arrays.copy_matrix(copy, view, self.device)
        return copy


def _fetch_matrix(array: jax.Array, tensor: Tensor) -> Array:
    """Return the matrix of a tensor from its leaf, or from the leaf's values or scales.

    It stays on its device if one device holds all of it.
    """
    if not array.is_fully_addressable:
        return _gather_matrix(array, tensor)
    whole = None
    for shard in _distinct_shards(array):
        overlap = find_overlap(tensor, index_ranges(shard.index, array.shape), array.shape)
        if overlap is None:
            continue
        block = _fetch_block(shard, tensor, overlap)
        if block.shape == tensor.matrix_shape:
            return block
        whole = np.empty(tensor.matrix_shape, block.dtype) if whole is None else whole
        rows, columns = overlap.rows, overlap.columns
        whole[rows.start : rows.stop, columns.start : columns.stop] = block
    return whole


def _gather_matrix(array: jax.Array, tensor: Tensor) -> jax.Array:
    """Return the matrix of a tensor, on a device of this process, from an array spread over processes.

    All of the processes must call this.
    """
    sharding = array.sharding
    index, half = np.array(tensor.index, np.int32), tensor.half or 0
    whole = _gather(array, index, sharding.mesh, sharding.spec, tensor.row_dims, half, tensor.matrix_shape)
    return whole.addressable_data(0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _gather(
    array: jax.Array, index: jax.Array, mesh, spec, row_dims: int, half: int, matrix: tuple[int, int]
) -> jax.Array:
    """Return a matrix on every device: the sum of its bits, to which one replica of each part adds that part."""
    parts = (*spec, *(None,) * (array.ndim - len(spec)))
    axes = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in parts]
    lead, unsigned = len(index), jnp.dtype(f"uint{8 * array.dtype.itemsize}")

    def local(shard: jax.Array, index: jax.Array) -> jax.Array:
        starts = [
            jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, shard.shape, strict=True)
        ]
        local_index = [index[dim] - starts[dim] for dim in range(lead)]
        adds = functools.reduce(
            jnp.logical_and, [(i >= 0) & (i < shard.shape[dim]) for dim, i in enumerate(local_index)], True
        )
        for axis in set(mesh.axis_names) - {axis for names in axes for axis in names}:
            adds &= jax.lax.axis_index(axis) == 0
        matrices = matrix_shape(shard.shape, lead, row_dims)
        rows, columns = matrices[-2], min(matrices[-1], matrix[1])
        begin = (*(jnp.clip(i, 0, shard.shape[dim] - 1) for dim, i in enumerate(local_index)), 0, half * columns)
        bits = jax.lax.bitcast_convert_type(shard, unsigned).reshape(matrices)  # of floats, -0 + 0 is not -0
        bits = (
            jax.lax.dynamic_slice(bits, begin, (1,) * lead + (rows, columns)).reshape(rows, columns).astype(jnp.uint32)
        )
        # Only the first dim of the rows, or of the columns, is split.
        split = lead + row_dims
        row = starts[lead] * (rows // shard.shape[lead])
        column = starts[split] * (matrices[-1] // shard.shape[split]) if split < shard.ndim else 0
        placed = jax.lax.dynamic_update_slice(jnp.zeros(matrix, jnp.uint32), bits, (row, column))
        return jax.lax.bitcast_convert_type(
            jax.lax.psum(jnp.where(adds, placed, 0), mesh.axis_names).astype(unsigned), array.dtype
        )

    # Unchecked: which axes an array varies over follows from `spec`, and the sum is over all axes.
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=False)(array, index)


def _distinct_shards(array: jax.Array) -> list[Any]:
    """Return one of the replicas of each shard of an array."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


def _fetch_block(shard: Any, tensor: Tensor, overlap: Overlap) -> Array:
    """Return the part of a tensor that a shard holds; on a CPU it is a view."""
    matrices = matrix_shape(shard.data.shape, len(tensor.index), tensor.row_dims)
    sizes = len(overlap.rows), len(overlap.columns)
    if shard.device.platform in device_arrays.HOST_PLATFORMS:
        *lead, row, column = overlap.start
        return np.asarray(shard.data).reshape(matrices)[*lead, row : row + sizes[0], column : column + sizes[1]]
    return _read(shard.data, tuple(map(np.int32, overlap.start)), matrices, sizes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _read(shard: jax.Array, start: tuple, matrices: tuple[int, ...], sizes: tuple[int, int]) -> jax.Array:
    return jax.lax.dynamic_slice(shard.reshape(matrices), start, (1,) * (len(matrices) - 2) + sizes).reshape(sizes)


@jax.jit
def _transposed(matrix: jax.Array) -> jax.Array:
    return matrix.T


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


@jax.jit
def _dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    return dequantize(Quantized(values, scales, "block"))


@jax.jit
def _quantize(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return E4M3 values and scales of a matrix; of each block the scale that loses nothing, if there is one."""
    rows, columns = matrix.shape
    padded = jnp.pad(matrix.astype(jnp.float32), ((0, -rows % GROUP), (0, -columns % GROUP)))
    blocks = padded.reshape(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    usual = scale_of(largest_magnitude(blocks, axis=(1, 3)), "fp32")
    bits = jax.lax.bitcast_convert_type(usual, jnp.int32)
    scales = usual
    for step in (-1, 1):
        near = jax.lax.bitcast_convert_type(bits + step, jnp.float32)
        scales = jnp.where(_exact(blocks, near) & ~_exact(blocks, usual), near, scales)
    return _encoded(blocks, scales).reshape(padded.shape)[:rows, :columns], scales


def _encoded(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    return encode(blocks, scales[:, None, :, None])


def _exact(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Return which blocks equal their E4M3 values times their scales, to the last bit."""
    return (decode(_encoded(blocks, scales)) * scales[:, None, :, None] == blocks).all(axis=(1, 3))
