"""Training of adapters on a frozen model: what differs from the training of all weights, and how weights are merged.

    base        read from `training.initial_weights` at every start, in the form in which it is multiplied: E4M3 as
                stored, or quantised once; BF16; FP32. An argument of the step, never written
    state       as of every run (`training.state`), with adapters for parameters: gradients, moments and checkpoints are
                of them alone
    merged      W + scale A B, for everything that reads weights and knows no adapters

`training.adapters_file` says which weights have adapters, and of which base. Its readers get `merged` weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.adapters import Adapted, Lora, adapt, halves, init, is_weight, mark
from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.inference.weights import dequantized
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import check_fit
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parallel.stored import param_specs
from deepseek_jax.parallel.weights import quantize_weights
from deepseek_jax.parameters import EXPERTS, PARAMETERS, Fp8Weight, Weights, leaf_name
from deepseek_jax.training.adapters_file import check_base
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.objective import Batch, Objective
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.origin import find_origin, read_origin
from deepseek_jax.training.state import State, on_mesh, state_around, weights_of
from deepseek_jax.training.step import Recipe, gradients, recipe_of, update
from deepseek_jax.training.workdir import check_tokenizer, put_tokenizer
from pallas_kernels.lowering.manual_axes import varies_over


class Parts(NamedTuple):
    """What a driver needs to train all weights, or adapters.

    Attributes:
        train_step: (state, batch, rates) -> (state, metrics).
        abstract: shapes and shardings of the state.
        create: makes the state and progress of a run without a checkpoint.
        whole: returns the weights that the network computes with, from those of a state.
        origin: reads the weights of the state that the run began with.
        base: fingerprint of the frozen base; "" if all weights are trained.
        weights_met: how many weights of adapters a token meets.
    """

    train_step: Any
    abstract: State
    create: Callable[[], tuple[State, Progress]]
    whole: Callable[[Weights], Weights]
    origin: Callable[[], Weights]
    base: str = ""
    weights_met: float = 0.0

    def on_whole(self, step: Callable) -> Callable:
        """Return a function of a state's weights and a batch that gives `step` the weights of the network."""
        return lambda weights, batch: step(self.whole(weights), batch)


@dataclasses.dataclass(frozen=True)
class StepOnBase:
    """A step, or what it is lowered or compiled to, with the frozen base as its first argument."""

    step: Any
    base: Any

    def __call__(self, *arguments: Any) -> Any:
        """Call the step."""
        return self.step(self.base, *arguments)

    def lower(self, *arguments: Any) -> "StepOnBase":
        """Lower the step for arguments of these shapes."""
        return StepOnBase(self.step.lower(self.base, *arguments), self.base)

    def compile(self) -> "StepOnBase":
        """Compile what was lowered."""
        return StepOnBase(self.step.compile(), self.base)


def open_adapters(
    config: Config,
    lora: Lora,
    objective: Objective,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    first: Callable[[str], Any] | None = None,
) -> Parts:
    """Read the frozen base and return how its adapters are trained; call it under `jax.set_mesh(mesh)`.

    `first` gets the fingerprint of the base and returns the adapters to begin with; None: those of `first_state`.

    Raises:
        ValueError: as `training.origin.read_origin` and `check_base`; a target is no part of the model.
    """
    check_fit(config, mesh)
    fingerprint = check_base(config, workdir)
    recipe = recipe_of(config, objective, mesh)
    fp8 = recipe.execution.precision == "fp8"
    weights, _, progress, tokenizer = read_origin(config, mesh, whole=False, as_stored=fp8)
    base, router_bias = mark(lora, frozen(recipe.execution, weights.params)), weights.router_bias
    abstract = abstract_adapters(config, lora, weights, mesh)
    del weights  # `create` stays for the whole run, and in BF16 `base` is a copy

    def begun() -> State:
        state = jax.jit(functools.partial(first_state, config, lora))(base, router_bias)
        return state | {"params": first(fingerprint)} if first else state

    def create() -> tuple[State, Progress]:
        put_tokenizer(workdir, tokenizer)
        if (origin := find_origin(config)) and origin.run:
            check_tokenizer(config, workdir)
        return begun(), progress

    return Parts(
        StepOnBase(jit_adapted_step(recipe, mesh), base),
        abstract,
        create,
        lambda own: own._replace(params=adapt(base, own.params)),
        lambda: weights_of(begun()),
        fingerprint,
        weights_met(config.model, abstract["params"]),
    )


def adapters_line(lora: Lora, adapters: Any) -> str:
    """Say how many parameters are trained, and what they and their moments take."""
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return (
        f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}: {count:,} parameters,"
        f" {8 * count:,} bytes with their moments; the model is frozen"
    )


def weights_met(model: Model, adapters: Any) -> float:
    """Return how many weights of adapters a token meets: of experts', those of the ones that it is routed to."""
    routed = model.experts_per_token / model.num_experts
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    return float(sum(leaf.size * (routed if PARAMETERS[leaf_name(path)].per_expert else 1) for path, leaf in leaves))


