"""The pure training and evaluation steps.

Order inside `train_step`: forward with MTP and losses, gradients, accumulated over micro-batches together with integer
expert counts, all inside one shard_map; then the optimizer, then one update of the router biases from the global
counts. What is minimised is a value, the objective (`training.objective`). Its terms are sums over this device's
tokens, divided by global normalisers that are known before the first micro-batch. So the results of micro-batches and
devices are only ever added.

A step whose loss or gradients are not finite changes nothing but `step` and `skipped`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_jax.adapters import adapt
from deepseek_jax.config import Config, Execution, Model, Optimizer
from deepseek_jax.model.balance import RouterStats, no_routers, update_biases
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.transformer import Output, apply
from deepseek_jax.parallel import context
from deepseek_jax.parallel.gradient_sums import apart, lend, lends, together, unrolled
from deepseek_jax.parallel.mesh import check_fit
from deepseek_jax.parallel.program import jit_on, resolve_for, resolve_for_training
from deepseek_jax.parallel.stage_weights import whole_tree
from deepseek_jax.parallel.stored import param_specs, stored_specs
from deepseek_jax.parallel.weights import detach, differentiated, gather, in_fp32, reduce_gradients, with_fp8
from deepseek_jax.parameters import PIPE, ROWS, TOKENS, P, Weights
from deepseek_jax.training.micro_batches import split, sum_over
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch, Objective, Pretraining
from deepseek_jax.training.optimizer import Rates, ema_update, global_norms, make_optimizer
from deepseek_jax.training.pipeline import stage_gradients
from deepseek_jax.training.state import State, weights_of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a compiled step reads of a configuration: runs with equal recipes share programs.

    Attributes:
        model: shape and mathematics of the network.
        execution: resolved.
        objective: what is minimised.
        optimizer: without its schedules, whose values arrive as `Rates` with every step.
        micro_batch_size: sequences, over all devices, that go through the network at once.
    """

    model: Model
    execution: Execution
    objective: Objective
    optimizer: Optimizer
    micro_batch_size: int


class Sums(NamedTuple):
    """What a forward pass adds up over tokens, sequences, micro-batches and devices."""

    terms: Any  # sums of the objective
    router: RouterStats  # leading dim: layers with a router


def recipe_of(config: Config, objective: Objective, mesh: jax.sharding.Mesh) -> Recipe:
    """Return what a step reads of `config`, with every "auto" resolved for `mesh`."""
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=(), learning_rate_factor=1.0, warmup_steps=0, bias_update_rate=()
    )
    execution = resolve_for_training(config, mesh).execution
    return Recipe(config.model, execution, objective, optimizer, config.training.micro_batch_size)


def jit_train_step(
    config: Config, objective: Objective, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch, Rates], tuple[State, dict[str, jax.Array]]]:
    """Return `train_step`, jitted for a mesh; the state is donated. Call it under `jax.set_mesh(mesh)`."""
    check_fit(config, mesh)
    recipe = recipe_of(config, objective, mesh)
    return jit_on(train_step, recipe.execution, mesh, recipe, donate=(0,), trains=True)


def jit_eval_step(
    config: Config, objective: Pretraining, mesh: jax.sharding.Mesh
) -> Callable[[Weights, Batch], dict[str, jax.Array]]:
    """Return `eval_step`, jitted for a mesh. Call it under `jax.set_mesh(mesh)`."""
    execution = resolve_for(config, mesh).execution
    return jit_on(eval_step, execution, mesh, config.model, execution, objective)


def train_step(recipe: Recipe, state: State, batch: Batch, rates: Rates) -> tuple[State, dict[str, jax.Array]]:
    """Take one optimizer step.

    Args:
        recipe: what the step is made of.
        state: see `training.state`.
        batch: int32 `tokens_BS`, `positions_BS`, `segment_ids_BS`, and what the objective reads (in pre-training int32
            `targets_BS` and FP32 `loss_weights_BS`). B sequences, a multiple of `training.micro_batch_size`, are split
            over `ROWS`; the devices of `context` take their tokens inside (`parallel.context`).
        rates: this step's learning rate, MTP weight and bias update rate.

    Returns:
        the new state, and metrics: replicated scalars and per-layer arrays (losses in nats per token).
    """
    grads, sums, norms = gradients(recipe, weights_of(state), batch, rates)
    return update(recipe, state, grads, sums, norms, rates)


