"""From a checkpoint's tensors to our weights on a mesh, one tensor at a time and straight onto the devices that hold it.

Every leaf of our tree stacks many tensors: 58 layers x 256 experts x gate and up. A leaf is born as one buffer of zeros per device, in the
layout of `parallel.mesh.LAYOUT`; a tensor is read once, cut into what each device stores of it, and written into the buffers in place. So
the host holds what is being read and nothing else, whatever the size of the model. A process reads what its own devices hold a part of.

Buffers of an accelerator are donated to each write. Those of a CPU are NumPy's, which JAX takes over as they are. Scales and vectors, half
of the tensors and a thousandth of the bytes, are put together on the host for every device.

    stored [out, in]       ->  the matrix [in, out] of a layer or an expert, its dims split into heads and halves (`names`)
    weight_scale_inv       ->  scales [in / 128, out / 128]: blocks are square, so a transposed weight has transposed scales

The bytes of FP8 are moved, never converted, with weights="fp8". To "bf16" and "fp32" they are multiplied by their scale on the device.
"""

import collections
import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, Model
from deepseek_jax.huggingface.header import DTYPES
from deepseek_jax.huggingface.names import Tensor, tensors
from deepseek_jax.huggingface.pieces import Piece, aligned
from deepseek_jax.huggingface.places import as_matrices, held, num_lead
from deepseek_jax.huggingface.shards import Shards, compare
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import INPUT_DIMS, PER_EXPERT, Fp8Weight
from deepseek_jax.parallel.mesh import EXPERTS, P, partition_specs, vary
from pallas_kernels.quantized import E4M3, GROUP

Tree = dict[str, Any]
Weights = Literal["fp8", "bf16", "fp32"]
OnBytes = Callable[[int], None]

NUM_THREADS = min(4, os.cpu_count() or 1)  # pieces put into place at once
STRIP = 32  # columns
UNQUANTIZED = ("BF16", "F16", "F32")  # what stands for BF16 in checkpoints of others
FP32 = {"bias_E", "router_DE"}  # never rounded to BF16 here: the router computes in FP32


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


