"""How large a run is: parameters, bytes of state, FLOPs, tokens, steps. All of it from shapes; no array is made."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import AXES, axis_size
from deepseek_jax.parallel.stages import STACKS, holding_of, split_layers
from deepseek_jax.parameters import PARAMETERS, PIPE, TOKENS, layout_in_use, layout_of, leaf_name
from deepseek_jax.pipeline.schedules import schedule
from deepseek_jax.pipeline.table import Placement
from deepseek_jax.training.flops import flops_per_token
from deepseek_jax.training.optimizer import on_host
from deepseek_jax.training.state import State, abstract_state
from deepseek_jax.training.summary import active_parameters, num_steps

STAGES = "stages"
# Of `bytes_per_device`: what the traced gradient has inside.
IN_GRADIENT: tuple[str, ...] = ("gradients", "copies", STAGES)


@dataclasses.dataclass(frozen=True)
class Counts:
    """The size of a run.

    Attributes:
        parameters: all that is trained, MTP layers included. Router biases, which no gradient changes, are not.
        mtp_parameters: those of the MTP layers; embedding and head, which they share, are not.
        active: parameters of the main model that one token meets: all but the experts that are not chosen for it. Its
            row of the embedding counts as the whole embedding.
        flops_per_token: of a training step, forward and backward, MTP included, causal attention (`training.flops`).
        tokens: of the whole run.
        steps: optimizer steps of the whole run.
        batch_size: sequences of the largest step.
        tokens_per_step: of the largest step.
    """

    parameters: int
    mtp_parameters: int
    active: int
    flops_per_token: float
    tokens: int
    steps: int
    batch_size: int
    tokens_per_step: int


def count(config: Config, state: State) -> Counts:
    """Return the size of a run whose abstract state is `state`."""
    params = state["params"]
    mtp = _size(params.get("mtp_layers", {}))
    size = largest_batch(config)
    length = config.data.sequence_length
    return Counts(
        parameters=_size(params),
        mtp_parameters=mtp,
        active=active_parameters(config, params),
        flops_per_token=flops_per_token(config.model, length, causal=True, mtp=True),
        tokens=int(config.training.num_tokens),
        steps=num_steps(config),
        batch_size=size,
        tokens_per_step=size * length,
    )


def largest_batch(config: Config) -> int:
    """Return the sequences of the largest step of the batch-size ramp."""
    return int(max(value for _, _, value in config.training.batch_size))


def micro_batches_of(config: Config) -> int:
    """Return the micro-batches of the largest step."""
    return largest_batch(config) // config.training.micro_batch_size


def state_of(config: Config) -> State:
    """Return the abstract state of a config, laid out for one device; `laid_out` says how it lies on more."""
    mesh = jax.make_mesh((1,) * len(AXES), AXES, devices=jax.devices()[:1])
    return abstract_state(config, mesh)


def laid_out(tree: Any, mesh: jax.sharding.AbstractMesh) -> Any:
    """Return a tree of `state_of` with the layouts that its leaves have on `mesh`."""

    def place(path, leaf):
        if leaf.ndim == 0:  # a counter of the optimizer
            return leaf
        name = leaf_name(path)
        layout = layout_of(name, leaf.shape, leaf.shape[leaf.ndim - len(PARAMETERS[name].layout)])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, layout))

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.tree_util.tree_map_with_path(place, tree)


def bytes_per_device(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Return what one device of `mesh` holds, in bytes, by its contents.

    "weights", "moments", "gradients" (FP32) and, where a config has them, "average" and "copies": weights as they are
    multiplied, in E4M3 or BF16. With `execution.gather` = "step" a device has such copies, and gradients, of all
    weights but other devices' experts; with "kept" such copies of all layers, from forward to backward. In a pipeline
    gradients and copies are those of a device's stages, and with "layer" the FP32 weights of its stages lie beside them
    ("stages"). Activations and what a gather of one layer makes are not here: only a compiled step knows them.
    """
    stored = laid_out(state, mesh)
    held = {
        "weights": local_bytes(stored["params"], mesh) + local_bytes(stored["router_bias"], mesh),
        "moments": local_bytes(stored["optimizer"], mesh),
    }
    if "ema" in stored and not on_host(config.optimizer):
        held["average"] = local_bytes(stored["ema"], mesh)
    inside: dict[str, float] = dict.fromkeys(IN_GRADIENT, 0.0)
    share = shares(config, mesh)
    for top, sizes in beside_state(config, state, without_pipe(mesh)).items():
        for name, size in sizes.items():
            inside[name] += share.get(top, 1.0) * size
    if mesh.shape[PIPE] == 1 or config.execution.gather == "step":
        del inside[STAGES]
    return held | {name: round(size) for name, size in inside.items() if size or name == "gradients"}


