"""From our weights on a mesh to a Hugging Face folder, one tensor at a time.

What `load` does, backwards: the blocks that the devices hold of a tensor are fetched, put together on the host and transposed to [out, in].
A weight that is in FP8 goes back byte for byte. An array is cast to BF16, or quantised in blocks of 128 x 128.

FP8 that became FP32 masters and was not trained comes back bit for bit, too. w = round(q s) for the E4M3 numbers q of a block and its
scale s, and the largest q is 448, so max|w| / 448 is s up to its last bit. Of the scales one unit away the one is taken that gives back
every w exactly; trained weights have none such, and keep max|w| / 448.
"""

import collections
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Model
from deepseek_jax.huggingface.load import LEADING_DIMS, NUM_THREADS, OnBytes, Tree, expected, flat, place_in, ranges_of
from deepseek_jax.huggingface.names import Tensor, piece_shape, tensors
from deepseek_jax.huggingface.shard_writer import Planned, ShardWriter
from deepseek_jax.huggingface.shards import DTYPES
from deepseek_jax.model.precision import Fp8Weight
from pallas_kernels.quantized import E4M3, GROUP, Quantized, dequantize, encode, largest_magnitude, scale_of

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
        weights: `params` and `router_bias` as `load.load` or a training state has them, whole on this process's devices.
        model: of the weights.
        folder: new, or one that this call was writing.
        fp8: quantised weights in FP8 with scales, or everything in BF16.
        max_shard_bytes: of a file.
        on_bytes: called with the bytes that were written.
        source: where the weights come from; only the same continues an interrupted call.

    Raises:
        ValueError: the folder holds something else, there is no room, or the weights live on other processes' devices, too.
    """
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(weights)):
        raise ValueError("a part of the weights is on other processes' devices; export from one process that restores the checkpoint alone")
    writer = ShardWriter(folder, plan(model, fp8), max_shard_bytes, source=source)
    names = [tensor.name for shard in writer.missing() for tensor in shard]
    with _Ahead(_Source(weights, model, fp8), names) as ahead:
        writer.write(ahead.get, on_bytes)


class _Ahead:
    """Makes the next tensors in threads while the writer hashes and writes, which asks for each once and in order."""

    def __init__(self, source: "_Source", names: list[str]):
        jobs: list[list[str]] = []  # a weight, and its scales where they come next
        for name in names:
            if jobs and name == f"{jobs[-1][0]}_scale_inv":
                jobs[-1].append(name)
            else:
                jobs.append([name])
        self.source, self.jobs = source, iter(jobs)
        self.made: collections.deque[tuple[str, Callable[[], np.ndarray]]] = collections.deque()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(NUM_THREADS)
        for _ in range(NUM_THREADS):
            self._start()
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def get(self, name: str) -> np.ndarray:
        made, array = self.made.popleft()
        assert name == made, f"{name} asked for, {made} made"
        if not self.made or self.made[0][0] != f"{name}_scale_inv":
            self._start()  # that was the last of its job
        return array()

    def _start(self) -> None:
        job = next(self.jobs, None)
        if job is not None:
            future = self.pool.submit(lambda: [self.source.get(name) for name in job])
            self.made += [(name, lambda i=i: future.result()[i]) for i, name in enumerate(job)]


class _Source:
    """Makes tensors in their stored form. Scales that were made with the values of their weight are kept until they are asked for."""

    def __init__(self, weights: Tree, model: Model, fp8: bool):
        self.weights, self.model, self.fp8 = weights, model, fp8
        self.table = {tensor.name: tensor for tensor in tensors(model)}
        self.scaled = {tensor.scale_name: tensor for tensor in self.table.values() if tensor.quantized}
        self.made: dict[str, np.ndarray] = {}

    def get(self, name: str) -> np.ndarray:
        if name in self.scaled:
            return self._scales(name)
        tensor = self.table[name]
        if not (self.fp8 and tensor.quantized):
            matrix = self._matrix(tensor)
            leaf = self._leaf(tensor)
            if isinstance(leaf, Fp8Weight):
                matrix = np.asarray(_dequantize(matrix, _scales_of(leaf.scales, tensor)))
            dtype = DTYPES["BF16" if tensor.quantized else tensor.dtype]
            return _contiguous(matrix.T if tensor.transposed else matrix, dtype).reshape(tensor.shape)
        values, scales = self._quantized(tensor)
        self.made[tensor.scale_name] = scales
        return values

    def _scales(self, name: str) -> np.ndarray:
        """Made with the values, unless an interrupted call wrote those."""
        made = self.made.pop(name, None)
        return self._quantized(self.scaled[name])[1] if made is None else made

    def _leaf(self, tensor: Tensor) -> Any:
        return functools.reduce(lambda node, key: node[key], tensor.leaf, self.weights)

    def _quantized(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        leaf = self._leaf(tensor)
        if isinstance(leaf, Fp8Weight):
            values, scales = self._matrix(tensor), _scales_of(leaf.scales, tensor)
        else:
            values, scales = map(np.asarray, _quantize(self._matrix(tensor)))
        return _contiguous(values.T), np.ascontiguousarray(scales.T)

    def _matrix(self, tensor: Tensor) -> np.ndarray:
        """The matrix [in, out] of a tensor; [V, D] of the embedding; one column of a vector."""
        leaf = self._leaf(tensor)
        if isinstance(leaf, Fp8Weight):
            leaf = leaf.values
        dtype = np.dtype(leaf.dtype)
        shape = piece_shape(tensor, self.model)
        split = LEADING_DIMS.get(tensor.leaf[-1], 1)
        whole = None
        for shard in _distinct(leaf):
            inside = place_in(tensor, ranges_of(shard.index, leaf.shape))
            if inside is None:
                continue
            start, dims, extent = inside
            rows, columns = flat(dims[:split], shape[:split]), flat(dims[split:], shape[split:])
            # A GPU transposes faster than its host; then the stored order is the one in memory.
            transposed = tensor.transposed and shard.device.platform != "cpu"
            block = np.asarray(_read(shard.data, tuple(np.int32(i) for i in start), extent, (len(rows), len(columns)), transposed))
            block = (block.T if transposed else block).view(dtype)
            sizes = math.prod(shape[:split]), math.prod(shape[split:])
            if block.shape == sizes:
                return block
            whole = np.empty(sizes, block.dtype) if whole is None else whole
            whole[rows.start : rows.stop, columns.start : columns.stop] = block
        return whole


def _distinct(array: jax.Array) -> list[Any]:
    """One shard of each part of an array; replicas hold the same."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _read(shard: jax.Array, start: tuple, extent: tuple[int, ...], matrix: tuple[int, int], transposed: bool) -> jax.Array:
    if shard.dtype == E4M3:  # XLA:CPU would convert all of it to FP16
        shard = jax.lax.bitcast_convert_type(shard, jnp.uint8)
    block = jax.lax.dynamic_slice(shard, start, extent).reshape(matrix)
    return block.T if transposed else block


