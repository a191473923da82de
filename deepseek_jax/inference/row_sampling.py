"""Choosing the next token where every row has settings of its own: one program for all jobs.

What `inference.sampling` does with settings that a program is made for, this does with arrays. A row gets the token
that `sampling.choose` gives for its settings, its key and its position, up to rounding. Each part of the work (bias,
penalties, masks, draws, draws in the order of the logits, log-probabilities) is behind a condition of the device: it is
left out while no row of the step needs it. So greedy rows alone sort nothing.

The noise of a draw belongs to a token's id, whatever else is drawn from: rows whose candidates are all tokens sort
nothing, and where top-k or top-p keep the largest of logit + noise, it is the same token.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepseek_jax.inference import sampling as fixed
from deepseek_jax.inference.sampling import (
    COLDEST,
    MOST_LOGPROBS,
    NO_TOKEN,
    Bias,
    Chosen,
    Logprobs,
    Sampling,
    Seen,
    argmax,
    biased,
    drawn,
    gumbel,
    keep_near,
    keep_top_p,
    log_probabilities,
    penalized,
)
from deepseek_jax.parallel.mesh import vary

# How the rows of a program choose: the largest logit and nothing else; without an order of the logits; anything.
KINDS = GREEDY, BY_ID, ANY = "greedy", "by id", "any"
WORD = 32  # tokens in a word of a mask
EVERYTHING = 2.0  # of top-p: a probability that no rounding reaches


class RowSampling(NamedTuple):
    """The settings of `sampling.Sampling`, for each row."""

    temperature: Array  # FP32 [B]; 0 is greedy
    top_k: Array  # int32
    top_p: Array  # FP32; EVERYTHING keeps every token
    log_min_p: Array  # FP32, a natural logarithm; -inf keeps every token
    repetition_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array

    @classmethod
    def numbers(cls, sampling: Sampling) -> "RowSampling":
        """Return the numbers of one row."""
        numbers: Any = (
            np.float32(sampling.temperature if sampling.temperature >= COLDEST else 0),
            np.int32(min(sampling.top_k, 2**31 - 1)),
            np.float32(sampling.top_p if sampling.top_p < 1 else EVERYTHING),
            np.float32(math.log(sampling.min_p) if sampling.min_p else -math.inf),
            np.float32(sampling.repetition_penalty),
            np.float32(sampling.frequency_penalty),
            np.float32(sampling.presence_penalty),
        )
        return cls(*numbers)

    def penalizes_B(self) -> Array:
        """Return the rows whose choice depends on the tokens before it."""
        return (self.repetition_penalty != 1) | (self.frequency_penalty != 0) | (self.presence_penalty != 0)


class Choice(NamedTuple):
    """All that a row's choices depend on, beside logits, position and what it has seen."""

    sampling: RowSampling
    key_data_B2: Array  # uint32, of a threefry key
    bias: Bias
    mask_BW: Array  # int32: bit i of word w is 1 if token 32 w + i may come
    masked_B: Array  # bool: the mask counts
    wants_logprobs_B: Array


def choose(choice: Choice, logits_BV: Array, positions_B: Array, active_B: Array, seen: Seen) -> Chosen:
    """Return the token at each row's position from FP32 logits, and its log-probabilities, 0 for rows without them.

    Rows that are not active get anything. A row gets `NO_TOKEN` where its logits are not numbers, and where its mask
    rules every token out.
    """
    ids_B = choose_ids(choice, logits_BV, positions_B, active_B, seen)
    wants_B = active_B & choice.wants_logprobs_B
    shapes = jax.eval_shape(lambda: log_probabilities(logits_BV, ids_B, MOST_LOGPROBS))
    logprobs = jax.lax.cond(
        wants_B.any(),
        lambda: log_probabilities(logits_BV, ids_B, MOST_LOGPROBS),
        lambda: jax.tree.map(lambda x: vary(jnp.zeros(x.shape, x.dtype), ids_B), Logprobs(*shapes)),
    )
    return Chosen(ids_B, logprobs)


def choose_by_id(choice: Choice, logits_BV: Array, positions_B: Array, seen: Seen) -> Chosen:
    """Do as `choose`, where no row has top-k or top-p, or wants log-probabilities of more than its token.

    Nothing is sorted, and nothing is under a condition: the host of a GPU may have to wait where a program branches.
    """
    keys_B = _keys(choice, positions_B)
    sound_B, model_BV, warm_B = jnp.isfinite(logits_BV.max(axis=-1)), logits_BV, choice.sampling.temperature > 0
    logits_BV = _adjusted(choice, logits_BV, seen, lambda _, change, x: change(x))
    sound_B &= logits_BV.max(axis=-1) > -jnp.inf
    drawn_B = argmax(_tempered(choice.sampling, logits_BV, warm_B) + gumbel(keys_B, logits_BV.shape[-1]))
    ids_B = jnp.where(warm_B, drawn_B, argmax(logits_BV))
    ids_B = jnp.where(sound_B, ids_B, NO_TOKEN).astype(jnp.int32)
    chosen_B1 = jnp.take_along_axis(model_BV, jnp.maximum(ids_B, 0)[:, None], axis=-1)
    shape = len(ids_B), MOST_LOGPROBS
    tops = (vary(jnp.zeros(shape, dtype), ids_B) for dtype in (jnp.int32, jnp.float32))
    return Chosen(ids_B, Logprobs(chosen_B1[:, 0] - jax.nn.logsumexp(model_BV, axis=-1), *tops))


