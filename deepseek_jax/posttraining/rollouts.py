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

from deepseek_jax.inference.answers import Answer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import LENGTH, STOP, Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.posttraining.choices import Choices

PLAIN = 1.0, 0, 1.0  # temperature, top-k and top-p that leave the model's distribution as it is


class Sample(NamedTuple):
    """One output of a prompt.

    Attributes:
        number: of the prompt in the run.
        place: in its group.
        prompt: ids.
        ids: drawn behind the prompt; the last is EOS where `finish_reason` is "stop".
        logprobs: that the sampler gave `ids`, in nats, as they were drawn: at the temperature, and among what top-k and
            top-p kept.
        text: of `ids`, without EOS.
        finish_reason: "stop" or "length".
        version: of the oldest weights that drew one of `ids`.
        routes_TLK: experts of the tokens from `routes_begin` on but the last; None unless asked for.
        routes_begin: tokens of the prompt whose latent was cached, so they have no routes.
        kept_TW: int32, what each of `ids` was drawn among (`completions.Drawn`); None: all that the sampler knows.
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
    kept_TW: np.ndarray | None = None


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
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Sample]:
    """Return `group_size` samples of each prompt, group after group, drawn by the engine's present weights.

    Where the temperature, top-k or top-p changes the model's distribution, samples tell the log-probabilities of their
    draws and what these were among, so that the trainer scores the distribution that they are of.

    Args:
        engine: its weights are the trainer's, by `Engine.update_weights`.
        prompts: number in the run, and ids with BOS.
        group_size: at least 2.
        max_new_tokens: EOS included.
        seed: of the run.
        temperature: above 0.
        routes: experts of the tokens come along.
        top_k: the most probable so many, of which a token is drawn; 0: of all.
        top_p: the fewest most probable that reach this probability; 1: all.

    Raises:
        ValueError: a group of one, a temperature of 0, or a prompt that the engine does not take.
        RuntimeError: a sample was not finished.
    """
    if group_size < 2:
        raise ValueError(f"group_size = {group_size}: an output is compared with others of its prompt; use at least 2")
    if not temperature > 0.0:
        raise ValueError(f"temperature = {temperature}: greedy outputs of a group are all equal; use 1")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    keys = [(number, ids, place) for number, ids in prompts for place in range(group_size)]
    jobs = [
        Job(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            own=Request(seed=draw_seed(seed, number, place), num_logprobs=0),
            keep_end=True,
            routes=routes,
            kept=(temperature, top_k, top_p) != PLAIN,
        )
        for number, ids, place in keys
    ]
    return [_sample(*key, answer, jobs[0]) for key, answer in zip(keys, engine.generate(jobs), strict=True)]


def _sample(number: int, ids: Sequence[int], place: int, answer: Answer, job: Job) -> Sample:
    if answer.finish_reason not in (STOP, LENGTH) or answer.logprobs is None:
        raise RuntimeError(
            f"output {place} of prompt {number} was not finished: {answer.error or answer.finish_reason}"
        )
    logprobs, kept_TW = [entry.logprob for entry in answer.logprobs], None
    if job.kept:
        drawn = [entry.drawn for entry in answer.logprobs if entry.drawn is not None]
        logprobs, is_cut = [each.logprob for each in drawn], (job.sampling.top_k, job.sampling.top_p) != PLAIN[1:]
        kept_TW = np.stack([each.words_W for each in drawn]) if is_cut else None
    outcome = answer.text, answer.finish_reason, min(answer.versions)
    route = answer.routes_TLK, answer.usage.cached_tokens
    return Sample(number, place, ids, answer.ids, logprobs, *outcome, *route, kept_TW)


def whole_routes(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return the experts of all tokens of each sample but the last, int16 [T, L, K]; below 0 where nobody has them.

    Tokens whose latent was cached have none of their own: they are those of the sample that put them there.
    """
    whole: dict[int, np.ndarray] = {}
    for begin in sorted({sample.routes_begin for sample in samples}):
        owners = {tuple(_ids(samples[i])[:begin]): i for i, routes_TLK in whole.items() if len(routes_TLK) >= begin}
        for i, sample in enumerate(samples):
            if sample.routes_begin == begin:
                own_TLK = _routes_of(sample).astype(np.int16)
                owner = owners.get(tuple(_ids(sample)[:begin])) if begin else None
                before = np.full((begin, *own_TLK.shape[1:]), -1, np.int16) if owner is None else whole[owner][:begin]
                whole[i] = np.concatenate([before, own_TLK])
    return [whole[i] for i in range(len(samples))]


def _ids(sample: Sample) -> list[int]:
    return [*sample.prompt, *sample.ids]


def _routes_of(sample: Sample) -> np.ndarray:
    if sample.routes_TLK is None:
        raise ValueError(f"prompt {sample.number}, output {sample.place} has no routes; sample with routes=True")
    return sample.routes_TLK


def routes_of(samples: Sequence[Sample], length: int) -> np.ndarray | None:
    """Return the experts of all tokens of the rows of `make_batch`, as `rows_of`; None from an engine without any."""
    return None if samples[0].routes_TLK is None else rows_of(whole_routes(samples), length)


def rows_of(routes: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Return routes [T, L, K] as rows [B, S, L, K], int16, filled up with -1: there the router chooses."""
    rows_BSLK = np.full((len(routes), length, *routes[0].shape[1:]), -1, np.int16)
    for row_SLK, routes_TLK in zip(rows_BSLK, routes, strict=True):
        row_SLK[: len(routes_TLK)] = routes_TLK
    return rows_BSLK


def carries_loss(choices: Choices, samples: Sequence[Sample], right_PG: np.ndarray) -> np.ndarray:
    """Return which samples are trained on, bool [P * G]: the choices may leave out overlong ones and flat groups.

    A group is flat if none or all of its outputs are right (DAPO, arXiv 2503.14476, eq. 11), whatever length or form
    adds to their rewards.

    Args:
        choices: of the variant.
        samples: group after group.
        right_PG: bool, which are right.
    """
    kept = np.ones(len(samples), bool)
    if choices.overlong == "mask":
        kept &= np.array([sample.finish_reason != LENGTH for sample in samples])
    if choices.drop_flat_groups:
        kept &= np.repeat(right_PG.any(1) & ~right_PG.all(1), right_PG.shape[1])
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

    Where samples say what they were drawn among, `kept_BSW` has it beside the targets; 0 elsewhere: all ids.

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
    arrays = {
        "tokens_BS": tokens_BS,
        "targets_BS": targets_BS,
        "positions_BS": np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)),
        "segment_ids_BS": segment_ids_BS,
        "loss_weights_BS": weights_BS,
        "sampler_logprobs_BS": sampler_BS,
        "advantages_B": np.asarray(advantages_B, np.float32),
    }
    kept = [sample.kept_TW for sample in samples if sample.kept_TW is not None]
    if not kept:
        return arrays
    kept_BSW = np.zeros((*shape, kept[0].shape[1]), np.int32)
    for kept_SW, sample, kept_TW in zip(kept_BSW, samples, kept, strict=True):
        begin = len(sample.prompt) - 1
        kept_SW[begin : begin + len(kept_TW)] = kept_TW
    return arrays | {"kept_BSW": kept_BSW}
