"""Which drafts stand, and which token follows them: a row gets the tokens that it gets without drafts.

The token of a position is that of the largest logit + noise (`sampling.gumbel`), after all settings of the row: bias,
penalties, mask, temperature, top-k, top-p, min-p. The noise g depends on the row's key, the position and the token's
id, and is 0 for greedy rows. The drafter adds the same noise to its own logits:

    t = argmax(log p + g)   the model's token       d = argmax(log q + g)   the draft
    d = t   it stands, and the next draft is verified
    d != t  t stands in its place, and all later drafts are dropped

So t is what the row gets without drafts, and drawn from p, whatever the drafter is. The usual rule (Leviathan et al.
2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) keeps the distribution, too: it accepts d with probability
min(1, p(d) / q(d)), and else draws from the residual. But then the text of a seed depends on what was drafted, that is
on how many jobs run beside it (`drafting_rows`). It accepts more: 1 - D with D the total variation of p and q, where
the same noise gives at least (1 - D) / (1 + D) (Daliri et al. 2024, arXiv 2408.07978). For random logits and D from 0.1
to 0.5 we found 3 to 8 points less of acceptance: with one draft a step gives 2 to 5% fewer tokens. It needs neither q
nor a residual.

The penalties of a position see the tokens that stand before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.inference.row_sampling import Choice, choose_ids, counted
from deepseek_jax.inference.sampling import NO_TOKEN, Seen, argmax


class Drafts(NamedTuple):
    """The drafts of each row.

    Attributes:
        ids_BK: int32.
        num_B: int32, how many of a row's are meant; the others never stand.
    """

    ids_BK: Array
    num_B: Array


class Verified(NamedTuple):
    """What a step has made of the drafts.

    Attributes:
        tokens_BS: int32, the drafts that stand and one token more; anything behind it.
        accepted_B: int32, how many drafts stand.
        seen: with these tokens.
    """

    tokens_BS: Array
    accepted_B: Array
    seen: Seen | None


def tokens_at(choice: Choice | None, logits_BV: Array, positions_B: Array, rows_B: Array, seen: Seen | None) -> Array:
    """Return the token int32 [B] of each of `rows_B` from FP32 logits; without `choice` all rows are greedy.

    `NO_TOKEN` stands where the logits are not numbers.
    """
    if choice is not None and seen is not None:
        return choose_ids(choice, logits_BV, positions_B, rows_B, seen)
    sound_B = jnp.isfinite(logits_BV.max(axis=-1))
    return jnp.where(sound_B, argmax(logits_BV), NO_TOKEN).astype(jnp.int32)


def verify(
    choice: Choice | None,
    logits_BSV: Array,
    drafts: Drafts,
    length_B: Array,
    run_B: Array,
    seen: Seen | None,
    behind_BW: Array | None = None,
    forced: float | None = None,
) -> Verified:
    """Let a first part of each row's drafts stand, and choose the token behind it.

    Args:
        choice: settings of the rows; None: all are greedy.
        logits_BSV: FP32, of the model: those at 0 are of the token that the first draft stands for.
        drafts: K = S - 1 of each row.
        length_B: position of the last token chosen; that of the first draft is one more.
        run_B: rows that take part.
        seen: by the rows, their last chosen token included; None where all are greedy.
        behind_BW: masks of the tokens behind the first draft, of masked rows, which have no more than one.
        forced: accept each draft with this probability, whatever it is: for benchmarks with random weights.
    """
    tokens, accepted_B, going_B = [], jnp.zeros_like(length_B), run_B
    for s in range(logits_BSV.shape[1]):
        if s == 1 and choice is not None and behind_BW is not None:
            choice = choice._replace(mask_BW=behind_BW)
        positions_B = length_B + 1 + s
        ids_B, stands_B = tokens_at(choice, logits_BSV[:, s], positions_B, going_B, seen), going_B & False
        if s < drafts.ids_BK.shape[1]:
            draft_B, stands_B = drafts.ids_BK[:, s], going_B & (s < drafts.num_B) & (ids_B != NO_TOKEN)
            stands_B &= ids_B == draft_B if forced is None else _uniform(positions_B) < forced
            ids_B = jnp.where(stands_B, draft_B, ids_B)
        tokens.append(ids_B)
        seen = counted(choice, seen, ids_B, going_B)
        going_B = stands_B
        accepted_B += stands_B
    return Verified(jnp.stack(tokens, axis=1), accepted_B, seen)


def _uniform(positions_B: Array) -> Array:
    rows_B = jax.random.split(jax.random.key(0), len(positions_B))
    return jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(rows_B, positions_B))
