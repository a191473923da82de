"""Log-probabilities of a rollout: what the ratios of GRPO divide by, and the reference's.

Two ways. `score` is the trainer's forward pass. `exact_scores` are by the sampler's own program, of an engine in exact
arithmetic (`inference.exact`): the numbers that a token had when it was drawn, bit for bit, while the weights are those
that drew it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepseek_jax.config import Config, Execution, Model
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.exact_calls import check_exact
from deepseek_jax.inference.job import Job
from deepseek_jax.model.moe import chosen_experts
from deepseek_jax.model.transformer import apply
from deepseek_jax.parallel.program import jit_on, resolve_for
from deepseek_jax.parallel.weights import in_fp32
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.forward import over_rows
from deepseek_jax.posttraining.grpo_settings import PATH
from deepseek_jax.posttraining.policy_objective import Policy
from deepseek_jax.posttraining.rollouts import rows_of
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.network_inputs import network_inputs
from deepseek_jax.training.objective import Batch

READ = "tokens_BS", "targets_BS", "positions_BS", "segment_ids_BS"
ALSO_READ = "routes_BSLK", "kept_BSW"  # where the batch has them


class Scored(NamedTuple):
    """Scores of a batch.

    Attributes:
        logprobs_BS: of the targets, FP32, in nats; 0 where a target carries no loss.
        routes_BSLK: experts that the routers choose, int16; those of padding mean nothing. None of an engine without.
    """

    logprobs_BS: np.ndarray
    routes_BSLK: np.ndarray | None


def jit_score(
    config: Config, policy: Policy, mesh: jax.sharding.Mesh
) -> Callable[[Weights, Batch], tuple[Array, Array]]:
    """Return `score`, jitted for a mesh without the axes `pipe` and `context`. Call it under `jax.set_mesh(mesh)`."""
    execution = resolve_for(config, mesh).execution
    return jit_on(score, execution, mesh, config.model, execution, policy)


def score(model: Model, execution: Execution, policy: Policy, weights: Weights, batch: Batch) -> tuple[Array, Array]:
    """Return the log-probability of each target, FP32 [B, S], in nats, and what each router would choose [B, S, L, K].

    Where the batch has routes they are replayed, and the routers say what they would choose on the way.
    """

    def forward(weights, batch, load):
        inputs = network_inputs(model, execution, policy, batch)
        if inputs.replay is not None:
            inputs = dataclasses.replace(inputs, replay=dataclasses.replace(inputs.replay, watches=True))
        output = apply(model, execution, weights, inputs, load, chosen_experts, 1)
        head_DV = in_fp32(load({"head_DV": weights.params["head_DV"]})["head_DV"])
        logprob_BS = policy.logprobs(output, head_DV, batch)
        routes_BSLK = jnp.zeros((*logprob_BS.shape, 0, model.experts_per_token), jnp.int16)
        if output.observed is not None:
            routes_BSLK = jnp.moveaxis(output.observed, 0, 2).astype(jnp.int16)
        return logprob_BS, routes_BSLK

    return over_rows(model, execution, forward, weights, batch)


def score_rows(
    program: Callable[[Weights, Batch], Any],
    weights: Weights,
    batch: dict[str, np.ndarray],
    micro_batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Scored:
    """Score a batch of any number of micro-batches, one after the other."""
    read = {name: batch[name] for name in (*READ, *ALSO_READ) if name in batch}
    parts = [
        program(weights, place_batch({name: rows[i : i + micro_batch_size] for name, rows in read.items()}, mesh))
        for i in range(0, len(read["tokens_BS"]), micro_batch_size)
    ]
    logprobs_BS, routes_BSLK = (np.concatenate(x) for x in zip(*jax.device_get(parts), strict=True))
    return Scored(_carried(batch, logprobs_BS), routes_BSLK)


def exact_scores(engine: Engine, batch: dict[str, np.ndarray]) -> Scored:
    """Score a batch by an engine in exact arithmetic, with the weights that it has.

    Raises:
        RuntimeError: the engine has stopped.
    """
    lengths_B = (batch["segment_ids_BS"] > 0).sum(1)
    sequences = [
        [*tokens_S[:length].tolist(), int(targets_S[length - 1])]
        for tokens_S, targets_S, length in zip(batch["tokens_BS"], batch["targets_BS"], lengths_B, strict=True)
    ]
    jobs = [Job(prompt=ids, max_new_tokens=0, sampling=GREEDY, prompt_logprobs=0, routes=True) for ids in sequences]
    logprobs_BS, routes = np.zeros(batch["tokens_BS"].shape, np.float32), []
    for logprobs_S, length, answer in zip(logprobs_BS, lengths_B, engine.generate(jobs), strict=True):
        if answer.prompt_logprobs is None or answer.routes_TLK is None:
            raise RuntimeError(f"outputs were not scored: {answer.error or answer.finish_reason}")
        logprobs_S[:length] = [entry.logprob for entry in answer.prompt_logprobs if entry is not None]
        routes.append(answer.routes_TLK[:length])
    return Scored(_carried(batch, logprobs_BS), rows_of(routes, logprobs_BS.shape[1]))


def _carried(batch: dict[str, np.ndarray], logprobs_BS: np.ndarray) -> np.ndarray:
    return np.where(batch["loss_weights_BS"] > 0, logprobs_BS, np.float32(0.0))


def flipped(batch: dict[str, np.ndarray], rollout_BSLK: np.ndarray | None, own_BSLK: np.ndarray | None) -> float:
    """Return the share of choices, sets of experts by token and layer, that differ from those of the rollout.

    Tokens whose routes the rollout does not know do not count; without any it is 0.
    """
    if rollout_BSLK is None or own_BSLK is None:
        return 0.0
    known_BSL = (rollout_BSLK >= 0).all(-1) & (batch["segment_ids_BS"] > 0)[..., None]
    differs_BSL = (np.sort(rollout_BSLK, -1) != np.sort(own_BSLK, -1)).any(-1)
    return float(differs_BSL[known_BSL].mean()) if known_BSL.any() else 0.0


def refuse_exact(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> None:
    """Refuse exact arithmetic where sampler and trainer would not have the same numbers.

    Raises:
        ValueError: the model has ids that the tokenizer lacks.
        NotImplementedError: on a GPU, or on several devices.
    """
    check_exact(config.execution.precision, mesh)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{PATH}.arithmetic = 'exact' and model.vocab_size = {config.model.vocab_size}: the sampler's softmax is"
            f" over the {tokenizer.vocab_size} ids of the tokenizer, and the trainer's is over all; use 'fast'"
        )


def refuse_mesh(mesh: jax.sharding.Mesh, stage: str) -> None:
    """Refuse a mesh over whose devices outputs are not scored, in the name of a stage.

    Raises:
        ValueError: rows or layers are split, or there are several processes.
    """
    for axis in ("pipe", "context", "tensor"):
        if mesh.shape.get(axis, 1) > 1:
            raise ValueError(f"config.mesh.{axis} = {mesh.shape[axis]}: {stage} needs 1; use mesh.data or mesh.expert")
    if jax.process_count() > 1:
        raise ValueError(f"{stage} runs in one process, and there are {jax.process_count()}; start one")
