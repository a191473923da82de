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

The penalties of a position see the tokens that stand before it: where it counts, these are drafts. So all positions
are chosen at once, and their noise is made once for drafter and model.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deepseek_jax.inference.row_sampling import Choice, Cut, adjusted, counted, is_sound, pick, reads_seen
from deepseek_jax.inference.row_state import Progress
from deepseek_jax.inference.sampling import NO_TOKEN, Seen


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
        cut: which tokens [B * S] these were drawn among; None but with `row_sampling.ANY`.
    """

    tokens_BS: Array
    accepted_B: Array
    seen: Seen | None
    cut: Cut | None = None


def verify(
    kind: str,
    choice: Choice,
    logits_BSV: Array,
    noise_BSV: Array | None,
    drafts: Drafts,
    length_B: Array,
    run_B: Array,
    seen: Seen | None,
    behind_BW: Array | None = None,
    forced: float | None = None,
) -> Verified:
    """Let a first part of each row's drafts stand, and choose the token behind it.

    Args:
        kind: what the settings of all rows allow (`row_sampling.KINDS`).
        choice: settings of the rows.
        logits_BSV: FP32, of the model: those at 0 are of the token that the first draft stands for.
        noise_BSV: of the draws at these positions (`row_sampling.noise_at`); None if all rows are greedy.
        drafts: K = S - 1 of each row.
        length_B: position of the last token chosen; that of the first draft is one more.
        run_B: rows that take part.
        seen: by the rows, their last chosen token included; None where the kind reads none.
        behind_BW: masks of the tokens behind the first draft, of masked rows, which have no more than one.
        forced: accept each draft with this probability, whatever it is: for benchmarks with random weights.
    """
    num_drafts = drafts.ids_BK.shape[1]
    place, positions_BS = jnp.arange(num_drafts + 1), length_B[:, None] + 1 + jnp.arange(num_drafts + 1)
    ids_BS, cut = _chosen(kind, choice, logits_BSV, noise_BSV, drafts, run_B, seen, behind_BW)
    chosen_BK = ids_BS[:, :-1]
    equal_BK = chosen_BK == drafts.ids_BK if forced is None else _uniform(positions_BS[:, :-1]) < forced
    stands_BK = run_B[:, None] & (place[:-1] < drafts.num_B[:, None]) & (chosen_BK != NO_TOKEN) & equal_BK
    stands_BK = jnp.cumprod(stands_BK, axis=1).astype(bool)
    tokens_BS = jnp.concatenate([jnp.where(stands_BK, drafts.ids_BK, chosen_BK), ids_BS[:, -1:]], axis=1)
    accepted_B = stands_BK.sum(axis=1, dtype=jnp.int32)
    if seen is not None:
        for s in range(num_drafts + 1):
            seen = counted(choice, seen, tokens_BS[:, s], run_B & (s <= accepted_B))
    return Verified(tokens_BS, accepted_B, seen, cut)


def advance(progress: Progress, end_ids_BE: Array, verified: Verified, run_B: Array) -> tuple[Array, Progress]:
    """Return how many tokens each row gets, up to one that ends it or the last that it may have, and the progress."""
    tokens_BS, place = verified.tokens_BS, jnp.arange(verified.tokens_BS.shape[1])
    is_end_BS = (tokens_BS[..., None] == end_ids_BE[:, None]).any(axis=-1) | (tokens_BS == NO_TOKEN)
    most_B = jnp.minimum(verified.accepted_B + 1, progress.left_B)
    is_end_BS &= place < most_B[:, None]
    ends_B = is_end_BS.any(axis=1)
    counts_B = jnp.where(run_B, jnp.where(ends_B, jnp.argmax(is_end_BS, axis=1) + 1, most_B), 0).astype(jnp.int32)
    last_B = jnp.take_along_axis(tokens_BS, jnp.maximum(counts_B - 1, 0)[:, None], axis=1)[:, 0]
    left_B = progress.left_B - counts_B
    return counts_B, Progress(
        progress.length_B + counts_B,
        jnp.where(run_B, last_B, progress.token_B),
        left_B,
        progress.finished_B | run_B & (ends_B | (left_B <= 0)),
    )


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Return the tokens of a step, by the share accepted at each position, of all that were drafted there.

    A draft behind a rejected one is drafted and not accepted: that is how `counters.Counters` counts. So with two
    drafts that are right 85% of the time each, the shares are 0.85 and 0.7225, and a step gives 2.5725 tokens.
    """
    return 1.0 + float(np.sum(acceptance))


def worth_rows(acceptance: Sequence[float], costs: Mapping[int, float]) -> int:
    """Return up to how many rows drafting is faster: while (1 + a) / (1 + c) is more than 1.

    Args:
        acceptance: as `expected_tokens` takes it; a is the sum over positions.
        costs: c of some numbers of rows: what a step with drafts takes longer than one without, as a share of that.
    """
    worth = 0
    for num_rows, cost in sorted(costs.items()):
        if expected_tokens(acceptance) <= 1.0 + cost:
            break
        worth = num_rows
    return worth


def _chosen(kind, choice, logits_BSV, noise_BSV, drafts, run_B, seen, behind_BW) -> tuple[Array, Cut | None]:
    """Return the model's token at each position, if the drafts before it stand."""
    batch, num_queries, vocab_size = logits_BSV.shape
    sound_BS, drafted = is_sound(logits_BSV), seen
    if reads_seen(kind):
        parts = []
        for s in range(num_queries):
            assert drafted is not None, "penalties need what the rows have"
            parts.append(adjusted(choice, logits_BSV[:, s], drafted))
            if s + 1 < num_queries:
                drafted = counted(choice, drafted, drafts.ids_BK[:, s], run_B & (s < drafts.num_B))
                choice = choice if behind_BW is None else choice._replace(mask_BW=behind_BW)
        logits_BSV = jnp.stack(parts, axis=1)

    def flat(x):
        return x.reshape(batch * num_queries, *x.shape[2:])

    sampling_T, run_T = jax.tree.map(lambda x: jnp.repeat(x, num_queries), (choice.sampling, run_B))
    noise_TV = None if noise_BSV is None else flat(noise_BSV)
    ids_T, cut = pick(kind, sampling_T, flat(logits_BSV), noise_TV, run_T, flat(sound_BS))
    return ids_T.reshape(batch, num_queries), cut


def _uniform(positions_BK: Array) -> Array:
    rows_B = jax.random.split(jax.random.key(0), len(positions_BK))
    keys_BK = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(rows_B, positions_BK)
    return jax.vmap(jax.vmap(jax.random.uniform))(keys_BK)
