"""From a checkpoint's tensors to our weights on a mesh, one tensor at a time and straight onto the devices that hold it.

Every leaf of our tree stacks many tensors: 58 layers x 256 experts x gate and up. A leaf is born as one buffer of zeros per device, in the
layout of `parallel.mesh.LAYOUT`; a tensor is read once, cut into what each device stores of it, and written into the (donated) buffers in
place. So the host holds what is being read and nothing else, whatever the size of the model.

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
from deepseek_jax.huggingface.names import Tensor, piece_shape, tensors
from deepseek_jax.huggingface.shards import DTYPES, Shards, compare
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import INPUT_DIMS, PER_EXPERT, Fp8Weight, matrix_shape
from deepseek_jax.parallel.mesh import EXPERTS, LAYOUT, P, partition_specs, vary
from pallas_kernels.quantized import E4M3, GROUP

Tree = dict[str, Any]
Weights = Literal["fp8", "bf16", "fp32"]
OnBytes = Callable[[int], None]

NUM_THREADS = min(4, os.cpu_count() or 1)  # tensors put into place at once, each of which the host holds
UNQUANTIZED = ("BF16", "F16", "F32")  # what stands for BF16 in checkpoints of others
LEADING_DIMS = {"o_NHD": 2, "merge_2DD": 2}  # dims of a matrix's rows, where they are more than one
FP32 = {"bias_E", "router_DE"}  # never rounded to BF16 here: the router computes in FP32


class Part(NamedTuple):
    """One array of the result: a leaf, or the values or scales of one in FP8."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.NamedSharding


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
    table = {tensor.name: tensor for tensor in tensors(config.model)}
    parts = _parts(config, mesh, weights)
    buffers = {key: _Buffers(part) for key, part in parts.items()}

    def put(tensor: Tensor, values: np.ndarray) -> int:
        # Read here and not ahead: they are small, they lie beside their weight, and a checkpoint may have them in another file.
        scales = shards.read(tensor.scale_name) if tensor.scale_name in shards.entries else None
        if tensor.copied:
            _check_copy(shards, tensor, values)
        elif weights == "fp8" and tensor.quantized:
            _place(buffers[*tensor.leaf, "values"], tensor, config, values.view(np.uint8))
            _place_scales(buffers[*tensor.leaf, "scales"], tensor, scales)
        else:
            _place(buffers[tensor.leaf], tensor, config, values, scales)
        return values.nbytes + (0 if scales is None else scales.nbytes)

    with ThreadPoolExecutor(NUM_THREADS) as pool:  # a host transposes with one thread per tensor
        busy = collections.deque()
        for name, values in shards.read_all([name for name in shards.entries if name in table]):
            busy.append(pool.submit(put, table[name], values))
            del values
            if len(busy) > NUM_THREADS:
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
        name = key[-1]
        if weights == "fp8" and name in INPUT_DIMS:
            found[*key, "values"] = Part(leaf.shape, E4M3, leaf.sharding)
            found[*key, "scales"] = _scales_part(name, leaf, mesh)
        else:
            dtype = jnp.float32 if weights == "fp32" or name in FP32 else jnp.bfloat16
            found[key] = Part(leaf.shape, dtype, leaf.sharding)
    return found


