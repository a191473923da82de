"""Rollouts: from prompts to groups of samples by the engine, and from samples to the batch of a step.

Tokens go in and tokens come out: what is trained on are the ids that the engine drew, EOS included, never the ids of
their text. Every sample has the log-probabilities that the sampler gave its tokens, and the version of its weights.

Prompt number n of a run is `prompt_at(n)`: epoch after epoch, each in an order of its own. The draws of a sample depend
on the run's seed, the number n and its place in the group (`draw_seed`). So the only state of the sampling is the next
number; a run that continues from it neither loses nor repeats a prompt.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import LENGTH, STOP, Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.posttraining.advantages import is_flat
from deepseek_jax.posttraining.choices import Choices


class Sample(NamedTuple):
    """One output of a prompt.

    Attributes:
        number: of the prompt in the run.
        place: in its group.
        prompt: ids.
        ids: drawn behind the prompt; the last is EOS where `finish_reason` is "stop".
        logprobs: that the sampler gave `ids`, in nats, at temperature 1 and without top-p.
        text: of `ids`, without EOS.
        finish_reason: "stop" or "length".
        version: of the oldest weights that drew one of `ids`.
        routes_TLK: experts of the tokens from `routes_begin` on but the last; None unless asked for.
        routes_begin: tokens of the prompt whose latent was cached, so they have no routes.
    """

    number: int
    place: int
    prompt: Sequence[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    version: int
    routes_TLK: np.ndarray | None
    routes_begin: int


def prompt_at(number: int, num_prompts: int, seed: int) -> int:
    """Return which of `num_prompts` prompts is number `number` of a run, counted from 0 over all epochs."""
    if num_prompts < 1:
        raise ValueError("there are no prompts; give at least one problem")
    return int(_order(number // num_prompts, num_prompts, seed)[number % num_prompts])


@functools.lru_cache(maxsize=2)
def _order(epoch: int, num_prompts: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_prompts)


def draw_seed(seed: int, number: int, place: int) -> int:
    """Return the seed, 64 bits, of the draws of a sample."""
    return int(np.random.SeedSequence((seed, number, place)).generate_state(1, np.uint64)[0])


def sample_groups(
    engine: Engine,
    prompts: Sequence[tuple[int, Sequence[int]]],
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    routes: bool = False,
) -> list[Sample]:
    """Return `group_size` samples of each prompt, group after group, drawn by the engine's present weights.

    Nothing but the temperature changes the model's distribution: with top-p or top-k the ratio of a token would be of
    another distribution than the one that it was drawn from.

    Args:
        engine: its weights are the trainer's, by `Engine.update_weights`.
        prompts: number in the run, and ids with BOS.
        group_size: at least 2.
        max_new_tokens: EOS included.
        seed: of the run.
        temperature: above 0. The log-probabilities are of temperature 1 whatever it is.
        routes: experts of the tokens come along.

    Raises:
        ValueError: a group of one, a temperature of 0, or a prompt that the engine does not take.
        RuntimeError: a sample was not finished.
    """
    if group_size < 2:
        raise ValueError(f"group_size = {group_size}: an output is compared with others of its prompt; use at least 2")
    if not temperature > 0.0:
        raise ValueError(f"temperature = {temperature}: greedy outputs of a group are all equal; use 1")
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0)
    keys = [(number, ids, place) for number, ids in prompts for place in range(group_size)]
    jobs = [
        Job(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            own=Request(seed=draw_seed(seed, number, place), num_logprobs=0),
            keep_end=True,
            routes=routes,
        )
        for number, ids, place in keys
    ]
    samples = []
    for (number, ids, place), answer in zip(keys, engine.generate(jobs), strict=True):
        if answer.finish_reason not in (STOP, LENGTH) or answer.logprobs is None:
            raise RuntimeError(
                f"output {place} of prompt {number} was not finished: {answer.error or answer.finish_reason}"
            )
        logprobs = [entry.logprob for entry in answer.logprobs]
        outcome = answer.text, answer.finish_reason, min(answer.versions)
        route = answer.routes_TLK, answer.usage.cached_tokens
        samples.append(Sample(number, place, ids, answer.ids, logprobs, *outcome, *route))
    return samples


def carries_loss(choices: Choices, samples: Sequence[Sample], rewards_PG: np.ndarray) -> np.ndarray:
    """Return which samples are trained on, bool [P * G]: the choices may leave out overlong ones and flat groups."""
    kept = np.ones(len(samples), bool)
    if choices.overlong == "mask":
        kept &= np.array([sample.finish_reason != LENGTH for sample in samples])
    if choices.drop_flat_groups:
        kept &= np.repeat(~is_flat(rewards_PG), rewards_PG.shape[1])
    return kept


def make_batch(
    samples: Sequence[Sample], advantages_B: np.ndarray, kept_B: np.ndarray, length: int, pad: int
) -> dict[str, np.ndarray]:
    """Return a batch of one sample per row, for `posttraining.policy_objective`, without the trainer's own scores.

    Of a prompt p1 p2 and an output o1 o2 with log-probabilities l1 l2, in a row of five:

        token      p1  p2  o1  pad pad
        target     p2  o1  o2  pad pad
        weight     0   1   1   0   0
        sampler    0   l1  l2  0   0

    Args:
        samples: of any groups.
        advantages_B: of each sample.
        kept_B: whether it carries loss (`carries_loss`).
        length: of the rows, at least that of the longest sample less one.
        pad: the id of padding.

    Raises:
        ValueError: a sample does not fit.
    """
    shape = len(samples), length
    tokens_BS, targets_BS = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
    segment_ids_BS, (weights_BS, sampler_BS) = np.zeros(shape, np.int32), np.zeros((2, *shape), np.float32)
    for i, sample in enumerate(samples):
        ids, begin = [*sample.prompt, *sample.ids], len(sample.prompt) - 1
        end = len(ids) - 1
        if end > length:
            raise ValueError(
                f"prompt {sample.number} and its output {sample.place} have {len(ids)} tokens, and a row takes"
                f" {length + 1}; raise data.sequence_length, or lower the longest output"
            )
        tokens_BS[i, :end], targets_BS[i, :end], segment_ids_BS[i, :end] = ids[:-1], ids[1:], 1
        weights_BS[i, begin:end] = float(kept_B[i])
        sampler_BS[i, begin:end] = sample.logprobs
    return {
        "tokens_BS": tokens_BS,
        "targets_BS": targets_BS,
        "positions_BS": np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)),
        "segment_ids_BS": segment_ids_BS,
        "loss_weights_BS": weights_BS,
        "sampler_logprobs_BS": sampler_BS,
        "advantages_B": np.asarray(advantages_B, np.float32),
    }
