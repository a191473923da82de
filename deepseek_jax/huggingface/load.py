"""From a checkpoint's tensors to our weights on a mesh, one tensor at a time, straight to the devices that hold it.

Every leaf of our tree stacks many tensors: 58 layers x 256 experts x gate and up. A leaf begins as one array of zeros
per device, in the layout of `parameters.PARAMETERS`. Each tensor is read once, a few MB of rows at a time. Each device
that stores a part of these rows gets its part, written into its array in place (`device_arrays`). So the host holds no
more than what is being read, whatever the size of the model. A process reads only tensors of which its own devices hold
a part.

    stored [out, in]       ->  the matrix [in, out] of a layer or an expert, its dims split into heads and halves
                               (`names`)
    weight_scale_inv       ->  scales [in / 128, out / 128]: blocks are square, so a transposed weight has transposed
                               scales

With precision="fp8" the bytes of FP8 are moved and never converted. With "bf16" and "fp32" they are multiplied by their
scales on the device.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Model
from deepseek_jax.files import in_order
from deepseek_jax.huggingface.device_arrays import ArraySpec, DeviceArray, Key, allocate, hand_over
from deepseek_jax.huggingface.names import HALVED, Tensor, tensors
from deepseek_jax.model import transformer
from deepseek_jax.parameters import (
    EXPERTS,
    PARAMETERS,
    Fp8Weight,
    P,
    Weights,
    matrix_shape,
    num_lead_dims,
    partition_specs,
)
from deepseek_jax.safetensors import reader
from deepseek_jax.safetensors.folder import Shards
from deepseek_jax.safetensors.header import DTYPES
from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3

Tree = dict[str, Any]
Precision = Literal["fp8", "bf16", "fp32"]
OnBytes = Callable[[int], None]

NUM_THREADS = min(4, os.cpu_count() or 1)  # chunks that are put into their arrays at once


def load(
    shards: Shards,
    config: Config,
    mesh: jax.sharding.Mesh,
    precision: Precision,
    on_bytes: OnBytes = lambda n: None,
) -> Weights:
    """Return the weights on `mesh`.

    Args:
        shards: a checkpoint of `config.model` (see `contents.check`).
        config: of the run; only its model and its mesh matter here.
        mesh: to which the weights go, each in its layout.
        precision: "fp8" keeps what is stored in FP8 as it is, in `Fp8Weight`s without a carrier, and makes the rest
            BF16. "bf16" and "fp32" make arrays. Router and biases are always FP32.
        on_bytes: called with the number of bytes that have been put into their arrays.

    Raises:
        ValueError: "fp8" is asked of a checkpoint that is not in FP8, or whose hidden widths are not multiples of 128;
            or an MTP layer has an embedding or a head of its own.
    """
    if precision == "fp8" and all(entry.dtype != "F8_E4M3" for entry in shards.entries.values()):
        raise ValueError(f"the checkpoint {shards.folder} is not in FP8; load it as 'bf16' or 'fp32'")
    arrays = allocate(_specs(config, mesh, precision))
    plan = _plan(shards, config.model, precision, arrays)
    # Some tensors are not planned: copies, scales that are read with their weight, and those of other processes.
    on_bytes(shards.num_bytes - sum(shards.entries[name].num_bytes for name in plan))
    _execute(shards, plan, on_bytes)
    return Weights(**{"router_bias": {}} | _tree(hand_over(arrays)))  # a model without experts has no biases


# ---- the arrays


def abstract_weights(config: Config, mesh: jax.sharding.Mesh) -> Weights:
    """Return shapes and shardings of the weights on `mesh`, in FP32."""
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
        shardings = jax.tree.map(functools.partial(jax.sharding.NamedSharding, mesh), partition_specs(tree))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _specs(config: Config, mesh: jax.sharding.Mesh, precision: Precision) -> dict[Key, ArraySpec]:
    specs = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_weights(config, mesh))[0]:
        key = tuple(getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
        name, lead = key[-1], num_lead_dims(key[-1], leaf.ndim)
        row_dims = PARAMETERS[name].row_dims
        matrices = matrix_shape(leaf.sharding.shard_shape(leaf.shape), lead, row_dims)
        if precision == "fp8" and PARAMETERS[name].precision == "fp8":
            specs[*key, "values"] = ArraySpec(leaf.shape, E4M3, leaf.sharding, matrices, small=False)
            specs[*key, "scales"] = _scales_spec(name, matrix_shape(leaf.shape, lead, row_dims), mesh)
        else:
            dtype = jnp.float32 if precision == "fp32" or PARAMETERS[name].keeps_fp32 else jnp.bfloat16
            specs[key] = ArraySpec(leaf.shape, dtype, leaf.sharding, matrices, small=matrices[-1] == 1)
    return specs


def _scales_spec(name: str, matrices: tuple[int, ...], mesh: jax.sharding.Mesh) -> ArraySpec:
    """Return the array of a weight's scales: of whole matrices, split by experts only, as in `parallel.weights`."""
    *lead, rows, columns = matrices
    if name in HALVED and (columns // 2) % GROUP:
        raise ValueError(
            f"{name} has halves of {columns // 2} columns: in FP8 blocks of {GROUP} belong to one half; load it as"
            " 'bf16'"
        )
    split = [EXPERTS] if PARAMETERS[name].per_expert else []
    spec = P(*[None] * (len(lead) - len(split)), *split, None, None)
    shape = (*lead, -(-rows // GROUP), -(-columns // GROUP))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return ArraySpec(shape, jnp.float32, sharding, sharding.shard_shape(shape), small=True)


def _tree(arrays: dict[Key, jax.Array]) -> Tree:
    tree: Tree = {}
    for key, array in arrays.items():
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = array

    def pack(node):
        if not isinstance(node, dict):
            return node
        if node.keys() == {"values", "scales"}:
            return Fp8Weight(None, **node)
        return {name: pack(child) for name, child in node.items()}

    return pack(tree)


# ---- the plan and its execution


class _Destination(NamedTuple):
    """Where a stored tensor goes.

    Attributes:
        tensor: of the table, or the scales of one.
        array: the array that it is a part of.
        devices: the devices of this process that hold a part of it.
        scales: name of the stored scales by which it is multiplied, if any.
    """

    tensor: Tensor
    array: DeviceArray
    devices: tuple[jax.Device, ...]
    scales: str | None


def _plan(
    shards: Shards, model: Model, precision: Precision, arrays: dict[Key, DeviceArray]
) -> dict[str, _Destination]:
    """Return the destination of each stored tensor that this process needs, in the order of the files."""
    targets: dict[str, tuple[Tensor, DeviceArray]] = {}
    for tensor in tensors(model):
        if tensor.copied:
            _check_copy(shards, tensor)
        elif precision == "fp8" and tensor.quantized:
            targets[tensor.name] = tensor, arrays[*tensor.leaf, "values"]
            targets[tensor.scale_name] = tensor.scales, arrays[*tensor.leaf, "scales"]
        else:
            targets[tensor.name] = tensor, arrays[tensor.leaf]
    plan = {}
    for name in shards.entries:
        if name not in targets:
            continue
        tensor, array = targets[name]
        scaled = precision != "fp8" and tensor.scale_name in shards.entries
        if devices := array.holders(tensor):
            plan[name] = _Destination(tensor, array, devices, tensor.scale_name if scaled else None)
    return plan


def _check_copy(shards: Shards, tensor: Tensor) -> None:
    """Check that an MTP layer's embedding or head equals the main model's, which it shares here."""
    shared = "model.embed_tokens.weight" if tensor.leaf[-1] == "embed_VD" else "lm_head.weight"
    if tensor.name in shards.entries and not shards.equal(tensor.name, shared):
        raise ValueError(
            f"{tensor.name} in {shards.entries[tensor.name].file} differs from {shared}; MTP layers here share the"
            " main model's"
        )


def _execute(shards: Shards, plan: dict[str, _Destination], on_bytes: OnBytes) -> None:
    """Read the planned tensors and put them into their arrays."""
    # Scales are not read ahead: they are small, lie beside their weight, and may even lie in another file.
    read_scales = functools.lru_cache(maxsize=4 * NUM_THREADS)(shards.read)

    def put(chunk: reader.Chunk) -> int:
        try:
            tensor, array, _, scales = plan[chunk.name]
            array.put(tensor, chunk.values, chunk.first_row, read_scales(scales) if scales else None)
            return chunk.values.nbytes
        finally:
            chunk.release()

    # A host transposes with one thread per chunk.
    with ThreadPoolExecutor() as compilers, ThreadPoolExecutor(NUM_THREADS) as pool:
        _compile_ahead(shards, plan, compilers)
        for count in in_order(pool, put, shards.stream(plan), reader.NUM_BUFFERS):
            on_bytes(count)


def _compile_ahead(shards: Shards, plan: dict[str, _Destination], compilers: Executor) -> None:
    """Start compiling the programs that fill the arrays, in the order in which they are needed."""
    alike = {(plan[name].array, shards.entries[name].shape, plan[name].devices): name for name in reversed(plan)}
    for name in reversed(alike.values()):
        tensor, array, _, scales = plan[name]
        entry = shards.entries[name]
        for rows in reader.row_ranges(entry, reader.CHUNK_BYTES):
            array.prepare(compilers, tensor, rows, DTYPES[entry.dtype], scales is not None)
