"""Choosing the next token where every row has settings of its own: one program for all jobs.

What `inference.sampling` does with settings that a program is made for, this does with arrays. A row gets the token
that `sampling.choose` gives for its settings, its key and its position, up to rounding. A program is made for a kind of
rows (`KINDS`): the host knows the settings of all, and takes the least that they need. What sorts the vocabulary is in
the last kind alone, behind conditions of the device: where a program branches, the host of a GPU may have to wait.

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
    Kept,
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

# How the rows of a program choose: the largest logit and nothing else; or a draw by temperature and min-p; or with
# bias, penalties and masks, too; or in the order of the logits, with log-probabilities of the most probable: anything.
KINDS = GREEDY, DRAWN, BY_ID, ANY = "greedy", "drawn", "by id", "any"
WORD = 32  # tokens in a word of a mask
EVERYTHING = 2.0  # of top-p: a probability that no rounding reaches


def reads_seen(kind: str) -> bool:
    """Whether rows of this kind may have penalties."""
    return kind in (BY_ID, ANY)


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
    wants_B: Array  # int32: 1 for log-probabilities, 2 also for what the token was drawn among


class Cut(NamedTuple):
    """Which of a row's logits over the temperature are candidates: those above `least`, and up to `last` at it."""

    least_B: Array
    last_B: Array  # int32, an id


def choose(
    kind: str, choice: Choice, logits_BV: Array, positions_B: Array, active_B: Array, seen: Seen | None
) -> Chosen:
    """Return the token at each row's position from FP32 logits, and its log-probabilities.

    Rows that are not active get anything. A row gets `NO_TOKEN` where its logits are not numbers, and where its mask
    rules every token out.

    Args:
        kind: of `KINDS`: what the settings of all rows allow.
        choice: settings of the rows.
        logits_BV: of the model.
        positions_B: of the tokens.
        active_B: rows that take part.
        seen: what the rows have; None where `reads_seen(kind)` is False.

    Returns:
        the tokens. With `GREEDY` there are no log-probabilities; with `ANY` those of rows that want none are 0 where no
        row wants any; with the others there are only those of the tokens, and none of the most probable ones.
    """
    noise_BV = None if kind == GREEDY else noise_at(choice, positions_B, logits_BV.shape[-1])
    ids_B, cut = cut_ids(kind, choice, logits_BV, noise_BV, active_B, seen)
    if kind == GREEDY:
        return Chosen(ids_B, None)
    wants_B = jnp.where(active_B, choice.wants_B, 0)
    return Chosen(ids_B, logprobs_of(kind, choice.sampling, logits_BV, ids_B, cut, wants_B))


def logprobs_of(
    kind: str, sampling: RowSampling, logits_BV: Array, ids_B: Array, cut: Cut | None, wants_B: Array
) -> Logprobs:
    """Return the log-probabilities of tokens as `choose` does; the most probable ones, and `Kept`, if a row wants them.

    `Kept` is for rows without bias, penalties and masks.
    """
    shape = *ids_B.shape, MOST_LOGPROBS
    ids_BK, tops_BK = (vary(jnp.zeros(shape, dtype), ids_B) for dtype in (jnp.int32, jnp.float32))
    if kind == ANY:
        none = Logprobs(vary(jnp.zeros(ids_B.shape, jnp.float32), ids_B), ids_BK, tops_BK)
        wanted = (wants_B > 0).any()
        found = jax.lax.cond(wanted, lambda: log_probabilities(logits_BV, ids_B, MOST_LOGPROBS), lambda: none)
        assert cut is not None
        empty = Kept(
            *(
                vary(jnp.zeros(x.shape, x.dtype), ids_B)
                for x in jax.eval_shape(kept_of, sampling, logits_BV, ids_B, cut)
            )
        )
        kept = jax.lax.cond((wants_B > 1).any(), lambda: kept_of(sampling, logits_BV, ids_B, cut), lambda: empty)
        return found._replace(kept=kept)
    chosen_B1 = jnp.take_along_axis(logits_BV, jnp.maximum(ids_B, 0)[:, None], axis=-1)
    return Logprobs(chosen_B1[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1), ids_BK, tops_BK)


def kept_of(sampling: RowSampling, logits_BV: Array, ids_B: Array, cut: Cut) -> Kept:
    """Return what tokens were drawn among, of logits that nothing else was done to."""
    tempered_BV, vocab_size = _tempered(sampling, logits_BV), logits_BV.shape[-1]
    at_BV = (tempered_BV == cut.least_B[:, None]) & (jnp.arange(vocab_size) <= cut.last_B[:, None])
    kept_BV = ((tempered_BV > cut.least_B[:, None]) | at_BV) & (tempered_BV > -jnp.inf)
    bits_BWX = jnp.pad(kept_BV, ((0, 0), (0, -vocab_size % WORD))).reshape(len(kept_BV), -1, WORD)
    words_BW = (bits_BWX.astype(jnp.int32) << jnp.arange(WORD)).sum(-1, dtype=jnp.int32)
    chosen_B1 = jnp.take_along_axis(tempered_BV, jnp.maximum(ids_B, 0)[:, None], axis=-1)
    return Kept(words_BW, chosen_B1[:, 0] - jax.nn.logsumexp(tempered_BV, axis=-1, where=kept_BV))


def counted(choice: Choice, seen: Seen | None, ids_B: Array, chosen_B: Array) -> Seen | None:
    """Return what the rows have seen with their new tokens: those of `chosen_B` whose settings have penalties."""
    if seen is None:
        return seen
    counted_B = chosen_B & choice.sampling.penalizes_B()
    beyond = seen.count_BV.shape[1]  # where a token that is none, or is not counted, goes
    ids_B = jnp.where(counted_B & (ids_B >= 0), ids_B, beyond)
    return seen.add(ids_B)


