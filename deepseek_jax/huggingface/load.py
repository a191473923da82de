"""From a checkpoint's tensors to our weights on a mesh, one tensor at a time and straight onto the devices that hold
it.

Every leaf of our tree stacks many tensors: 58 layers x 256 experts x gate and up. A leaf is born as one array of zeros
per device, in the layout of `parameters.PARAMETERS`; a tensor is read once, a few MB of rows at a time, which are cut
into what each device stores of them and written into the arrays in place (`device_arrays`). So the host holds what is
being read and nothing else, whatever the size of the model. A process reads the tensors of which its own devices hold a
part.

    stored [out, in]       ->  the matrix [in, out] of a layer or an expert, its dims split into heads and halves
                               (`names`)
    weight_scale_inv       ->  scales [in / 128, out / 128]: blocks are square, so a transposed weight has transposed
                               scales

The bytes of FP8 are moved, never converted, with weights="fp8". To "bf16" and "fp32" they are multiplied by their scale
on the device.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Model
from deepseek_jax.files import in_order
from deepseek_jax.huggingface.device_arrays import Buffers, Part, allocate, hand_over
from deepseek_jax.huggingface.names import Tensor, tensors
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parameters import EXPERTS, PARAMETERS, Fp8Weight, P, matrix_shape, num_lead_dims, partition_specs
from deepseek_jax.safetensors import reader
from deepseek_jax.safetensors.folder import Shards, compare
from deepseek_jax.safetensors.header import DTYPES
from pallas_kernels.quantized import E4M3, GROUP

Tree = dict[str, Any]
Weights = Literal["fp8", "bf16", "fp32"]
OnBytes = Callable[[int], None]

NUM_THREADS = min(4, os.cpu_count() or 1)  # chunks put into place at once
UNQUANTIZED = ("BF16", "F16", "F32")  # what stands for BF16 in checkpoints of others


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
    """Refuse a folder that is not a checkpoint of `model`; MTP layers may leave out their copies of the embedding and
    the head.

    Raises:
        ValueError: missing or unknown tensors, wrong shapes or dtypes; each is named with its file.
    """
    wanted = expected(model, fp8)
    for name, (dtype, shape) in wanted.items():
        found = shards.entries[name].dtype if name in shards.entries else dtype
        wanted[name] = (found if dtype == "BF16" and found in UNQUANTIZED else dtype, shape)
    compare(shards, wanted, frozenset(tensor.name for tensor in tensors(model) if tensor.copied))


def load(
    shards: Shards,
    config: Config,
    mesh: jax.sharding.Mesh,
    weights: Weights,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> Tree:
    """Return `{"params": ..., "router_bias": ...}` on `mesh`.

    Args:
        shards: a checkpoint of `config.model` (see `check`).
        config: of the run; model and mesh count.
        mesh: where the weights go, each in its layout.
        weights: "fp8" leaves what is stored in FP8 as it is, in `Fp8Weight`s without a carrier, and the rest in BF16;
            "bf16" and "fp32" give arrays. Router and biases are FP32 always.
        on_bytes: called with the bytes of each tensor that is in its place.

    Raises:
        ValueError: "fp8" of a checkpoint that is not, or whose halves of an FFN are no multiple of 128; an MTP layer
            with an embedding or head of its own.
    """
    if weights == "fp8" and all(entry.dtype != "F8_E4M3" for entry in shards.entries.values()):
        raise ValueError(f"the checkpoint {shards.folder} is not in FP8; load it as 'bf16' or 'fp32'")
    arrays = allocate(_parts(config, mesh, weights))
    plan = _plan(shards, config.model, weights, arrays)
    # Copies, scales that are read with their weight, and what belongs to other processes.
    on_bytes(shards.num_bytes - sum(shards.entries[name].num_bytes for name in plan))
    _execute(shards, plan, on_bytes)
    return _tree(hand_over(arrays))


def with_carriers(tree: Any) -> Any:
    """Give every `Fp8Weight` the carrier that products expect; call inside the jitted function, where it takes no
    memory.
    """

    def one(w):
        return (
            Fp8Weight(vary(jnp.zeros(w.values.shape, jnp.float32), w.values), w.values, w.scales)
            if isinstance(w, Fp8Weight)
            else w
        )

    return jax.tree.map(one, tree, is_leaf=lambda w: isinstance(w, Fp8Weight))


# ---- where things go


def abstract_weights(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Shapes and shardings of `params` and `router_bias` on `mesh`, FP32."""
    with jax.set_mesh(mesh):
        params, router_bias = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    tree = {"params": params, "router_bias": router_bias}
    shardings = jax.tree.map(functools.partial(jax.sharding.NamedSharding, mesh), partition_specs(tree))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _parts(config: Config, mesh: jax.sharding.Mesh, weights: Weights) -> dict[tuple[str, ...], Part]:
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_weights(config, mesh))[0]:
        key = tuple(entry.key for entry in path)
        name, lead = key[-1], num_lead_dims(key[-1], leaf.ndim)
        row_dims = PARAMETERS[name].row_dims
        matrices = matrix_shape(leaf.sharding.shard_shape(leaf.shape), lead, row_dims)
        if weights == "fp8" and PARAMETERS[name].precision == "fp8":
            found[*key, "values"] = Part(leaf.shape, E4M3, leaf.sharding, matrices, small=False)
            found[*key, "scales"] = _scales_part(name, matrix_shape(leaf.shape, lead, row_dims), mesh)
        else:
            dtype = jnp.float32 if weights == "fp32" or PARAMETERS[name].keeps_fp32 else jnp.bfloat16
            found[key] = Part(leaf.shape, dtype, leaf.sharding, matrices, small=matrices[-1] == 1)
    return found


