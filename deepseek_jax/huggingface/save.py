"""From our weights on a mesh to a Hugging Face folder, one tensor at a time.

What `load` does, backwards: the blocks that the devices hold of a tensor are fetched, put together on the host and
transposed to [out, in]. A weight that is in FP8 goes back byte for byte. An array is cast to BF16, or quantised in
blocks of 128 x 128.

FP8 that became FP32 masters and was not trained comes back bit for bit, too. w = round(q s) for the E4M3 numbers q of a
block and its scale s, and the largest q is 448, so max|w| / 448 is s up to its last bit. Of the scales one unit away
the one is taken that gives back every w exactly; trained weights have none such, and keep max|w| / 448.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Model
from deepseek_jax.huggingface import device_arrays, save_multiprocess
from deepseek_jax.huggingface.load import OnBytes, Tree, expected
from deepseek_jax.huggingface.names import Tensor, tensors
from deepseek_jax.huggingface.slices import Held, held, ranges_of
from deepseek_jax.parameters import Fp8Weight, matrix_shape
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.writer import Planned, ShardWriter
from pallas_kernels.quantized import GROUP, Quantized, decode, dequantize, encode, largest_magnitude, scale_of

Array = np.ndarray | jax.Array
SHARDS_AT_ONCE = min(8, os.cpu_count() or 1)  # SHA-256 takes a core each
SHARD_BYTES = 4_300_000_000  # of the released checkpoint: 688.6 GB in 163 files


def plan(model: Model, fp8: bool) -> list[Planned]:
    """Return every tensor of the checkpoint in order, a scale behind its weight."""
    return [Planned(name, dtype, shape) for name, (dtype, shape) in expected(model, fp8).items()]


def save(
    weights: Tree,
    model: Model,
    folder: Path,
    fp8: bool,
    max_shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda n: None,
    source: str = "",
) -> None:
    """Write the tensors of `weights` into `folder`; shards that an interrupted call has finished are kept.

    Args:
        weights: `params` and `router_bias` as `load.load` or a training state has them. Of several processes each calls
            this.
        model: of the weights.
        folder: new, or one that this call was writing.
        fp8: quantised weights in FP8 with scales, or everything in BF16.
        max_shard_bytes: of a file.
        on_bytes: called with the bytes that were written.
        source: where the weights come from; only the same continues an interrupted call.

    Raises:
        ValueError: the folder holds something else, or several processes do not share it; OSError: there is no room.
    """
    tensors_of = Source(weights, model, fp8)
    new_writer = functools.partial(ShardWriter, folder, plan(model, fp8), max_shard_bytes, source=source)
    if jax.process_count() > 1:
        save_multiprocess.write(Path(folder), new_writer, tensors_of, on_bytes)
    else:
        new_writer().write(tensors_of.get, on_bytes, SHARDS_AT_ONCE)


class Source:
    """Makes tensors in their stored form, for several threads. Scales made with the values of their weight are kept
    until asked for.
    """

    def __init__(self, weights: Tree, model: Model, fp8: bool):
        self.weights, self.model, self.fp8 = weights, model, fp8
        self.table = {tensor.name: tensor for tensor in tensors(model)}
        self.scaled = {tensor.scale_name: tensor for tensor in self.table.values() if tensor.quantized}
        self.device = jax.tree.leaves(weights)[0].addressable_shards[0].device
        self.made: dict[str, np.ndarray] = {}

    def get(self, name: str) -> np.ndarray:
        """Return one tensor."""
        if name in self.made:  # unless its weight is in another shard
            return self.made.pop(name)
        values, scales = self.stored(name, *self.fetch(name))
        if name in self.scaled:
            return scales
        if scales is not None:
            self.made[self.table[name].scale_name] = scales
        return values

    def fetch(self, name: str) -> tuple[Array, Array | None]:
        """Return the matrix of a weight, as in its leaf, and its scales if it is in FP8. `name` is the weight's or its
        scales'.

        Where the weights are spread over processes, all of them call this for the same names in the same order.
        """
        tensor = self._tensor(name)
        leaf = functools.reduce(lambda node, key: node[key], tensor.leaf, self.weights)
        if isinstance(leaf, Fp8Weight):
            return _matrix(leaf.values, tensor), _matrix(leaf.scales, tensor.scales)
        return _matrix(leaf, tensor), None

    def stored(self, name: str, matrix: Array, scales: Array | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Turn what was fetched into a tensor and, in FP8, its scales; on the device where it is."""
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
        return self.scaled[name] if name in self.scaled else self.table[name]

    def _on_host(self, matrix: Array, transposed: bool) -> np.ndarray:
        """The matrix, or the transposed one, in its own memory order."""
        if isinstance(matrix, jax.Array) and self.device.platform not in device_arrays.HOST_PLATFORMS:
            return np.asarray(_transposed(matrix) if transposed else matrix)  # faster than on its host
        matrix = np.asarray(matrix)
        view = matrix.T if transposed else matrix
        if not view.flags.c_contiguous:
            view = device_arrays.in_order(view, self.device)
        if view.flags.c_contiguous:
            return view
        copy = np.empty(view.shape, view.dtype)
        device_arrays.copy_matrix(copy, view, self.device)
        return copy


def _matrix(array: jax.Array, tensor: Tensor) -> Array:
    """The matrix of a tensor, as in `array`: its leaf, or the values or scales of one. On its device, if that holds it
    whole.
    """
    if not array.is_fully_addressable:
        return save_multiprocess.gathered(array, tensor)
    whole = None
    for shard in _distinct(array):
        inside = held(tensor, ranges_of(shard.index, array.shape), array.shape)
        if inside is None:
            continue
        block = _block(shard, tensor, inside)
        if block.shape == tensor.matrix_shape:
            return block
        whole = np.empty(tensor.matrix_shape, block.dtype) if whole is None else whole
        whole[inside.rows.start : inside.rows.stop, inside.columns.start : inside.columns.stop] = block
    return whole


def _distinct(array: jax.Array) -> list[Any]:
    """One shard of each part of an array; replicas hold the same."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


def _block(shard: Any, tensor: Tensor, inside: Held) -> Array:
    """What a shard holds of a tensor; from a CPU a view."""
    matrices = matrix_shape(shard.data.shape, len(tensor.index), tensor.row_dims)
    sizes = len(inside.rows), len(inside.columns)
    if shard.device.platform in device_arrays.HOST_PLATFORMS:
        *lead, row, column = inside.start
        return np.asarray(shard.data).reshape(matrices)[*lead, row : row + sizes[0], column : column + sizes[1]]
    return _read(shard.data, tuple(map(np.int32, inside.start)), matrices, sizes)


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
    """E4M3 values and scales of blocks of a matrix; the scale that gives back every number exactly, where there is
    one.
    """
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
    """Which blocks are their E4M3 values times the scale, to the last bit."""
    return (decode(_encoded(blocks, scales)) * scales[:, None, :, None] == blocks).all(axis=(1, 3))