def allowed(mask_BW: Array, vocab_size: int) -> Array:
    """Return which tokens a mask lets come, bool [B, V]."""
    bits_BWX = mask_BW[..., None] >> jnp.arange(WORD) & 1
    return bits_BWX.reshape(len(mask_BW), -1)[:, :vocab_size] > 0


def noise_at(choice: Choice, positions: Array, vocab_size: int) -> Array:
    """Return the noise [.., V] of each row's draw at its positions [B] or [B, S]."""
    keys_B = jax.random.wrap_key_data(choice.key_data_B2, impl="threefry2x32")
    fold = jax.random.fold_in if positions.ndim == 1 else jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold)(keys_B, positions)
    return gumbel(keys.reshape(-1), vocab_size).reshape(*positions.shape, vocab_size)


def choose_ids(
    kind: str, choice: Choice, logits_BV: Array, noise_BV: Array | None, active_B: Array, seen: Seen | None
) -> Array:
    """Return the tokens of `choose` alone; `noise_BV` is that of `noise_at`, None with `GREEDY`."""
    return cut_ids(kind, choice, logits_BV, noise_BV, active_B, seen)[0]


def cut_ids(
    kind: str, choice: Choice, logits_BV: Array, noise_BV: Array | None, active_B: Array, seen: Seen | None
) -> tuple[Array, Cut | None]:
    """Return what `choose_ids` does, and with `ANY` which tokens they were drawn among."""
    sound_B = is_sound(logits_BV)
    if reads_seen(kind):
        assert seen is not None, "penalties need what the rows have"
        logits_BV = adjusted(choice, logits_BV, seen)
    return pick(kind, choice.sampling, logits_BV, noise_BV, active_B, sound_B)


def is_sound(logits_BV: Array) -> Array:
    """Return where the largest logit is a number: a maximum is NaN if anything is."""
    return jnp.isfinite(logits_BV.max(axis=-1))


def adjusted(choice: Choice, logits_BV: Array, seen: Seen) -> Array:
    """Return logits with the bias and the penalties of each row, and -inf where its mask rules a token out."""
    columns = jax.tree.map(lambda x: x[:, None], choice.sampling)
    logits_BV = penalized(columns, biased(logits_BV, choice.bias), seen)
    allowed_BV = allowed(choice.mask_BW, logits_BV.shape[-1]) | ~choice.masked_B[:, None]
    return jnp.where(allowed_BV, logits_BV, -jnp.inf)


def pick(
    kind: str, sampling: RowSampling, logits_BV: Array, noise_BV: Array | None, active_B: Array, sound_B: Array
) -> tuple[Array, Cut | None]:
    """Return the token of each row from logits with all that is added to them; `NO_TOKEN` where they are not sound.

    With `ANY` also which tokens it was drawn among.
    """
    sound_B &= logits_BV.max(axis=-1) > -jnp.inf
    values_BV, tempered_BV, warm_B = logits_BV, logits_BV, sampling.temperature > 0
    if kind != GREEDY:
        assert noise_BV is not None, "a draw needs noise"
        tempered_BV = _tempered(sampling, logits_BV)
        values_BV = jnp.where(warm_B[:, None], tempered_BV + noise_BV, logits_BV)
    ids_B, cut = argmax(values_BV).astype(jnp.int32), None
    if kind == ANY:
        cut_B, ranked_B = _ranked_rows(sampling, logits_BV.shape[-1])
        ranked_B &= warm_B & active_B
        assert noise_BV is not None
        finish = functools.partial(_drawn_and_cut, noise_BV)
        nobody: Any = ids_B, Cut(jnp.full(ids_B.shape, -jnp.inf), jnp.full(ids_B.shape, -1, jnp.int32))
        whole: Any = vary(nobody, ids_B)

        def ranked():
            found = _among(sampling, tempered_BV, ranked_B, cut_B, finish)
            return jax.tree.map(lambda new, old: jnp.where(ranked_B, new, old), found, whole)

        ids_B, cut = jax.lax.cond(ranked_B.any(), ranked, lambda: whole)
    return jnp.where(sound_B, ids_B, NO_TOKEN), cut


def _tempered(sampling: RowSampling, logits_BV: Array) -> Array:
    """Return logits over the temperature, where it is above 0, with -inf for those that min-p drops."""
    tempered_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1)[:, None]
    return keep_near(tempered_BV, sampling.log_min_p[:, None])


def _drawn_and_cut(noise_BV: Array, values_BK: Array, ids_BK: Array) -> tuple[Array, Cut]:
    """Return the token drawn among candidates in falling order, of which -inf are none, and where they end."""
    num_B = (values_BK > -jnp.inf).sum(axis=-1, dtype=jnp.int32)
    ends = (
        jnp.take_along_axis(x_BK, jnp.maximum(num_B - 1, 0)[:, None], axis=-1)[:, 0] for x_BK in (values_BK, ids_BK)
    )
    least_B, last_B = ends
    return drawn(values_BK, ids_BK, noise_BV), Cut(least_B, last_B.astype(jnp.int32))


def _ranked_rows(sampling: RowSampling, vocab_size: int) -> tuple[Array, Array]:
    """Return the rows that top-k cuts, and those whose candidates are in the order of their logits."""
    cut_B = (sampling.top_k > 0) & (sampling.top_k < vocab_size)
    return cut_B, cut_B | (sampling.top_p < 1)


def _among(
    sampling: RowSampling, logits_BV: Array, rows_B: Array, cut_B: Array, finish: Callable[[Array, Array], Any]
) -> Any:
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