def _scales_part(name: str, leaf: Any, mesh: jax.sharding.Mesh) -> Part:
    """Scales of whole matrices, by expert where there are experts: as `parallel.weights` has them."""
    num_dims = len(LAYOUT[name]) - (name in PER_EXPERT)
    *lead, rows, columns = matrix_shape(leaf.shape, INPUT_DIMS[name], num_dims)
    if name.startswith("gate_up") and (columns // 2) % GROUP:
        raise ValueError(f"{name} has halves of {columns // 2} columns: in FP8 blocks of {GROUP} belong to one half; load it as 'bf16'")
    spec = P(*(None,) * (len(lead) - 1), EXPERTS, None, None) if name in PER_EXPERT else P(*(None,) * (len(lead) + 2))
    shape = (*lead, -(-rows // GROUP), -(-columns // GROUP))
    return Part(shape, jnp.float32, jax.sharding.NamedSharding(mesh, spec))


def ranges_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[range]:
    """Return what a shard at `index` of an array holds of each dim."""
    return [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]


class _Buffers:
    """The shards of one array on this process's devices, being filled."""

    def __init__(self, part: Part):
        self.part = part
        self.lock = threading.Lock()  # a buffer is donated to each write
        self.places = part.sharding.addressable_devices_indices_map(part.shape)
        local = part.sharding.shard_shape(part.shape)
        # FP8 as bytes: to write one tensor, XLA:CPU would convert the whole buffer to FP16 and back.
        dtype = jnp.uint8 if part.dtype == E4M3 else part.dtype
        self.shards = {device: jnp.zeros(local, dtype, device=device) for device in self.places}

    def ranges(self, device: jax.Device) -> list[range]:
        return ranges_of(self.places[device], self.part.shape)

    def write(self, device: jax.Device, block: np.ndarray, start: tuple[int, ...], *args: Any) -> None:
        starts, block = tuple(np.int32(i) for i in start), jax.block_until_ready(jax.device_put(block, device))
        with self.lock:
            written = _write(self.shards[device], block, starts, *args)
            self.shards[device] = jax.block_until_ready(written)  # or pieces would wait in line, as many as were read

    def whole(self) -> jax.Array:
        arrays = [_as(self.shards.pop(device), self.part.dtype) for device in self.places]
        return jax.make_array_from_single_device_arrays(self.part.shape, self.part.sharding, arrays)


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


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _as(buffer: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(buffer, dtype)


# ---- one tensor


def _check_copy(shards: Shards, tensor: Tensor, values: np.ndarray) -> None:
    """MTP layers share the main model's embedding and head; a checkpoint repeats them."""
    shared = "model.embed_tokens.weight" if tensor.leaf[-1] == "embed_VD" else "lm_head.weight"
    if not np.array_equal(values.view(np.uint8), shards.read(shared).view(np.uint8)):
        raise ValueError(
            f"{tensor.name} in {shards.entries[tensor.name].file} differs from {shared}; MTP layers here share the main model's"
        )


def _place(buffers: _Buffers, tensor: Tensor, config: Config, values: np.ndarray, scales: np.ndarray | None = None) -> None:
    """Write what each device holds of a tensor."""
    shape = piece_shape(tensor, config.model)
    split = LEADING_DIMS.get(tensor.leaf[-1], 1)
    matrix = values.T if tensor.transposed else values
    matrix = matrix.reshape(math.prod(shape[:split]), -1)  # vectors are one column; a view, whatever the order
    factors = () if scales is None else (np.ascontiguousarray(scales.T),)  # [in / 128, out / 128]
    for device in buffers.shards:
        inside = place_in(tensor, buffers.ranges(device))
        if inside is None:
            continue
        start, dims, extent = inside
        rows, columns = flat(dims[:split], shape[:split]), flat(dims[split:], shape[split:])
        block = matrix[rows.start : rows.stop, columns.start : columns.stop]
        # A GPU transposes faster than its host. To a CPU the copy in the order that is wanted is the one pass there is.
        transposed = tensor.transposed and device.platform != "cpu"
        buffers.write(device, block.T if transposed else block, start, extent, transposed, rows.start, columns.start, *factors)


def place_in(tensor: Tensor, ranges: list[range]) -> tuple[tuple[int, ...], list[range], tuple[int, ...]] | None:
    """Return where a tensor lies in a shard of its leaf, or None if it does not.

    Args:
        tensor: of the table.
        ranges: what the shard holds of each dim of the leaf.

    Returns:
        its first element in the shard, the ranges of its own dims (`piece_shape`) that the shard holds, and its extent in the shard.
    """
    if any(i not in r for i, r in zip(tensor.index, ranges, strict=False)):
        return None
    start = [i - r.start for i, r in zip(tensor.index, ranges, strict=False)]
    dims = list(ranges[len(start) :])
    extent = [1] * len(start) + [len(r) for r in dims]
    start += [0] * len(dims)
    if tensor.half is not None:  # gate_up: [..., D, 2, F]
        del dims[-2]
        extent[-2], start[-2] = 1, tensor.half
    return tuple(start), dims, tuple(extent)


def flat(ranges: list[range], shape: tuple[int, ...]) -> range:
    """Return the range of flattened dims of `shape` that `ranges` are, all whole but the first."""
    size = math.prod(shape[1:])
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:], strict=True)):
        raise AssertionError(f"{ranges} of {shape}: only the first dim of rows or columns may be split")
    return range(ranges[0].start * size, ranges[0].stop * size) if ranges else range(1)


def _place_scales(buffers: _Buffers, tensor: Tensor, scales: np.ndarray) -> None:
    block = np.ascontiguousarray(scales.T)
    for device in buffers.shards:
        ranges = buffers.ranges(device)
        if all(i in r for i, r in zip(tensor.index, ranges, strict=False)):
            start = tuple(i - r.start for i, r in zip(tensor.index, ranges, strict=False))
            extent = (*[1] * len(start), *block.shape)
            buffers.write(device, block, (*start, 0, (tensor.half or 0) * block.shape[1]), extent, False, 0, 0)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write(buffer, block, start, extent, transposed, first_row, first_column, factors=None):
    """Put a block, of which these are the first row and column of its matrix, into `buffer`, times the scales of its rows and columns."""
    block = block.T if transposed else block
    if factors is not None:
        rows = (first_row + jnp.arange(block.shape[0])) // GROUP
        columns = (first_column + jnp.arange(block.shape[1])) // GROUP
        block = block.astype(jnp.float32) * factors[rows][:, columns]
    return jax.lax.dynamic_update_slice(buffer, block.reshape(extent).astype(buffer.dtype), start)