def _scales_part(name: str, matrices: tuple[int, ...], mesh: jax.sharding.Mesh) -> Part:
    """Scales of whole matrices, by expert where there are experts: as `parallel.weights` has them."""
    *lead, rows, columns = matrices
    if name.startswith("gate_up") and (columns // 2) % GROUP:
        raise ValueError(
            f"{name} has halves of {columns // 2} columns: in FP8 blocks of {GROUP} belong to one half; load it as"
            " 'bf16'"
        )
    split = [EXPERTS] if PARAMETERS[name].per_expert else []
    spec = P(*[None] * (len(lead) - len(split)), *split, None, None)
    shape = (*lead, -(-rows // GROUP), -(-columns // GROUP))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return Part(shape, jnp.float32, sharding, sharding.shard_shape(shape), small=True)


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
        return (
            Fp8Weight(None, **node)
            if node.keys() == {"values", "scales"}
            else {name: pack(child) for name, child in node.items()}
        )

    return pack(tree)


# ---- what goes where, and the way there


class _Destination(NamedTuple):
    """Where a stored tensor goes.

    Attributes:
        tensor: of the table, or the scales of one.
        array: filled with it.
        devices: of this process, those that hold a part of it.
        scales: name of the stored scales that it is multiplied by, if any.
    """

    tensor: Tensor
    array: Buffers
    devices: tuple[jax.Device, ...]
    scales: str | None


def _plan(
    shards: Shards, model: Model, weights: Weights, arrays: dict[tuple[str, ...], Buffers]
) -> dict[str, _Destination]:
    """Return where each stored tensor goes that this process needs, in the order of the files."""
    targets: dict[str, tuple[Tensor, Buffers]] = {}
    for tensor in tensors(model):
        if tensor.copied:
            _check_copy(shards, tensor)
        elif weights == "fp8" and tensor.quantized:
            targets[tensor.name] = tensor, arrays[*tensor.leaf, "values"]
            targets[tensor.scale_name] = tensor.scales, arrays[*tensor.leaf, "scales"]
        else:
            targets[tensor.name] = tensor, arrays[tensor.leaf]
    plan = {}
    for name in shards.entries:
        if name not in targets:
            continue
        tensor, array = targets[name]
        scaled = weights != "fp8" and tensor.scale_name in shards.entries
        if devices := array.holders(tensor):
            plan[name] = _Destination(tensor, array, devices, tensor.scale_name if scaled else None)
    return plan


def _check_copy(shards: Shards, tensor: Tensor) -> None:
    """MTP layers share the main model's embedding and head; a checkpoint may repeat them."""
    shared = "model.embed_tokens.weight" if tensor.leaf[-1] == "embed_VD" else "lm_head.weight"
    if tensor.name in shards.entries and not shards.equal(tensor.name, shared):
        raise ValueError(
            f"{tensor.name} in {shards.entries[tensor.name].file} differs from {shared}; MTP layers here share the"
            " main model's"
        )


def _execute(shards: Shards, plan: dict[str, _Destination], on_bytes: OnBytes) -> None:
    """Read the planned tensors and put them where they go."""
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
    """Have the programs compiled that `put` needs, in the order in which it needs them."""
    alike = {(plan[name].array, shards.entries[name].shape, plan[name].devices): name for name in reversed(plan)}
    for name in reversed(alike.values()):
        tensor, array, _, scales = plan[name]
        entry = shards.entries[name]
        for rows in reader.row_ranges(entry, reader.CHUNK_BYTES):
            array.prepare(compilers, tensor, rows, DTYPES[entry.dtype], scales is not None)
