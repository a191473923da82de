"""Training of adapters on a frozen model: what differs from the training of all weights, and how weights are merged.

    base        read from `training.initial_weights` at every start, in the form in which it is multiplied: E4M3 as
                stored, or quantised once; BF16; FP32. An argument of the step, never written
    state       as of every run (`training.state`), with adapters for parameters: gradients, moments and checkpoints are
                of them alone
    merged      W + scale A B, for everything that reads weights and knows no adapters

`adapters.json` in a workdir says which weights have adapters. A run with it is read by `merged_weights`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.adapters import Adapted, Lora, adapt, halves, init, is_weight, mark, shape_of
from deepseek_jax.config import Config, Execution, convert
from deepseek_jax.files import write_atomically
from deepseek_jax.inference.weights import dequantized
from deepseek_jax.inputs import read_json
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import check_fit
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parallel.stored import param_specs
from deepseek_jax.parallel.weights import quantize_weights
from deepseek_jax.parameters import EXPERTS, PARAMETERS, Fp8Weight, Weights, leaf_name
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.objective import Batch, Objective
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.origin import find_origin, read_origin
from deepseek_jax.training.saved import stored_steps
from deepseek_jax.training.state import State, state_around, weights_of
from deepseek_jax.training.step import Recipe, gradients, recipe_of, update
from deepseek_jax.training.workdir import ADAPTERS, check_tokenizer, put_tokenizer
from pallas_kernels.lowering.manual_axes import varies_over


class Parts(NamedTuple):
    """What a driver needs to train adapters in place of all weights.

    Attributes:
        train_step: (state, batch, rates) -> (state, metrics).
        abstract: shapes and shardings of the state.
        create: makes the state and progress of a run without a checkpoint.
        whole: returns the weights that the network computes with, from those of a state.
    """

    train_step: Any
    abstract: State
    create: Callable[[], tuple[State, Progress]]
    whole: Callable[[Weights], Weights]

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


def open_adapters(config: Config, lora: Lora, objective: Objective, workdir: Path, mesh: jax.sharding.Mesh) -> Parts:
    """Read the frozen base and return how its adapters are trained; call it under `jax.set_mesh(mesh)`.

    Raises:
        ValueError: as `training.origin.read_origin`; a target is no part of the model; the base is a run's newest
            checkpoint, whichever that is.
    """
    check_fit(config, mesh)
    _check_stays(config)
    recipe = recipe_of(config, objective, mesh)
    fp8 = recipe.execution.precision == "fp8"
    weights, _, progress, tokenizer = read_origin(config, mesh, whole=False, as_stored=fp8)
    base = mark(lora, frozen(recipe.execution, weights.params))

    def create() -> tuple[State, Progress]:
        put_tokenizer(workdir, tokenizer)
        if (origin := find_origin(config)) and origin.run:
            check_tokenizer(config, workdir)
        return jax.jit(functools.partial(first_state, config, lora))(base, weights.router_bias), progress

    step = jit_on(adapted_step, recipe.execution, mesh, recipe, donate=(1,))
    return Parts(
        StepOnBase(step, base),
        abstract_adapters(config, lora, weights, mesh),
        create,
        lambda own: own._replace(params=adapt(base, own.params)),
    )


def _check_stays(config: Config) -> None:
    """Refuse a base that changes while its run goes on: adapters are of one base, which is read at every start."""
    origin = find_origin(config)
    assert origin is not None  # `posttraining.settings.read` asks for one
    if origin.run and origin.step is None and (steps := stored_steps(origin.folder)):
        raise ValueError(
            f"training.initial_weights = {config.training.initial_weights!r} changes when that run goes on, and"
            f" adapters are of one base; name a step: {config.training.initial_weights}@{max(steps)}"
        )


def claim_adapters(workdir: Path, lora: Lora | None) -> None:
    """Write into a workdir which weights have adapters, if any have; call it just before `claim_workdir`."""
    if lora and jax.process_index() == 0:
        write_atomically(workdir / ADAPTERS, json.dumps(dataclasses.asdict(lora), indent=1) + "\n")


def read_adapters(workdir: Path) -> Lora | None:
    """Return which weights of a run have adapters; None: it trains all weights."""
    path = workdir / ADAPTERS
    return convert(Lora, read_json(path), str(path)) if path.exists() else None


def adapters_line(lora: Lora, adapters: Any) -> str:
    """Say how many parameters are trained, and what they and their moments take."""
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return (
        f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}: {count:,} parameters,"
        f" {8 * count:,} bytes with their moments; the model is frozen"
    )


def adapted_step(
    recipe: Recipe, base: Any, state: State, batch: Batch, rates: Rates
) -> tuple[State, dict[str, jax.Array]]:
    """Take one optimizer step of the adapters of `base`, marked parameters (`adapters.mark`); else as `train_step`."""
    grads, sums, norms = gradients(recipe, weights_of(state), batch, rates, base)
    return update(recipe, state, grads, sums, norms, rates)


def abstract_adapters(config: Config, lora: Lora, weights: Weights, mesh: jax.sharding.Mesh) -> State:
    """Return shapes, dtypes and shardings of the state of adapters on `mesh`; `weights` may be shapes, too."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(first_state, config, lora), mark(lora, weights.params), weights[1])

    def on_mesh(leaf):  # as in `training.state.abstract_state`
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, shapes)


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

    One weight is merged at a time. Call it under `jax.set_mesh`.
    """

    def merge_leaf(path, weight):
        if not isinstance(weight, Adapted):
            return weight
        name = leaf_name(path)
        spec = param_specs({name: weight.base})[name]
        whole = _merged(name, spec.values if isinstance(spec, Fp8Weight) else spec, weight)
        return requantized(name, whole) if isinstance(weight.base, Fp8Weight) else whole

    return weights._replace(params=jax.tree_util.tree_map_with_path(merge_leaf, weights.params, is_leaf=is_weight))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merged(name: str, spec: jax.P, weight: Adapted) -> jax.Array:
    def merge(weight) -> jax.Array:
        base, (a, b) = weight.base, halves(weight)
        base = dequantized(name, base) if isinstance(base, Fp8Weight) else base.astype(jnp.float32)
        return base + weight.scale * jnp.matmul(a, b, precision="highest").reshape(shape_of(weight))

    merge_all: Any = jax.sharding.auto_axes(merge, out_sharding=spec)
    return merge_all(weight)


@functools.partial(jax.jit, static_argnums=0)
def requantized(name: str, w: jax.Array) -> Fp8Weight:
    """Return a weight of FP32 in FP8, as a step quantises it."""

    num_experts = w.shape[w.ndim - len(PARAMETERS[name].layout)]

    def local(w):
        values, scales = quantize_weights({name: w}, num_experts)[name]
        return Fp8Weight(None, values, _same_on_all(name, scales))

    specs = param_specs({name: Fp8Weight(None, w, w)})[name]
    return jax.shard_map(local, in_specs=specs.values, out_specs=specs)(w)
