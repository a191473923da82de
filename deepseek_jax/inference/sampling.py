"""From logits to the next token: penalties; then greedy, or temperature, min-p, top-k, top-p and one draw.

Each restriction returns logits with -inf for the tokens that it rules out, so restrictions compose. The draw is
`jax.random.categorical`: it adds Gumbel noise and takes the maximum. The distribution is that of the released script,
which divides probabilities by exponential noise.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Below this temperature the quotient leaves FP32 (1e-45 is even 0 in it), and a draw is the maximum anyway.
COLDEST = 1e-30
LARGEST_PENALTY = 1e4  # subtracted for each of many tokens, it stays far from FP32's end
NO_TOKEN = -1  # in place of an id where the logits are not numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Hashable, so a compiled decoding step contains only what its settings need.

    Attributes:
        temperature: divides the logits; 0 is greedy, and so is anything below `COLDEST`.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens of at least this share of the largest probability; 0 keeps all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that prompt or output have;
            1 leaves them (Keskar et al., 2019, as in Hugging Face transformers).
        frequency_penalty: subtracted from a token's logit for every time that the output has it (OpenAI's).
        presence_penalty: subtracted once if the output has it.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self):
        """Refuse values outside their range, NaN included."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be finite and at least 0; 0 decodes greedily")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be at least 0; 0 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p} is a probability in (0, 1]; 1 keeps every token")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p = {self.min_p} is a share in [0, 1]; 0 keeps every token")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be finite and more than 0; 1 leaves the logits"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not -LARGEST_PENALTY <= value <= LARGEST_PENALTY:
                raise ValueError(f"{name} = {value} must be at most {LARGEST_PENALTY:g} away from 0, which leaves them")

    @property
    def penalizes(self) -> bool:
        """Whether a choice depends on the tokens before it."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Seen(NamedTuple):
    """Which tokens each sequence has: what penalties read."""

    prompt_BV: Array  # bool: the prompt has it
    count_BV: Array  # int32: how often the output has it

    @classmethod
    def of_prompts(cls, tokens_BS: Array, lengths_B: Array, vocab_size: int) -> "Seen":
        """Return what prompts have, of which `lengths_B` tokens each count."""
        batch_size, length = tokens_BS.shape
        nowhere_BS = jnp.where(jnp.arange(length) < lengths_B[:, None], tokens_BS, vocab_size)
        empty_BV = jnp.zeros_like(lengths_B, jnp.int32)[:, None] + jnp.zeros((batch_size, vocab_size), jnp.int32)
        count_BV = empty_BV.at[jnp.arange(batch_size)[:, None], nowhere_BS].add(1, mode="drop")
        return cls(count_BV > 0, empty_BV)

    def add(self, tokens_B: Array) -> "Seen":
        """Return it with one more token of each output."""
        return self._replace(count_BV=self.count_BV.at[jnp.arange(len(tokens_B)), tokens_B].add(1, mode="drop"))


def sample(sampling: Sampling, logits_BV: Array, keys_B: Array, seen: Seen | None = None) -> Array:
    """Return one token id [B] int32 per row of FP32 logits; `NO_TOKEN` where the largest is NaN or infinite.

    Each row draws with its own key, so its text does not depend on its neighbours. Penalties need `seen`.
    """
    sound_B = jnp.isfinite(logits_BV.max(axis=-1))  # a maximum is NaN if anything is
    if sampling.penalizes:
        assert seen is not None, "penalties need what the sequences have"
        logits_BV = penalized(sampling, logits_BV, seen)
    if sampling.temperature < COLDEST:
        chosen_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = keep_min_p(logits_BV / sampling.temperature, sampling.min_p)
        logits_BV = keep_top_p(keep_top_k(logits_BV, sampling.top_k), sampling.top_p)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    return jnp.where(sound_B, chosen_B, NO_TOKEN).astype(jnp.int32)


def penalized(sampling: Sampling, logits_BV: Array, seen: Seen) -> Array:
    """Return logits after the penalties, repetition first."""
    factor = sampling.repetition_penalty
    repeated_BV = seen.prompt_BV | (seen.count_BV > 0)
    scaled_BV = jnp.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
    logits_BV = jnp.where(repeated_BV, scaled_BV, logits_BV)
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    return logits_BV - frequency * seen.count_BV - presence * (seen.count_BV > 0)


def keep_min_p(logits_BV: Array, min_p: float) -> Array:
    """Keep tokens whose probability is at least `min_p` of the row's largest; 0 keeps all."""
    if min_p == 0.0:
        return logits_BV
    return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + math.log(min_p), logits_BV, -jnp.inf)


def keep_top_k(logits_BV: Array, top_k: int) -> Array:
    """Keep exactly `top_k` tokens per row, the lowest ids of equal logits; 0 keeps all."""
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    values_BK, ids_BK = jax.lax.top_k(logits_BV, top_k)
    return _scatter(values_BK, ids_BK, logits_BV)


def keep_top_p(logits_BV: Array, top_p: float) -> Array:
    """Keep per row the fewest most probable tokens that sum to a probability of `top_p` or more, at least one."""
    if top_p == 1.0:
        return logits_BV
    ids_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, ids_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    return _scatter(jnp.where(before_BV < top_p, sorted_BV, -jnp.inf), ids_BV, logits_BV)


def _scatter(values_BK: Array, ids_BK: Array, like_BV: Array) -> Array:
    """Put `values_BK` at `ids_BK` into rows of -inf."""
    return jnp.put_along_axis(jnp.full_like(like_BV, -jnp.inf), ids_BK, values_BK, axis=-1, inplace=False)
