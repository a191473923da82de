"""Completions: what follows each of several prompts, as text, why it ended, and how probable its tokens were."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.generate import known_ids, prompt_ids, stream_chosen
from deepseek_jax.inference.requests import PLAIN, Request
from deepseek_jax.inference.sampling import Chosen, Sampling
from deepseek_jax.inference.text import Text
from deepseek_jax.parameters import Weights


class Drawn(NamedTuple):
    """What a token was drawn among: the tokens that min-p, top-k and top-p kept at its place.

    Attributes:
        words_W: int32; bit i of word w is 1 if token 32 w + i was kept.
        logprob: natural logarithm of its probability among them, at the temperature of the draw.
    """

    words_W: np.ndarray
    logprob: float


class TokenLogprob(NamedTuple):
    """A token, the natural logarithm of its probability, and the most probable tokens in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    drawn: Drawn | None = None  # where a job asks for it


class Completion(NamedTuple):
    """What follows a prompt."""

    text: str
    reason: str  # "stop" (EOS, or a stop string, which the text lacks) or "length"
    num_tokens: int  # those of a stop string included, EOS not
    logprobs: list[TokenLogprob] | None = None  # of these tokens, where they are asked for


def complete(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
    stop: Sequence[str | int] = (),
    first_row: int = 0,
    batch_size: int = 0,
    requests: Sequence[Request] = (),
) -> list[Completion]:
    """Return what follows each of several prompts of any lengths, decoded as one batch.

    Args:
        config: as all others but the last, see `generate.stream`.
        first_row: number of the first prompt. Its draws depend on the seed and this number alone, so prompts that are
            completed in several batches get the same texts as in one, up to rounding.
        batch_size: rows of the batch, if there are fewer prompts: a last, smaller batch then shares programs.
        requests: what each prompt has of its own: seed, bias, log-probabilities (else those of `sampling`).

    Raises:
        ValueError: as `generate.stream`; a bias for an id that the tokenizer lacks.
    """
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    requests = requests or [PLAIN] * len(prompts)
    own = [r.num_logprobs for r in requests]
    counts = [sampling.num_logprobs if count is None else count for count in own]  # None where nobody asks
    most = max((count for count in counts if count is not None), default=None)
    sampling = dataclasses.replace(sampling, num_logprobs=most)
    texts = [Text(tokenizer, stop) for _ in prompts]
    ids = [prompt_ids(config, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    weights, stopped_B = known_ids(weights, tokenizer), np.zeros(len(prompts), bool)
    bursts: list[Chosen] = []
    rest = stopped_B, first_row, batch_size, requests
    for chosen in stream_chosen(config, weights, ids, max_new_tokens, sampling, seed, tokenizer.eos, mesh, *rest):
        bursts.append(chosen)
        for i, text in enumerate(texts):
            pieces[i].append(text.push(chosen.ids_B[i]))
            stopped_B[i] = text.reason is not None
    whole = ["".join([*parts, text.finish()]) for parts, text in zip(pieces, texts, strict=True)]
    return [
        Completion(whole[i], str(text.reason), text.num_tokens, _logprobs(bursts, i, text.num_tokens, counts[i]))
        for i, text in enumerate(texts)
    ]


def _logprobs(bursts: list[Chosen], row: int, num_tokens: int, count: int | None) -> list[TokenLogprob] | None:
    """Return those of a row's first `num_tokens` tokens, `count` of the most probable with each."""
    if count is None:
        return None
    parts = [jax.tree.map(lambda leaf: leaf[row], chosen) for chosen in bursts]
    ids_K, found_K = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_tokens], *parts)
    tops = zip(found_K.top_ids_BK[:, :count].tolist(), found_K.top_BK[:, :count].tolist(), strict=True)
    found = zip(ids_K.tolist(), found_K.chosen_B.tolist(), tops, strict=True)
    return [TokenLogprob(token, logprob, list(zip(*top, strict=True))) for token, logprob, top in found]
