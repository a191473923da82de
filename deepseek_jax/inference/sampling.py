"""From logits to the next token: bias, penalties; then greedy, or temperature, min-p, top-k, top-p and one draw.

A draw is among candidates: tokens in the order of their logits, with -inf for those that are ruled out. Top-k has k
candidates. Top-p has the `CANDIDATES` most probable, and all tokens only where these do not reach p. So a step hardly
ever sorts the vocabulary, and a greedy one never. Without top-k and top-p all tokens are candidates, by id.

A draw adds Gumbel noise to the logits and takes the maximum. The distribution is that of the released script, which
divides probabilities by exponential noise. A token's noise depends on the row's key, the position and the token's id,
not on its rank or on the other candidates: a row draws the same whatever its neighbours need, and a drafter that has
nearly the same logits draws the same token mostly (`acceptance`).
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

# Below this temperature the quotient leaves FP32 (1e-45 is even 0 in it), and a draw is the maximum anyway.
COLDEST = 1e-30
LARGEST_PENALTY = 1e4  # subtracted for each of many tokens, it stays far from FP32's end
NO_TOKEN = -1  # in place of an id where the logits are not numbers
CANDIDATES = 1024  # of top-p, while they are enough
MOST_LOGPROBS = 20  # OpenAI's


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
        num_logprobs: log-probabilities come with each token: its own, and those of so many most probable ones; None
            computes none.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    num_logprobs: int | None = None

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
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MOST_LOGPROBS:
            raise ValueError(f"num_logprobs = {self.num_logprobs} must be from 0 to {MOST_LOGPROBS}")

    @property
    def penalizes(self) -> bool:
        """Whether a choice depends on the tokens before it."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class Penalties(Protocol):
    """The penalties of `Sampling`: numbers, or arrays [B, 1] of a row each."""

    @property
    def repetition_penalty(self) -> Any: ...  # noqa: D102

    @property
    def frequency_penalty(self) -> Any: ...  # noqa: D102

    @property
    def presence_penalty(self) -> Any: ...  # noqa: D102


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


class Bias(NamedTuple):
    """What is added to logits: of each row, J pairs of an id and a number. An id beyond the vocabulary adds nothing."""

    ids_BJ: Array  # int32
    values_BJ: Array  # FP32


class Rows(NamedTuple):
    """What the requests in the rows of a batch have of their own."""

    keys_B: Array  # of the draws
    bias: Bias | None = None


class Kept(NamedTuple):
    """What a token was drawn among: those that min-p, top-k and top-p keep of the logits over the temperature."""

    words_BW: Array  # int32: bit i of word w is 1 if token 32 w + i was kept
    drawn_B: Array  # natural logarithm of the token's probability among them, FP32


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before bias, penalties and temperature, in FP32."""

    chosen_B: Array
    top_ids_BK: Array  # int32, the most probable first
    top_BK: Array
    kept: "Kept | None" = None  # where a row asks for it


class Chosen(NamedTuple):
    """The next token of each row, or, with a dim more, the next tokens."""

    ids_B: Array  # int32
    logprobs: Logprobs | None  # where `num_logprobs` asks for them

    @classmethod
    def filled(cls, sampling: Sampling, shape: tuple[int, ...], token: int | Array) -> "Chosen":
        """Return arrays for tokens of `shape`, filled with `token`."""
        count, logprobs = sampling.num_logprobs, None
        if count is not None:
            tops = jnp.zeros((*shape, count), jnp.int32), jnp.zeros((*shape, count), jnp.float32)
            logprobs = Logprobs(jnp.zeros(shape, jnp.float32), *tops)
        return cls(jnp.full(shape, token, jnp.int32), logprobs)


def choose(sampling: Sampling, logits_BV: Array, rows: Rows, positions_B: Array, seen: Seen | None = None) -> Chosen:
    """Return the token at each row's position from FP32 logits; `seen` is what penalties need."""
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, positions_B)
    ids_B = sample(sampling, logits_BV, keys_B, rows.bias, seen)
    if sampling.num_logprobs is None:
        return Chosen(ids_B, None)
    return Chosen(ids_B, log_probabilities(logits_BV, ids_B, sampling.num_logprobs))


def log_probabilities(logits_BV: Array, ids_B: Array, num_top: int) -> Logprobs:
    """Return the log-probabilities of the tokens `ids_B`, and of the `num_top` most probable ones."""
    log_sum_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, jnp.maximum(ids_B, 0)[:, None], axis=-1)
    top_BK, top_ids_BK = jax.lax.top_k(logits_BV, min(num_top, logits_BV.shape[-1]))
    missing = [(0, 0), (0, num_top - top_BK.shape[-1])]  # a vocabulary of fewer tokens
    top_BK = jnp.pad(top_BK - log_sum_B1, missing, constant_values=-jnp.inf)
    return Logprobs((chosen_B1 - log_sum_B1)[:, 0], jnp.pad(top_ids_BK, missing), top_BK)