def expected(model: Model, fp8: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that a checkpoint of `model` has, by name."""
    found = {}
    for tensor in tensors(model):
        quantized = fp8 and tensor.quantized
        found[tensor.name] = (tensor.dtype if quantized or not tensor.quantized else "BF16", tensor.shape)
        if quantized:
            found[tensor.scale_name] = ("F32", tensor.scale_shape)
    return found


def num_bytes(model: Model, fp8: bool) -> int:
    """Return the bytes of all tensors of a checkpoint of `model`."""
    return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in expected(model, fp8).values())


def check(shards: Shards, model: Model, fp8: bool) -> None:
    """Refuse a folder that is not a checkpoint of `model`; MTP layers may leave out their copies of the embedding and the head.

    Raises:
        ValueError: missing or unknown tensors, wrong shapes or dtypes; each is named with its file.
    """
    wanted = expected(model, fp8)
    for name, (dtype, shape) in wanted.items():
        found = shards.entries[name].dtype if name in shards.entries else dtype
        wanted[name] = (found if dtype == "BF16" and found in UNQUANTIZED else dtype, shape)
    compare(shards, wanted, frozenset(tensor.name for tensor in tensors(model) if tensor.copied))


def load(
    shards: Shards, config: Config, mesh: jax.sharding.Mesh, weights: Weights, on_bytes: Callable[[int], None] = lambda n: None
) -> Tree:
    """Return `{"params": ..., "router_bias": ...}` on `mesh`.

    Args:
        shards: a checkpoint of `config.model` (see `check`).
        config: of the run; model and mesh count.
        mesh: where the weights go, in `LAYOUT`.
        weights: "fp8" leaves what is stored in FP8 as it is, in `Fp8Weight`s without a carrier, and the rest in BF16; "bf16" and "fp32"
            give arrays. Router and biases are FP32 always.
        on_bytes: called with the bytes of each tensor that is in its place.

    Raises:
        ValueError: "fp8" of a checkpoint that is not, or whose halves of an FFN are no multiple of 128; an MTP layer with an embedding or
            head of its own.
    """
    stored_fp8 = any(entry.dtype == "F8_E4M3" for entry in shards.entries.values())
    if weights == "fp8" and not stored_fp8:
        raise ValueError(f"the checkpoint {shards.folder} is not in FP8; load it as 'bf16' or 'fp32'")
    buffers = {key: _Buffers(part) for key, part in _parts(config, mesh, weights).items()}
    table: dict[str, tuple[Tensor, _Buffers]] = {}  # what this process puts into place
    for tensor in tensors(config.model):
        if tensor.copied:
            on_bytes(_check_copy(shards, tensor))
        elif weights == "fp8" and tensor.quantized:
            table[tensor.name] = tensor, buffers[*tensor.leaf, "values"]
            table[tensor.scale_name] = tensor.scales, buffers[*tensor.leaf, "scales"]
        else:
            table[tensor.name] = tensor, buffers[tensor.leaf]
    names = [name for name in shards.entries if name in table and table[name][1].holds(table[name][0])]

    @functools.lru_cache(maxsize=4 * NUM_THREADS)
    def scales_of(tensor: Tensor) -> np.ndarray | None:
        # Read here and not ahead: they are small, they lie beside their weight, and a checkpoint may have them in another file.
        return shards.read(tensor.scale_name) if weights != "fp8" and tensor.scale_name in shards.entries else None

    def put(piece: Piece) -> int:
        try:
            tensor, into = table[piece.name]
            into.put(tensor, piece.values, piece.first_row, scales_of(tensor))
            return piece.values.nbytes
        finally:
            piece.release()

    with ThreadPoolExecutor(NUM_THREADS) as pool:  # a host transposes with one thread per piece
        busy = collections.deque()
        for piece in shards.stream(names):
            busy.append(pool.submit(put, piece))
            while busy and busy[0].done():
                on_bytes(busy.popleft().result())
        for future in busy:
            on_bytes(future.result())
    return _tree({key: buffer.whole() for key, buffer in buffers.items()})


def with_carriers(tree: Any) -> Any:
    """Give every `Fp8Weight` the carrier that products expect; call inside the jitted function, where it takes no memory."""

    def one(w):
        return Fp8Weight(vary(jnp.zeros(w.values.shape, jnp.float32), w.values), w.values, w.scales) if isinstance(w, Fp8Weight) else w

    return jax.tree.map(one, tree, is_leaf=lambda w: isinstance(w, Fp8Weight))


# ---- where things go


def abstract_weights(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Shapes and shardings of `params` and `router_bias` on `mesh`, FP32."""
    with jax.set_mesh(mesh):
        params, router_bias = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    tree = {"params": params, "router_bias": router_bias}
    shardings = jax.tree.map(functools.partial(jax.sharding.NamedSharding, mesh), partition_specs(tree))
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)


def _parts(config: Config, mesh: jax.sharding.Mesh, weights: Weights) -> dict[tuple[str, ...], Part]:
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_weights(config, mesh))[0]:
        key = tuple(entry.key for entry in path)
        name, lead = key[-1], num_lead(key[-1], leaf.shape)
        matrices = as_matrices(name, leaf.sharding.shard_shape(leaf.shape), lead)
        if weights == "fp8" and name in INPUT_DIMS:
            found[*key, "values"] = Part(leaf.shape, E4M3, leaf.sharding, matrices, small=False)
            found[*key, "scales"] = _scales_part(name, as_matrices(name, leaf.shape, lead), mesh)
        else:
            dtype = jnp.float32 if weights == "fp32" or name in FP32 else jnp.bfloat16
            found[key] = Part(leaf.shape, dtype, leaf.sharding, matrices, small=matrices[-1] == 1)
    return found


