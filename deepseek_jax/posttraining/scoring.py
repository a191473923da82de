"""Log-probabilities by the trainer's own network: what the ratios of GRPO divide by, and the reference's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.transformer import apply
from deepseek_jax.parallel.program import jit_on, resolve_for
from deepseek_jax.parallel.weights import gather, in_fp32, with_fp8
from deepseek_jax.parameters import ROWS, P, Weights, partition_specs
from deepseek_jax.posttraining.policy_objective import Policy, policy_logprobs
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch
from pallas_kernels.lowering import manual_axes

READ = "tokens_BS", "targets_BS", "positions_BS", "segment_ids_BS"


def jit_score(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> Callable[[Weights, Batch], Array]:
    """Return `score`, jitted for a mesh without the axes `pipe` and `context`. Call it under `jax.set_mesh(mesh)`."""
    execution = resolve_for(config, mesh).execution
    return jit_on(score, execution, mesh, config.model, execution, policy)


def score(model: Model, execution: Execution, policy: Policy, weights: Weights, batch: Batch) -> Array:
    """Return the log-probability of each target, FP32 [B, S], in nats."""

    def local(weights, batch):
        load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts)
        weights = weights._replace(params=with_fp8(model, execution, weights.params))
        inputs = network_inputs(model, execution, policy, batch)
        output = apply(model, execution, weights, inputs, load, policy.observe, 1)
        head_DV = in_fp32(load({"head_DV": weights.params["head_DV"]})["head_DV"])
        logprob_BS = policy_logprobs(output.hidden_BSD, head_DV, batch["targets_BS"], policy.chunk, policy.temperature)
        others = tuple(sorted(manual_axes.varies_over(logprob_BS) - set(ROWS)))  # of size 1: `refuse_mesh`
        return lax.psum(logprob_BS, others) if others else logprob_BS

    specs = Weights(partition_specs(weights.params), jax.tree.map(lambda _: P(), weights.router_bias))
    return jax.shard_map(local, in_specs=(specs, {name: P(ROWS) for name in batch}), out_specs=P(ROWS))(weights, batch)


def score_rows(
    program: Callable[[Weights, Batch], Any],
    weights: Weights,
    batch: dict[str, np.ndarray],
    micro_batch_size: int,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Score a batch of any number of micro-batches, one after the other; 0 where a target carries no loss."""
    read = {name: batch[name] for name in READ}
    parts = [
        program(weights, place_batch({name: rows[i : i + micro_batch_size] for name, rows in read.items()}, mesh))
        for i in range(0, len(read["tokens_BS"]), micro_batch_size)
    ]
    return np.where(batch["loss_weights_BS"] > 0, np.concatenate(jax.device_get(parts)), np.float32(0.0))


def refuse_mesh(mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh over whose devices outputs are not scored.

    Raises:
        ValueError: rows or layers are split, or there are several processes.
    """
    for axis in ("pipe", "context", "tensor"):
        if mesh.shape.get(axis, 1) > 1:
            raise ValueError(f"config.mesh.{axis} = {mesh.shape[axis]}: GRPO needs 1; use mesh.data or mesh.expert")
    if jax.process_count() > 1:
        raise ValueError(f"GRPO samples and trains in one process, and there are {jax.process_count()}; start one")
