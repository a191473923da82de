"""Which drafts stand, and which token follows them: the output is distributed as without drafts.

A draft d of a position is drawn from the drafter's distribution q, the model's is p. Leviathan et al. (2023, arXiv
2211.17192) and Chen et al. (2023, arXiv 2302.01318):

    accept d with probability min(1, p(d) / q(d))
    else draw from the residual, max(p - q, 0) normalised, and drop all later drafts
    all accepted: draw from the p behind them, as without drafts

    P(x) = q(x) min(1, p(x)/q(x)) + (1 - sum_y min(p(y), q(y))) max(p(x) - q(x), 0) / (1 - sum_y min(p(y), q(y)))
         = min(p(x), q(x)) + max(p(x) - q(x), 0) = p(x)

Both are distributions after all settings of the row: bias, penalties, temperature, top-k, top-p, min-p. The penalties
of a position see the tokens that were accepted before it. Greedy rows have distributions of one token each, so a draft
is accepted if it is the token of the largest logit, and what follows a rejected one is that token.

Noise comes from the row's key and the position. The draft, the acceptance and the residual each have their own, and a
token drawn without a draft has that of `row_sampling.choose`: a row that drafts nothing gets the text that it gets
without drafting. A draft behind a rejected one is dropped unseen, so its noise may serve again in the next step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.inference.row_sampling import Choice, adjusted, choose, counted, kept
from deepseek_jax.inference.sampling import NO_TOKEN, Seen, argmax
from deepseek_jax.parallel.mesh import vary

DRAFT, ACCEPTANCE, RESIDUAL = 1, 2, 3  # folded into the key of a position


class Distribution(NamedTuple):
    """What the next token of each row is drawn from.

    Attributes:
        best_B: int32, the token of the largest logit.
        log_BV: FP32 log-probabilities, -inf of tokens that are ruled out; of rows that are not greedy. None where all
            are.
    """

    best_B: Array
    log_BV: Array | None


class Drafts(NamedTuple):
    """The drafts of each row.

    Attributes:
        ids_BK: int32.
        log_BKV: FP32, what they were drawn from (`Distribution`).
        num_B: int32, how many of a row's are meant; the others are never accepted.
    """

    ids_BK: Array
    log_BKV: Array | None
    num_B: Array


def distribution(choice: Choice | None, logits_BV: Array, rows_B: Array, seen: Seen | None) -> Distribution:
    """Return what `rows_B` draw from, by FP32 logits and their settings; without `choice` all rows are greedy."""
    if choice is None or seen is None:
        return Distribution(argmax(logits_BV).astype(jnp.int32), None)
    logits_BV = adjusted(choice, logits_BV, rows_B, seen)
    warm_B = rows_B & (choice.sampling.temperature > 0)
    log_BV = jax.lax.cond(
        warm_B.any(),
        lambda: jax.nn.log_softmax(kept(choice.sampling, logits_BV, warm_B)),
        lambda: vary(jnp.zeros(logits_BV.shape, jnp.float32), logits_BV),
    )
    return Distribution(argmax(logits_BV).astype(jnp.int32), log_BV)


def draw_drafts(choice: Choice | None, drafter: Distribution, positions_B: Array) -> Array:
    """Return a draft [B] int32 for each row's position."""
    if choice is None:
        return drafter.best_B
    keys_B, log_BV = _keys(choice, positions_B, DRAFT), drafter.log_BV
    assert log_BV is not None, "only greedy rows have none"
    warm_B = choice.sampling.temperature > 0
    drawn_B = jax.lax.cond(warm_B.any(), lambda: _categorical(keys_B, log_BV), lambda: drafter.best_B)
    return jnp.where(warm_B, drawn_B, drafter.best_B)


def accepts(
    choice: Choice | None, model: Distribution, drafter_log_BV: Array | None, ids_B: Array, u_B: Array
) -> Array:
    """Return which drafts are accepted, by uniform numbers [B] in [0, 1)."""
    is_best_B = ids_B == model.best_B
    if choice is None:
        return is_best_B
    assert model.log_BV is not None and drafter_log_BV is not None, "only greedy rows have none"
    p_B, q_B = (jnp.take_along_axis(log_BV, ids_B[:, None], axis=1)[:, 0] for log_BV in (model.log_BV, drafter_log_BV))
    return jnp.where(choice.sampling.temperature > 0, u_B < jnp.exp(p_B - q_B), is_best_B)


def residual(model_log_BV: Array, drafter_log_BV: Array) -> Array:
    """Return logits of what follows a rejected draft; the model's if rounding leaves none."""
    left_BV = jnp.maximum(jnp.exp(model_log_BV) - jnp.exp(drafter_log_BV), 0)
    return jnp.where(left_BV.sum(axis=-1, keepdims=True) > 0, jnp.log(left_BV), model_log_BV)