def _scales_part(name: str, matrices: tuple[int, ...], mesh: jax.sharding.Mesh) -> Part:
    """Scales of whole matrices, by expert where there are experts: as `parallel.weights` has them."""
    *lead, rows, columns = matrices
    if name.startswith("gate_up") and (columns // 2) % GROUP:
        raise ValueError(f"{name} has halves of {columns // 2} columns: in FP8 blocks of {GROUP} belong to one half; load it as 'bf16'")
    spec = P(*(None,) * (len(lead) - 1), EXPERTS, None, None) if name in PER_EXPERT else P(*(None,) * (len(lead) + 2))
    shape = (*lead, -(-rows // GROUP), -(-columns // GROUP))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return Part(shape, jnp.float32, sharding, sharding.shard_shape(shape), small=True)


class _Buffers:
    """The shards of one array on this process's devices, as matrices, being filled."""

    def __init__(self, part: Part):
        self.part = part
        self.indices = part.sharding.addressable_devices_indices_map(part.shape)
        # FP8 as bytes: to write one tensor, XLA:CPU would convert the whole buffer to FP16 and back.
        self.dtype = np.dtype(np.uint8 if part.dtype == E4M3 else part.dtype)
        size = math.prod(part.matrices) * self.dtype.itemsize
        self.on_host = part.small or all(device.platform == "cpu" for device in self.indices)
        self.lock = threading.Lock()  # a buffer is donated to each write
        if self.on_host:
            self.shards = {device: aligned(size, np.zeros).view(self.dtype).reshape(part.matrices) for device in self.indices}
        else:
            self.shards = {device: jnp.zeros(part.matrices, self.dtype, device=device) for device in self.indices}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a part of the tensor belongs to one of these shards."""
        return any(held(tensor, index, self.part.shape) is not None for index in self.indices.values())

    def put(self, tensor: Tensor, values: np.ndarray, first_row: int, scales: np.ndarray | None) -> None:
        """Write what each device holds of the rows `values` of a tensor as stored, times its scales if there are any."""
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
        with self.lock:
            written = _write(self.shards[device], sent, tuple(map(np.int32, start)), transposed, factors)
            self.shards[device] = jax.block_until_ready(written)  # or pieces would wait in line, as many as were read

    def whole(self) -> jax.Array:
        """Hand over the array; nothing can be written any more."""
        part, arrays = self.part, []
        local = part.sharding.shard_shape(part.shape)
        for device in self.indices:
            shard = self.shards.pop(device)
            arrays.append(
                jax.device_put(shard.view(part.dtype).reshape(local), device) if self.on_host else _as(shard, np.dtype(part.dtype), local)
            )
        return jax.make_array_from_single_device_arrays(part.shape, part.sharding, arrays)


def _tree(arrays: dict[tuple[str, ...], jax.Array]) -> Tree:
    tree: Tree = {}
    for key, array in arrays.items():
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = array

    def pack(node):
        if not isinstance(node, dict):
            return node
        return Fp8Weight(None, **node) if node.keys() == {"values", "scales"} else {name: pack(child) for name, child in node.items()}

    return pack(tree)


# ---- one tensor


def _check_copy(shards: Shards, tensor: Tensor) -> int:
    """MTP layers share the main model's embedding and head. A checkpoint may repeat them; return the bytes that were compared."""
    if tensor.name not in shards.entries:
        return 0
    shared = "model.embed_tokens.weight" if tensor.leaf[-1] == "embed_VD" else "lm_head.weight"
    if not shards.equal(tensor.name, shared):
        raise ValueError(
            f"{tensor.name} in {shards.entries[tensor.name].file} differs from {shared}; MTP layers here share the main model's"
        )
    return shards.entries[tensor.name].num_bytes


def _converted(values: np.ndarray, first_row: int, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor as stored, in another dtype."""
    return values.astype(dtype) if values.ndim == 1 else np.asarray(_multiplied(values, first_row, scales, dtype))


def copy_matrix(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` of two matrices; a transposed source in strips, whose lines of cache are used whole (3x as fast)."""
    if source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for at in range(0, source.shape[1], STRIP):
        target[:, at : at + STRIP] = source[:, at : at + STRIP]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(1, 2))
def _as(buffer: jax.Array, dtype: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.bitcast_convert_type(buffer, dtype).reshape(shape)


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