def gradients(
    recipe: Recipe, weights: Weights, batch: Batch, rates: Rates, base: Any = None, shared: Batch | None = None
) -> tuple[Any, Sums, Any]:
    """Differentiate the objective of a whole batch by `weights.params`: all of the model, or adapters of `base`.

    `shared` are arrays that the objective reads beside those of the batch and that all rows share; each device gets
    them whole. A ValueError says so if one has the name of an array of the batch, or if the mesh is a pipeline, whose
    stages take neither `base` nor `shared`.

    Returns:
        FP32 gradients in the layout of the parameters, global sums, and the objective's normalisers.
    """
    _check_beside(batch, base, shared or {}, jax.sharding.get_abstract_mesh().shape[PIPE])
    specs, base_specs = stored_specs(weights), None if base is None else param_specs(base)
    local = jax.shard_map(
        functools.partial(_local_gradients, recipe),
        in_specs=(specs, {name: P(ROWS) for name in batch}, P(), base_specs, P()),
        out_specs=(specs.params, P(), P()),
    )
    return local(weights, batch, rates, base, shared or {})


def update(
    recipe: Recipe, state: State, grads: Any, sums: Sums, norms: Any, rates: Rates
) -> tuple[State, dict[str, jax.Array]]:
    """Return the state after gradients and expert counts, and the step's metrics; a non-finite step is skipped."""
    params = state["params"]
    metrics = recipe.objective.metrics(sums.terms, sums.router, norms)
    if "loss" not in metrics:
        raise ValueError(
            f"the metrics of {type(recipe.objective).__name__} are {sorted(metrics)} and lack 'loss', by which a step"
            " that is not finite is found; add it"
        )
    with jax.named_scope("optimizer"):
        # The norm can overflow although every element is finite, and clipping by it would then make the gradient zero.
        grad_norm = optax.tree.norm(grads)
        nonfinite = sum(
            jnp.sum(~jnp.isfinite(a), dtype=jnp.int32) for a in (*jax.tree.leaves(grads), grad_norm, metrics["loss"])
        )
        direction, optimizer = make_optimizer(recipe.optimizer).update(grads, state["optimizer"], params)
        new = {
            "params": jax.tree.map(lambda p, d: p - rates.learning_rate * d, params, direction),
            "router_bias": update_biases(state["router_bias"], sums.router.counts_E, rates.bias_update_rate),
            "optimizer": optimizer,
        }
        if "ema" in state:
            new["ema"] = ema_update(state["ema"], new["params"], recipe.optimizer.ema_decay)
        finite = nonfinite == 0
        new = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), new, {name: state[name] for name in new}
        )
        param_norm, direction_norm = global_norms(new["params"], direction)
    new |= {"step": state["step"] + 1, "skipped": jnp.where(finite, 0, state["skipped"] + 1)}
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": rates.learning_rate * direction_norm,
        "param_norm": param_norm,
        "nonfinite": nonfinite,
        "skipped": new["skipped"],
    }
    return new, metrics | _bias_metrics(new["router_bias"])


def eval_step(
    model: Model, execution: Execution, objective: Pretraining, weights: Weights, batch: Batch
) -> dict[str, jax.Array]:
    """Return global sums over a batch.

    They are `loss_sum` in nats, `weight_sum` in tokens, `mtp_loss_sum` [MTP layers] in nats, and `counts_LE` int32.
    """

    def local(weights, batch):
        load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts)
        if lax.axis_size(PIPE) > 1:
            return _eval_alone(model, execution, objective, weights, batch, load)
        weights = weights._replace(params=with_fp8(model, execution, weights.params))
        sums = _forward(model, execution, objective, weights, batch, load)
        return lax.psum(sums, TOKENS), lax.psum(batch["loss_weights_BS"].sum(), ROWS)

    specs = (stored_specs(weights), {name: P(ROWS) for name in batch})
    sums, weight = jax.shard_map(local, in_specs=specs, out_specs=P())(weights, batch)
    return {
        "loss_sum": sums.terms.loss,
        "weight_sum": weight,
        "mtp_loss_sum": sums.terms.mtp,
        "counts_LE": sums.router.counts_E,
    }


def _eval_alone(model: Model, execution: Execution, objective: Pretraining, weights: Weights, batch: Batch, load):
    """Run all layers on every device of a pipeline, each gathered before its use; the results of one count.

    An evaluation has no backward pass, and is rare: it takes as long as without the pipeline's devices.
    """
    sums = _forward(
        model, execution, objective, weights, batch, lambda tree: load(with_fp8(model, execution, whole_tree(tree)))
    )
    own = jax.tree.map(lambda a: jnp.where(lax.axis_index(PIPE) == 0, a, jnp.zeros_like(a)), sums)
    return lax.psum(own, (PIPE, *TOKENS)), lax.psum(batch["loss_weights_BS"].sum(), ROWS)


def _run(
    model: Model, execution: Execution, objective: Objective, weights: Weights, batch: Batch, load, num_parts: int = 1
) -> Output:
    """Run the network over this device's tokens."""
    inputs = network_inputs(model, execution, objective, batch)
    return apply(model, execution, weights, inputs, load, objective.observe, num_parts)