def counted(choice: Choice | None, seen: Seen | None, ids_B: Array, chosen_B: Array) -> Seen | None:
    """Return what the rows have seen with their new tokens: those of `chosen_B` whose settings have penalties."""
    if choice is None or seen is None:
        return seen
    counted_B = chosen_B & choice.sampling.penalizes_B()
    beyond = seen.count_BV.shape[1]  # where a token that is none, or is not counted, goes
    ids_B = jnp.where(counted_B & (ids_B >= 0), ids_B, beyond)
    return seen.add(ids_B)


def allowed(mask_BW: Array, vocab_size: int) -> Array:
    """Return which tokens a mask lets come, bool [B, V]."""
    bits_BWX = mask_BW[..., None] >> jnp.arange(WORD) & 1
    return bits_BWX.reshape(len(mask_BW), -1)[:, :vocab_size] > 0


def choose_ids(choice: Choice, logits_BV: Array, positions_B: Array, active_B: Array, seen: Seen) -> Array:
    """Return the tokens of `choose` alone."""
    sampling, keys_B = choice.sampling, _keys(choice, positions_B)
    sound_B = jnp.isfinite(logits_BV.max(axis=-1))  # a maximum is NaN if anything is

    def where_any(rows_B, change, logits_BV):
        return jax.lax.cond((active_B & rows_B).any(), change, lambda x: x, logits_BV)

    logits_BV = _adjusted(choice, logits_BV, seen, where_any)
    best_B = argmax(logits_BV).astype(jnp.int32)
    sound_B &= logits_BV.max(axis=-1) > -jnp.inf
    warm_B = sampling.temperature > 0
    drawn_B = jax.lax.cond(
        (active_B & warm_B).any(), lambda: _draw(sampling, logits_BV, keys_B, active_B & warm_B), lambda: best_B
    )
    return jnp.where(sound_B, jnp.where(warm_B, drawn_B, best_B), NO_TOKEN)


def _keys(choice: Choice, positions_B: Array) -> Array:
    keys_B = jax.random.wrap_key_data(choice.key_data_B2, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, positions_B)


def _adjusted(choice: Choice, logits_BV: Array, seen: Seen, where_any: Callable) -> Array:
    """Return logits with the bias and the penalties of each row, and -inf where its mask rules a token out.

    `where_any(rows_B, change, logits_BV)` changes logits if there are such rows.
    """
    sampling, bias = choice.sampling, choice.bias
    has_bias_B = (bias.ids_BJ[:, 0] < logits_BV.shape[-1]) if bias.ids_BJ.shape[1] else choice.masked_B & False
    logits_BV = where_any(has_bias_B, lambda x: biased(x, bias), logits_BV)
    columns = jax.tree.map(lambda x: x[:, None], sampling)
    logits_BV = where_any(sampling.penalizes_B(), lambda x: penalized(columns, x, seen), logits_BV)

    def masked(x):
        allowed_BV = allowed(choice.mask_BW, x.shape[-1]) | ~choice.masked_B[:, None]
        return jnp.where(allowed_BV, x, -jnp.inf)

    return where_any(choice.masked_B, masked, logits_BV)


def _draw(sampling: RowSampling, logits_BV: Array, keys_B: Array, warm_B: Array) -> Array:
    """Return a token drawn for each warm row."""
    logits_BV, noise_BV = _tempered(sampling, logits_BV, warm_B), gumbel(keys_B, logits_BV.shape[-1])
    cut_B, ranked_B = _ranked_rows(sampling, logits_BV.shape[-1])
    by_id_B = argmax(logits_BV + noise_BV).astype(jnp.int32)

    def ranked():
        finish = functools.partial(drawn, noise_BV=noise_BV)
        return jnp.where(ranked_B, _among(sampling, logits_BV, warm_B & ranked_B, cut_B, finish), by_id_B)

    return jax.lax.cond((warm_B & ranked_B).any(), ranked, lambda: by_id_B)


def _tempered(sampling: RowSampling, logits_BV: Array, warm_B: Array) -> Array:
    logits_BV = logits_BV / jnp.where(warm_B, sampling.temperature, 1)[:, None]
    return keep_near(logits_BV, sampling.log_min_p[:, None])


def _ranked_rows(sampling: RowSampling, vocab_size: int) -> tuple[Array, Array]:
    """Return the rows that top-k cuts, and those whose candidates are in the order of their logits."""
    cut_B = (sampling.top_k > 0) & (sampling.top_k < vocab_size)
    return cut_B, cut_B | (sampling.top_p < 1)


def _among(
    sampling: RowSampling, logits_BV: Array, rows_B: Array, cut_B: Array, finish: Callable[[Array, Array], Array]
) -> Array:
    """Return what `finish` makes of the candidates that top-k and then top-p keep, logits in order and their ids."""
    vocab_size, few = logits_BV.shape[-1], min(fixed.CANDIDATES, logits_BV.shape[-1])
    most_B = jnp.where(cut_B, sampling.top_k, vocab_size)
    log_sum_B = jax.nn.logsumexp(logits_BV, axis=-1)

    def among(values_BK, ids_BK):
        values_BK = jnp.where(jnp.arange(values_BK.shape[1]) < most_B[:, None], values_BK, -jnp.inf)
        left_B = jnp.where(cut_B, jax.nn.logsumexp(values_BK, axis=-1), log_sum_B)
        return finish(keep_top_p(values_BK, sampling.top_p[:, None], left_B[:, None]), ids_BK)

    values_BK, ids_BK = jax.lax.top_k(logits_BV, few)
    if few == vocab_size:
        return among(values_BK, ids_BK)
    reached_B = jnp.exp(values_BK - log_sum_B[:, None]).sum(axis=-1) >= sampling.top_p
    enough_B = jnp.where(cut_B, most_B <= few, reached_B) | ~rows_B
    return jax.lax.cond(
        enough_B.all(), lambda: among(values_BK, ids_BK), lambda: among(*jax.lax.top_k(logits_BV, vocab_size))
    )