def host_bytes_per_device(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
    """Return what lies in host memory for one device of `mesh`, in bytes, by its contents.

    "average" with `optimizer.ema_memory` = "host"; "layer inputs" of one micro-batch, MTP layers included, with
    `execution.remat` = "offload".
    """
    held: dict[str, int] = {}
    if on_host(config.optimizer):
        held["average"] = local_bytes(laid_out(state["ema"], mesh), mesh)
    if config.execution.remat == "offload":
        model = config.model
        tokens = config.training.micro_batch_size * config.data.sequence_length // axis_size(mesh, TOKENS)
        size = jnp.dtype(compute_dtype(config.execution)).itemsize * model.width
        held["layer inputs"] = (model.num_layers + model.num_mtp_layers) * tokens * size
    return held


def update_bytes(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> int:
    """Return what a device holds while an average in host memory is updated (`training.average`); without one 0.

    Weights and moments stay; the average comes as 4 bytes a parameter, and the new one is made beside it.
    """
    if not on_host(config.optimizer):
        return 0
    stored = laid_out(state, mesh)
    stay = (stored["params"], stored["router_bias"], stored["optimizer"])
    return sum(local_bytes(tree, mesh) for tree in stay) + 2 * local_bytes(stored["ema"], mesh)


def without_pipe(mesh: jax.sharding.AbstractMesh) -> jax.sharding.AbstractMesh:
    """Return the mesh of the devices that have one place in a pipeline."""
    sizes = dict(mesh.shape) | {PIPE: 1}
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def shares(config: Config, mesh: jax.sharding.AbstractMesh) -> dict[str, float]:
    """Return by stack which share of its layers a device of a pipeline holds, unused slots included; {} without one."""
    if mesh.shape[PIPE] == 1:
        return {}
    model, placement = config.model, placement_of(config.execution.schedule, mesh.shape[PIPE])
    holding = holding_of(placement, split_layers(model, placement.num_stages))
    numbers: dict[str, int] = dict(zip(STACKS, (model.num_dense_layers, model.num_moe_layers), strict=True))
    return {name: layers.shape[1] / max(numbers[name], 1) for name, layers in holding.layers.items()}


@functools.cache
def placement_of(name: str, num_devices: int) -> Placement:
    """Return where a schedule has its stages, which does not depend on the number of micro-batches."""
    return schedule(name, num_devices, 2 * num_devices).placement  # so many, every schedule takes


def beside_state(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> dict[str, dict[str, float]]:
    """Return by the first name of a parameter what a device without a pipeline has of it beside its state, in bytes."""
    found: dict[str, dict[str, float]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out(state["params"], mesh)):
        stored = _part(leaf, leaf.sharding.spec, mesh)
        gradient = _part_in_use(path, leaf, mesh) if config.execution.gather == "step" else stored
        sizes = found.setdefault(str(path[0].key), dict.fromkeys(IN_GRADIENT, 0.0))
        values = {"gradients": 4 * gradient, "copies": _copy(config, path, leaf, mesh), STAGES: 4 * stored}
        for name, size in values.items():
            sizes[name] += size
    return found


def gradient_parts(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> list[tuple[Any, int]]:
    """Return the path of each parameter, and the bytes of its FP32 gradient on a device without a pipeline."""
    whole = config.execution.gather == "step"
    return [
        (path, 4 * (_part_in_use(path, leaf, mesh) if whole else _part(leaf, leaf.sharding.spec, mesh)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out(state["params"], mesh))
    ]


def gathered_layer(config: Config, state: State, mesh: jax.sharding.AbstractMesh) -> int:
    """Return the bytes of the largest layer while it is multiplied: its weights on a device, their FP32 gradients."""
    if config.execution.gather == "step":
        return 0
    stacks: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        stack = str(path[0])
        if "layers" in stack:
            is_fp8 = config.execution.precision == PARAMETERS[leaf_name(path)].precision == "fp8"
            size = (1 if is_fp8 else jnp.dtype(compute_dtype(config.execution)).itemsize) + 4
            stacks[stack] = stacks.get(stack, 0) + size * _part_in_use(path, leaf, mesh) // leaf.shape[0]
    return max(stacks.values(), default=0)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _copy(config: Config, path: Any, leaf: Any, mesh: jax.sharding.AbstractMesh) -> int:
    """Return the bytes of a weight's copies that live through the whole step, or between its passes, on one device."""
    whole = config.execution.gather == "step"
    precision = PARAMETERS[leaf_name(path)].precision
    stored, in_use = _part(leaf, leaf.sharding.spec, mesh), _part_in_use(path, leaf, mesh)
    kept = in_use if config.execution.gather == "kept" and len(path) > 1 and in_use > stored else 0
    if config.execution.precision == "fp8" and precision == "fp8":
        return in_use if whole else stored + kept
    dtype = jnp.dtype(jnp.float32) if precision == "fp32" else compute_dtype(config.execution)
    if not whole or (mesh.size == 1 and dtype == leaf.dtype):
        return dtype.itemsize * kept
    return dtype.itemsize * in_use


def local_bytes(tree: Any, mesh: jax.sharding.AbstractMesh) -> int:
    """Return the bytes of one device's part of a tree that has layouts."""
    return sum(_part(leaf, leaf.sharding.spec, mesh) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part_in_use(path: Any, leaf: Any, mesh: jax.sharding.AbstractMesh) -> int:
    """Return how many elements of a weight lie on one device while it multiplies with them."""
    return _part(leaf, layout_in_use(leaf_name(path), leaf.ndim), mesh)


def _part(leaf: Any, spec: jax.P, mesh: jax.sharding.AbstractMesh) -> int:
    """Return how many elements of a leaf lie on one device. Which dim its axes split depends on the mesh, and does not
    matter here.
    """
    split_over = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return leaf.size // math.prod(mesh.shape[axis] for axis in split_over)