def _scales_of(scales: jax.Array, tensor: Tensor) -> np.ndarray:
    """Scales [in / 128, out / 128] of one tensor."""
    for shard in scales.addressable_shards:
        ranges = ranges_of(shard.index, scales.shape)
        if all(i in r for i, r in zip(tensor.index, ranges, strict=False)):
            inside = tuple(i - r.start for i, r in zip(tensor.index, ranges, strict=False))
            found = np.asarray(shard.data[inside])
            return found if tensor.half is None else np.split(found, 2, axis=1)[tensor.half]
    raise AssertionError(f"no shard holds the scales of {tensor.name}")


def _contiguous(view: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A copy of `view` in its own memory order. XLA's host transpose runs at 1 to 2 GB/s of bytes, NumPy's at 0.3."""
    dtype = dtype or view.dtype
    if view.dtype != dtype:
        view = np.asarray(_cast(view, np.dtype(dtype)))
    if view.flags.c_contiguous:
        return view
    return np.asarray(jax.device_put(view, jax.local_devices(backend="cpu")[0]))


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


@jax.jit
def _dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    return dequantize(Quantized(values, scales, "block"))


@jax.jit
def _quantize(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 values and scales of blocks of a matrix; the scale that gives back every number exactly, where there is one."""
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
    return (_encoded(blocks, scales).astype(jnp.float32) * scales[:, None, :, None] == blocks).all(axis=(1, 3))