class Verified(NamedTuple):
    """What a step has made of the drafts.

    Attributes:
        tokens_BS: int32, the accepted drafts and one more; anything behind it.
        accepted_B: int32, how many drafts were accepted.
        seen: with these tokens.
    """

    tokens_BS: Array
    accepted_B: Array
    seen: Seen | None


def verify(
    choice: Choice | None,
    logits_BSV: Array,
    drafts: Drafts,
    length_B: Array,
    run_B: Array,
    seen: Seen | None,
    forced: float | None = None,
) -> Verified:
    """Accept a first part of each row's drafts, and choose the token behind it.

    Args:
        choice: settings of the rows; None: all are greedy.
        logits_BSV: FP32, of the model: those at 0 are of the token that the first draft stands for.
        drafts: K = S - 1 of each row.
        length_B: position of the last token chosen; that of the first draft is one more.
        run_B: rows that take part.
        seen: by the rows, their last chosen token included; None where all are greedy.
        forced: accept each draft with this probability, whatever it is: for benchmarks with random weights.
    """
    accepted_B, going_B = jnp.zeros_like(length_B), run_B
    for k in range(drafts.ids_BK.shape[1]):
        ids_B, positions_B = drafts.ids_BK[:, k], length_B + 1 + k
        going_B &= k < drafts.num_B
        if forced is None:
            model = distribution(choice, logits_BSV[:, k], going_B, seen)
            u_B = positions_B if choice is None else _uniform(_keys(choice, positions_B, ACCEPTANCE))
            drafter_log_BV = None if drafts.log_BKV is None else drafts.log_BKV[:, k]
            going_B &= accepts(choice, model, drafter_log_BV, ids_B, u_B)
            going_B &= jnp.isfinite(logits_BSV[:, k].max(axis=-1))
        else:
            going_B &= _uniform(_forced_keys(positions_B)) < forced
        accepted_B += going_B
        seen = counted(choice, seen, ids_B, going_B)
    ids_B = _behind(choice, logits_BSV, drafts, accepted_B, length_B, run_B, seen)
    place = jnp.arange(logits_BSV.shape[1])
    tokens_BS = jnp.where(place < accepted_B[:, None], jnp.pad(drafts.ids_BK, ((0, 0), (0, 1))), ids_B[:, None])
    return Verified(tokens_BS, accepted_B, counted(choice, seen, ids_B, run_B))


def _behind(
    choice: Choice | None,
    logits_BSV: Array,
    drafts: Drafts,
    accepted_B: Array,
    length_B: Array,
    run_B: Array,
    seen: Seen | None,
) -> Array:
    """Return the token behind the accepted drafts, `NO_TOKEN` where the logits are not numbers."""
    logits_BV = jnp.take_along_axis(logits_BSV, accepted_B[:, None, None], axis=1)[:, 0]
    if choice is None or seen is None:
        sound_B = jnp.isfinite(logits_BV.max(axis=-1))
        return jnp.where(sound_B, argmax(logits_BV), NO_TOKEN).astype(jnp.int32)
    positions_B, silent = length_B + 1 + accepted_B, choice._replace(wants_logprobs_B=run_B & False)
    ids_B = choose(silent, logits_BV, positions_B, run_B, seen).ids_B
    rejected_B = run_B & (accepted_B < drafts.num_B) & (choice.sampling.temperature > 0) & (ids_B != NO_TOKEN)
    log_BKV = drafts.log_BKV
    if log_BKV is None:
        return ids_B

    def drawn():
        model_log_BV = distribution(choice, logits_BV, rejected_B, seen).log_BV
        assert model_log_BV is not None, "only greedy rows have none"
        last_B = jnp.minimum(accepted_B, drafts.ids_BK.shape[1] - 1)
        drafter_log_BV = jnp.take_along_axis(log_BKV, last_B[:, None, None], axis=1)[:, 0]
        keys_B = _keys(choice, positions_B, RESIDUAL)
        return jnp.where(rejected_B, _categorical(keys_B, residual(model_log_BV, drafter_log_BV)), ids_B)

    return jax.lax.cond(rejected_B.any(), drawn, lambda: ids_B)


def _keys(choice: Choice, positions_B: Array, purpose: int) -> Array:
    keys_B = jax.random.wrap_key_data(choice.key_data_B2, impl="threefry2x32")
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, purpose)


def _forced_keys(positions_B: Array) -> Array:
    rows_B = jax.random.split(jax.random.key(0), len(positions_B))
    return jax.vmap(jax.random.fold_in)(rows_B, positions_B)


def _categorical(keys_B: Array, log_BV: Array) -> Array:
    return jax.vmap(jax.random.categorical)(keys_B, log_BV).astype(jnp.int32)


def _uniform(keys_B: Array) -> Array:
    return jax.vmap(jax.random.uniform)(keys_B)