def sample(
    sampling: Sampling, logits_BV: Array, keys_B: Array, bias: Bias | None = None, seen: Seen | None = None
) -> Array:
    """Return one token id [B] int32 per row of FP32 logits; `NO_TOKEN` where the largest is NaN or infinite.

    Each row draws with its own key, so its text does not depend on its neighbours. Penalties need `seen`.
    """
    sound_B = jnp.isfinite(logits_BV.max(axis=-1))  # a maximum is NaN if anything is
    if bias is not None:
        logits_BV = biased(logits_BV, bias)
    if sampling.penalizes:
        assert seen is not None, "penalties need what the sequences have"
        logits_BV = penalized(sampling, logits_BV, seen)
    if sampling.temperature < COLDEST:
        chosen_B = argmax(logits_BV)
    else:
        chosen_B = draw(sampling, keep_min_p(logits_BV / sampling.temperature, sampling.min_p), keys_B)
    return jnp.where(sound_B, chosen_B, NO_TOKEN).astype(jnp.int32)


def biased(logits_BV: Array, bias: Bias) -> Array:
    """Return logits with what the bias of each row adds."""
    rows = jnp.arange(len(logits_BV))[:, None]
    return logits_BV.at[rows, bias.ids_BJ].add(bias.values_BJ, mode="drop")


def argmax(logits_BV: Array) -> Array:
    """Return the first of the largest of each row: two plain reductions, which XLA vectorises on CPUs; argmax it does
    not. Where a logit is NaN there is none, and `V` stands for it.
    """
    vocab_size = logits_BV.shape[-1]
    is_largest_BV = logits_BV == logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(is_largest_BV, jnp.arange(vocab_size), vocab_size).min(axis=-1)


def draw(sampling: Sampling, logits_BV: Array, keys_B: Array) -> Array:
    """Return one token id per row, drawn among those that top-k and then top-p keep."""
    vocab_size, top_k, top_p = logits_BV.shape[-1], sampling.top_k, sampling.top_p
    noise_BV = gumbel(keys_B, vocab_size)

    def among(values_BK: Array, ids_BK: Array, log_sum_B1: Array | None = None) -> Array:
        if top_p < 1.0:
            values_BK = keep_top_p(values_BK, top_p, log_sum_B1)
        return drawn(values_BK, ids_BK, noise_BV)

    if 0 < top_k < vocab_size:
        return among(*jax.lax.top_k(logits_BV, top_k))
    if top_p == 1.0:
        return argmax(logits_BV + noise_BV)
    if vocab_size <= CANDIDATES:
        return among(*jax.lax.top_k(logits_BV, vocab_size))
    log_sum_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    few = jax.lax.top_k(logits_BV, CANDIDATES)
    reached_B = jnp.exp(few[0] - log_sum_B1).sum(axis=-1) >= top_p
    return jax.lax.cond(
        reached_B.all(),
        lambda: among(*few, log_sum_B1),
        lambda: among(*jax.lax.top_k(logits_BV, vocab_size), log_sum_B1),
    )


def gumbel(keys_B: Array, vocab_size: int) -> Array:
    """Return the noise [B, V] of each row's draw: the token of the largest logit + noise is drawn from the softmax."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))(keys_B)


def drawn(values_BK: Array, ids_BK: Array, noise_BV: Array) -> Array:
    """Return the token drawn among candidates, logits and their ids."""
    best_B = jnp.argmax(values_BK + jnp.take_along_axis(noise_BV, ids_BK, axis=-1), axis=-1)
    return jnp.take_along_axis(ids_BK, best_B[:, None], axis=-1)[:, 0]


def penalized(sampling: Penalties, logits_BV: Array, seen: Seen) -> Array:
    """Return logits after the penalties, repetition first. Each is a number, or [B, 1] of a row each."""
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
    return keep_near(logits_BV, math.log(min_p))


def keep_near(logits_BV: Array, log_share: float | Array) -> Array:
    """Keep logits that are at most -`log_share`, a number or [B, 1], below the row's largest."""
    return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + log_share, logits_BV, -jnp.inf)


def keep_top_p(values_BK: Array, top_p: float | Array, log_sum_B1: Array | None = None) -> Array:
    """Keep of logits in falling order the fewest whose probabilities sum to `top_p` or more, at least one.

    `top_p` is a number, or [B, 1] of a row each; `log_sum_B1` is the logarithm under the softmax where these are not
    all logits.
    """
    if log_sum_B1 is None:
        log_sum_B1 = jax.nn.logsumexp(values_BK, axis=-1, keepdims=True)
    probabilities_BK = jnp.exp(values_BK - log_sum_B1)
    before_BK = jnp.cumsum(probabilities_BK, axis=-1) - probabilities_BK
    return jnp.where(before_BK < top_p, values_BK, -jnp.inf)