def _forward(
    model: Model, execution: Execution, objective: Objective, weights: Weights, batch: Batch, load, num_parts: int = 1
) -> Sums:
    """Run the network and its head over this device's rows, and sum the objective's terms."""
    output = _run(model, execution, objective, weights, batch, load, num_parts)
    head_DV = in_fp32(load({"head_DV": weights.params["head_DV"]})["head_DV"])
    router = output.observed if model.num_moe_layers else no_routers(model, output.hidden_BSD)
    return context.parts(Sums(objective.terms(output, head_DV, batch), router))


def _local_gradients(recipe: Recipe, weights: Weights, batch: Batch, rates: Rates, base: Any, shared: Batch):
    """Return gradients in the layout of the parameters, global sums and normalisers. Runs inside the shard_map."""
    parts = model, execution, objective = recipe.model, recipe.execution, recipe.objective
    norms = lax.psum(objective.normalisers(batch), ROWS)
    if lax.axis_size(PIPE) > 1:
        grads, *sums = stage_gradients(recipe, weights, split(batch, recipe.micro_batch_size), norms, rates)
        return grads, lax.psum(Sums(*sums), (PIPE, *TOKENS)), norms
    load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts, differentiated=True)
    once = execution.gather == "step"
    params = with_fp8(model, execution, weights.params) if base is None else adapt(base, weights.params)
    micro_batches = split(batch, recipe.micro_batch_size)
    several = micro_batches["tokens_BS"].shape[0] > 1
    lends_sums = lends(execution, several, adapters=base is not None)
    params = load(params) if once else params
    counts = unrolled(params, execution.scan_unroll) if lends_sums else {}
    params, router_bias = (apart(tree, counts) for tree in (params, weights.router_bias))
    _, numbers = detach(params)
    params, whole_params = differentiated(params, base is not None)
    load = (lambda tree: tree) if once else load

    def whole(params):
        return Weights(whole_params(params), router_bias)

    chosen_LE = _choices(parts, whole(params), micro_batches, load) if several and objective.batch_wise else None

    def loss(params, micro_batch):
        sums = _forward(*parts, whole(params), micro_batch | shared, load, execution.interleave)
        router = sums.router
        if objective.batch_wise:
            chosen = lax.psum(router.chosen_E, TOKENS) if chosen_LE is None else chosen_LE
            router = router._replace(chosen_E=chosen)
        return objective.total(sums.terms, router, norms, rates), sums

    def differentiate(micro_batch, total):
        lent = lend(params, numbers, total[0]) if lends_sums and total else params
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(lent, micro_batch)
        return grads, sums  # FP32 as they are made

    grads, sums = sum_over(differentiate, micro_batches)
    grads = lax.optimization_barrier(together(grads)) if counts else grads  # else 82 GB, not 57 (experiments/log.md)
    return reduce_gradients(grads, model.num_experts) if once else grads, lax.psum(sums, TOKENS), norms


def _check_beside(batch: Batch, base: Any, shared: Batch, pipe: int) -> None:
    """Raise if a step cannot take what it is given beside the batch."""
    given = [name for name, absent in (("base", base is None), ("shared", not shared)) if not absent]
    if pipe > 1 and given:
        raise ValueError(f"a pipeline of {pipe} stages takes no {' and no '.join(given)}; set mesh.pipe to 1")
    if both := sorted(batch.keys() & shared):
        raise ValueError(f"shared has arrays that the batch has: {', '.join(both)}; give them other names")


def _choices(parts: tuple, weights: Weights, micro_batches: Batch, load) -> jax.Array:
    """Return what `RouterStats.chosen_E` counts over the whole batch, all micro-batches and devices: int32 [L, E].

    The batch-wise balance loss weighs each token's shares by them, so no micro-batch can be differentiated before all
    are counted. This is a forward pass up to the last router, without the head: with three micro-batches or more about
    a quarter to a third of the arithmetic of a step. The gradients of the shares by expert would cost less time, and
    num_experts times the memory of all gradients. Routes of near-tied tokens may differ from those of the pass that is
    differentiated; the loss moves by some 1 / tokens.
    """
    chosen = lax.map(lambda micro_batch: _run(*parts, weights, micro_batch, load).observed.chosen_E, micro_batches)
    return lax.psum(chosen.sum(0), TOKENS)


def _bias_metrics(router_bias) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves(router_bias)  # none in a model without experts
    bias_LE = jnp.concatenate(leaves) if leaves else jnp.zeros((0, 1))
    return {"bias_min_L": bias_LE.min(-1), "bias_max_L": bias_LE.max(-1)}