def adapted_step(
    recipe: Recipe, base: Any, state: State, batch: Batch, rates: Rates
) -> tuple[State, dict[str, jax.Array]]:
    """Take one optimizer step of the adapters of `base`, marked parameters (`adapters.mark`); else as `train_step`."""
    grads, sums, norms = gradients(recipe, weights_of(state), batch, rates, base)
    return update(recipe, state, grads, sums, norms, rates)


def jit_adapted_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable:
    """Jit `adapted_step` for a mesh. On a GPU cuBLAS alone multiplies what no kernel of ours does.

    These are a hundred different thin products, each of which XLA would compile some dozens of Triton kernels for, to
    choose of; the step of all weights in FP8 has six (experiments/log.md).
    """
    return jit_on(adapted_step, recipe.execution, mesh, recipe, donate=(1,), cublas=True, trains=True)


def abstract_adapters(config: Config, lora: Lora, weights: Weights, mesh: jax.sharding.Mesh) -> State:
    """Return shapes, dtypes and shardings of the state of adapters on `mesh`; `weights` may be shapes, too."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(first_state, config, lora), mark(lora, weights.params), weights[1])
    return on_mesh(config.optimizer, shapes, mesh)


def first_state(config: Config, lora: Lora, base: Any, router_bias: Any) -> State:
    """Make the state of step 0 of adapters of `base`, marked parameters; call it under `jax.jit` and `jax.set_mesh`."""
    adapters = init(lora.rank, base, jax.random.key(config.seed))
    return state_around(config.optimizer, Weights(adapters, router_bias))


def frozen(execution: Execution, params: Any) -> Any:
    """Return parameters in the form in which a run multiplies them; what is in FP8 stays as it is, and is not copied.

    One weight is converted at a time. Call it under `jax.set_mesh`.
    """
    fp8, dtype = execution.precision == "fp8", compute_dtype(execution)

    def convert_leaf(path, w):
        name = leaf_name(path)
        precision = PARAMETERS[name].precision
        if isinstance(w, Fp8Weight) or precision == "fp32":
            return w
        return requantized(name, w) if fp8 and precision == "fp8" else w.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert_leaf, params, is_leaf=is_weight)


def _same_on_all(name: str, scales: jax.Array) -> jax.Array:
    """Say of gathered scales that they are the same on all devices; those of experts are where these are."""
    kept = EXPERTS if PARAMETERS[name].per_expert else ()
    axes = tuple(sorted(varies_over(scales) - set(kept)))
    return lax.pmax(scales, axes) if axes else scales


# ---- merged weights


def merged(weights: Weights) -> Weights:
    """Return weights without adapters: W + scale A B in FP32, quantised again where W is in FP8.

    A matrix, of a layer or an expert, whose B is zero stays as it is stored: quantised again it might get another
    scale, and so other bytes. One layer of one weight is in FP32 at a time. Call it under `jax.set_mesh`.
    """

    def merge_leaf(path, weight):
        return _merged_stack(leaf_name(path), weight) if isinstance(weight, Adapted) else weight

    return weights._replace(params=jax.tree_util.tree_map_with_path(merge_leaf, weights.params, is_leaf=is_weight))


@functools.partial(jax.jit, static_argnums=0)
def _merged_stack(name: str, weight: Adapted) -> Any:
    return lax.map(functools.partial(_merged_layer, name), weight)


def _merged_layer(name: str, weight: Adapted) -> Any:
    spec, scale = param_specs({name: weight.base})[name], weight.scale
    is_fp8 = isinstance(weight.base, Fp8Weight)

    def merge(base, a, b) -> jax.Array:
        whole = dequantized(name, base) if is_fp8 else base.astype(jnp.float32)
        return whole + scale * jnp.matmul(a, b, precision="highest").reshape(whole.shape)

    def choose(b, new, old):
        changed = jnp.any(b != 0, axis=(-2, -1))  # of a layer's one matrix, or of each expert

        def of_matrix(n, o):
            return jnp.where(changed.reshape(*changed.shape, *(1,) * (n.ndim - changed.ndim)), n, o)

        return jax.tree.map(of_matrix, new, old)

    a, b = halves(weight)
    merge_all: Any = jax.sharding.auto_axes(merge, out_sharding=spec.values if is_fp8 else spec)
    choose_all: Any = jax.sharding.auto_axes(choose, out_sharding=spec)
    whole, base = merge_all(weight.base, a, b), weight.base
    if not is_fp8:
        return choose_all(b, whole, base.astype(jnp.float32))
    return choose_all(b, requantized(name, whole), Fp8Weight(None, base.values, base.scales))


@functools.partial(jax.jit, static_argnums=0)
def requantized(name: str, w: jax.Array) -> Fp8Weight:
    """Return a weight of FP32 in FP8, as a step quantises it."""

    num_experts = w.shape[w.ndim - len(PARAMETERS[name].layout)]

    def local(w):
        values, scales = quantize_weights({name: w}, num_experts)[name]
        return Fp8Weight(None, values, _same_on_all(name, scales))

    specs = param_specs({name: Fp8Weight(None, w, w)})[name]
    return jax.shard_map(local, in_specs=specs.values, out_specs=specs)(w)
