"""Speculative decoding: the MTP layer drafts tokens, and the main model verifies all of them in one pass.

A step of decoding reads every weight for one token of a row. It takes hardly longer for a few, so a row gets several
tokens of a step where a cheap layer guesses them. DeepSeek-V3's guesses are its MTP layer's, right 85 to 90% of the
time (section 5.4.3); `model.drafter` has that layer over the cache, `acceptance` the rule that keeps the text.

A row has n tokens in its pages, the token t_n that was chosen and not yet run, and `draft_D`, the MTP layer's state at
position n - 1. With k = 2 drafts, of which the first is right:

    draft     head(draft_D) -> d1;  MTP layer (draft_D, d1) at n -> d2
    verify    main model on t_n d1 d2 at n, n + 1, n + 2 -> logits: t_{n+1} = d1, t_{n+2} instead of d2
    follow    MTP layer on (h_n, t_{n+1}) (h_{n+1}, t_{n+2}) at n, n + 1: `draft_D` of the next step is its last state
    now       n + 2 tokens in the pages, t_{n+2} chosen

So after a step the entries of both are final up to the length, and those behind it (a rejected draft's, a guess's) are
read by nobody before they are written again. Nothing is written at the position n + k or before it that the row has no
right to: a row that may choose m more tokens drafts at most m - 1. A step without drafts is k = 0: then the MTP layer
follows alone, so that drafting can go on later, and pages stay what other rows expect.

A row with a mask drafts one token, with the host in between: it alone knows what may follow a token, and such a row
takes part in a step only when the one before it is read. A step tells what it would draft next for these rows, the
token of head(draft_D). The host looks whether the guess may come and what may come behind it, and sends both masks with
the guess as the draft (`row_state.Ahead`). The programs of other rows have no condition that the host of a GPU would
have to read.

A burst is several steps without the host in between, each with drafts of its own.

Drafting costs where the batch is so large that more tokens take more time; `acceptance.worth_rows` says where that
begins.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference.acceptance import Drafts, Verified, advance, verify
from deepseek_jax.inference.row_programs import PAGES, SPLIT, Told, logits_of, run_decode
from deepseek_jax.inference.row_sampling import ANY, GREEDY, Choice, choose_ids, counted, logprobs_of, noise_at
from deepseek_jax.inference.row_state import Progress, Settings
from deepseek_jax.inference.sampling import NO_TOKEN, Seen
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.drafter import draft_step
from deepseek_jax.parameters import ROWS, Weights
from pallas_kernels.lowering import manual_axes
from pallas_kernels.mla_decode import MOST_QUERIES

MOST_DRAFTS = MOST_QUERIES - 1


class Kind(NamedTuple):
    """What a program of decoding with drafts is made for.

    Attributes:
        num_drafts: of each row, up to `MOST_DRAFTS`; 0 drafts nothing and keeps the MTP layer's entries up to date.
        width: the first rows of each device, which alone take part.
        choosing: what the settings of all of them allow (`row_sampling.KINDS`); masked rows need `ANY`.
        num_steps: steps of a burst, between which the host has no part, so that no row has a mask.
        forced: see `acceptance.verify`.
    """

    num_drafts: int
    width: int
    choosing: str
    num_steps: int = 1
    forced: float | None = None


class DraftingRows(NamedTuple):
    """The rows of a batch as a step reads them; `seen` is None where no row has penalties."""

    progress: Progress
    draft_BD: Array  # the MTP layer's state at the last position of each row
    settings: Settings
    seen: Seen | None
    tables_BJ: Array  # with a column for `num_drafts` positions behind a row's last one
    run_B: Array
    load_RLE: Array  # as `row_programs.run_decode` has it


class Made(NamedTuple):
    """What a program has beside the rows."""

    model: Model
    execution: Execution
    kind: Kind
    weights: Weights


class Changing(NamedTuple):
    """What a step changes."""

    pages: Array
    progress: Progress
    draft_BD: Array
    seen: Seen | None
    load_RLE: Array


def speculate(
    model: Model, execution: Execution, kind: Kind, weights: Weights, pages: Array, *rows: Any
) -> tuple[Told, Array, Array, Progress, Array, Seen | None]:
    """Decode one to `num_drafts` + 1 tokens of each row of `run_B` that has not ended; do so `num_steps` times.

    Args:
        model: shape and mathematics.
        execution: of decoding.
        kind: of the program.
        weights: as `decode_weights` returns them with `drafts`.
        pages: [L + 1, pages, 64, C + R]; donated.
        rows: `DraftingRows`; progress, states and what they have seen are donated, and come back new behind the
            load.
    """

    def local(weights, pages, *rows):
        made = Made(model, execution, kind, manual_axes.vary(weights, frozenset(ROWS)))
        old = DraftingRows(*rows)
        first = jax.tree.map(lambda x: x[: kind.width], old)._replace(load_RLE=old.load_RLE)
        state = Changing(pages, first.progress, first.draft_BD, first.seen, first.load_RLE)
        if kind.num_steps == 1:
            state, told = _step(made, first, state)
        else:
            state, told_N = lax.scan(lambda state, _: _step(made, first, state), state, length=kind.num_steps)
            told = _in_one(told_N)
        changed = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, 0, 0),
            (old.progress, old.draft_BD, old.seen),
            (state.progress, state.draft_BD, state.seen),
        )
        return told, state.pages, state.load_RLE, *changed

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * len(rows)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, PAGES, *[SPLIT] * 4))
    return run(weights, pages, *rows)


class Proposed(NamedTuple):
    """What the main model is to verify, of each row.

    Attributes:
        drafts: of the MTP layer.
        noise_BSV: of the draws at the positions behind these tokens; None where all rows are greedy.
        new: tokens, their positions and which are there, all [B, 1 + `num_drafts`].
    """

    drafts: Drafts
    noise_BSV: Array | None
    new: tuple[Array, Array, Array]


def _step(made: Made, rows: DraftingRows, state: Changing) -> tuple[Changing, Told]:
    """Draft, verify and follow on one device."""
    proposed, pages = propose(made, rows, state)
    step = made.model, made.execution, made.weights, pages, rows.tables_BJ, *proposed.new
    hidden_BSD, pages, routes_BSLK, load_RLE = run_decode(state.load_RLE, *step)
    logits_BSV = logits_of(made.weights.params["head_DV"], hidden_BSD)
    state, told = settle(made, rows, state._replace(pages=pages), proposed, hidden_BSD, logits_BSV)
    return state._replace(load_RLE=load_RLE), told._replace(routes_BSLK=routes_BSLK)


def _follow(made: Made, tables_BJ: Array, pages, next_BS, hidden_BSD, start_B, valid_BS) -> tuple[Array, Array]:
    positions_BS, rows = start_B[:, None] + jnp.arange(next_BS.shape[1]), (next_BS, hidden_BSD)
    step = made.model, made.execution, made.weights, pages, tables_BJ
    return draft_step(*step, *rows, positions_BS, valid_BS)


def propose(made: Made, rows: DraftingRows, state: Changing) -> tuple[Proposed, Array]:
    """Draft on one device; return what is to be verified, and the pages."""
    (_, _, kind, weights), settings = made, rows.settings
    pages, progress, draft_BD, seen, _ = state
    run_B, choice = rows.run_B & ~progress.finished_B, settings.choice
    length_B, head_DV, place = progress.length_B, weights.params["head_DV"], jnp.arange(kind.num_drafts + 1)
    follow = functools.partial(_follow, made, rows.tables_BJ)
    greedy = kind.choosing == GREEDY
    noise_BSV = None if greedy else noise_at(choice, length_B[:, None] + 1 + place, head_DV.shape[1])
    most_B = jnp.where(run_B, jnp.clip(progress.left_B - 1, 0, kind.num_drafts), 0)
    if kind.choosing == ANY:
        most_B = jnp.where(choice.masked_B, jnp.minimum(most_B, settings.ahead.draft_B != NO_TOKEN), most_B)
    drafts, pages = _draft(kind, choice, head_DV, pages, draft_BD, noise_BSV, length_B, most_B, seen, follow)
    if kind.num_drafts and kind.choosing == ANY:
        first_B = jnp.where(choice.masked_B, settings.ahead.draft_B, drafts.ids_BK[:, 0])
        drafts = drafts._replace(ids_BK=drafts.ids_BK.at[:, 0].set(jnp.maximum(first_B, 0)))

    tokens_BS = jnp.concatenate([progress.token_B[:, None], drafts.ids_BK], axis=1)
    valid_BS = _valid(run_B, 1 + drafts.num_B, kind.num_drafts)
    return Proposed(drafts, noise_BSV, (tokens_BS, length_B[:, None] + place, valid_BS)), pages


def settle(
    made: Made, rows: DraftingRows, state: Changing, proposed: Proposed, hidden_BSD: Array, logits_BSV: Array
) -> tuple[Changing, Told]:
    """Let what the main model says of proposed tokens stand, and have the MTP layer follow, on one device."""
    (_, _, kind, weights), settings = made, rows.settings
    pages, progress, draft_BD, seen, load_RLE = state
    run_B, choice, length_B = rows.run_B & ~progress.finished_B, settings.choice, progress.length_B
    drafts, noise_BSV, _ = proposed
    rest = drafts, length_B, run_B, seen, settings.ahead.mask_BW, kind.forced
    verified = verify(kind.choosing, choice, logits_BSV, noise_BSV, *rest)
    counts_B, progress = advance(progress, settings.end_ids_BE, verified, run_B)

    with jax.named_scope("follow"):
        valid_BS = _valid(run_B, counts_B, kind.num_drafts)
        new = verified.tokens_BS, hidden_BSD, length_B, valid_BS
        states_BSD, pages = _follow(made, rows.tables_BJ, pages, *new)
    last_BD = jnp.take_along_axis(states_BSD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
    draft_BD = jnp.where(run_B[:, None], last_BD, draft_BD)
    told = _told(kind, choice, logits_BSV, verified, counts_B, progress, drafts.num_B, run_B)
    if kind.choosing == ANY and kind.num_drafts and kind.num_steps == 1:
        head_DV = weights.params["head_DV"]
        told = told._replace(guess_B=_guess(choice, head_DV, draft_BD, progress, run_B, verified.seen))
    return Changing(pages, progress, draft_BD, verified.seen, load_RLE), told


def _valid(run_B: Array, counts_B: Array, num_drafts: int) -> Array:
    """Return which of a step's tokens [B, 1 + `num_drafts`] are there: the first `counts_B`, at least one, of rows that
    run. The first column is `run_B` itself, so that main model and MTP layer have one plan of their attention.
    """
    behind_BK = run_B[:, None] & (1 + jnp.arange(num_drafts) < counts_B[:, None])
    return jnp.concatenate([run_B[:, None], behind_BK], axis=1)


def _draft(kind, choice, head_DV, pages, draft_BD, noise_BSV, length_B, most_B, seen, follow) -> tuple[Drafts, Array]:
    """Draft tokens of each row, one after the other, at most `most_B` of them."""
    ids, states_BD = [], draft_BD
    for k in range(kind.num_drafts):
        with jax.named_scope("draft"):
            noise_BV = None if noise_BSV is None else noise_BSV[:, k]
            ids_B = choose_ids(kind.choosing, choice, logits_of(head_DV, states_BD), noise_BV, k < most_B, seen)
            most_B, ids_B = jnp.where(ids_B == NO_TOKEN, jnp.minimum(most_B, k), most_B), jnp.maximum(ids_B, 0)
            ids.append(ids_B)
            if k + 1 < kind.num_drafts:
                seen = counted(choice, seen, ids_B, k < most_B)
                guess = ids_B[:, None], states_BD[:, None], length_B + k, (k + 1 < most_B)[:, None]
                states_BSD, pages = follow(pages, *guess)
                states_BD = states_BSD[:, 0]
    ids_BK = jnp.stack(ids, axis=1) if ids else jnp.zeros((*length_B.shape, 0), jnp.int32)
    return Drafts(ids_BK, most_B), pages


def _guess(choice: Choice, head_DV: Array, draft_BD: Array, progress: Progress, run_B: Array, seen: Any) -> Array:
    """Return what each masked row would draft next, `NO_TOKEN` for others."""
    wants_B, free = run_B & choice.masked_B & ~progress.finished_B, choice._replace(masked_B=run_B & False)

    def guess():
        noise_BV = noise_at(choice, progress.length_B + 1, head_DV.shape[1])
        ids_B = choose_ids(ANY, free, logits_of(head_DV, draft_BD), noise_BV, wants_B, seen)
        return jnp.where(wants_B, ids_B, NO_TOKEN)

    return lax.cond(wants_B.any(), guess, lambda: jnp.where(wants_B, 0, NO_TOKEN).astype(jnp.int32))


def _told(
    kind: Kind,
    choice: Choice,
    logits_BSV: Array,
    verified: Verified,
    counts_B: Array,
    progress: Progress,
    drafted_B: Array,
    run_B: Array,
) -> Told:
    """Return the tokens, counts and ends for the host, and log-probabilities of all tokens where a row wants them."""
    numbers = verified.tokens_BS.T, counts_B[None], progress.finished_B[None].astype(jnp.int32)
    numbers_BX = jnp.concatenate(numbers).T
    drafted_B = jnp.where(progress.finished_B, jnp.minimum(drafted_B, counts_B), drafted_B)  # none behind an end
    drafts_BN2 = jnp.stack([drafted_B, jnp.minimum(verified.accepted_B, counts_B)], axis=1)[:, None]
    if kind.choosing == GREEDY:
        return Told(numbers_BX, None, drafts_BN2)
    shape, logits_TV = verified.tokens_BS.shape, logits_BSV.reshape(-1, logits_BSV.shape[-1])
    each = choice.sampling, jnp.where(run_B, choice.wants_B, 0)
    sampling_T, wants_T = jax.tree.map(lambda x: jnp.repeat(x, shape[1]), each)
    token = logits_TV, verified.tokens_BS.reshape(-1), verified.cut
    logprobs = logprobs_of(kind.choosing, sampling_T, *token, wants_T)
    return Told(numbers_BX, jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), logprobs), drafts_BN2)


def _in_one(told_N: Told) -> Told:
    """Return what the steps of a burst tell, whose arrays lie one behind the other, as one step.

    A row's tokens are put one behind the other, without those of a step that do not count.
    """
    counts_NB, finished_NB = told_N.numbers_BX[..., -2], told_N.numbers_BX[..., -1]
    num_steps, batch, num_numbers = told_N.numbers_BX.shape
    num_tokens = num_numbers - 2
    counts_BX = jnp.arange(num_tokens) < counts_NB.T[..., None]
    counts_BX = counts_BX.reshape(batch, num_steps * num_tokens)
    target_BX = jnp.where(counts_BX, jnp.cumsum(counts_BX, axis=1) - 1, counts_BX.shape[1])

    def together(x_NBS):
        x_BX = jnp.moveaxis(x_NBS, 0, 1).reshape(*counts_BX.shape, *x_NBS.shape[3:])
        return jnp.zeros_like(x_BX).at[jnp.arange(batch)[:, None], target_BX].set(x_BX, mode="drop")

    numbers = together(told_N.numbers_BX[..., :-2]).T, counts_NB.sum(axis=0)[None], finished_NB[-1:]
    logprobs, routes = jax.tree.map(together, (told_N.logprobs, told_N.routes_BSLK))
    assert told_N.drafts_BN2 is not None  # each step told them
    drafts_BN2 = jnp.moveaxis(told_N.drafts_BN2[:, :, 0], 0, 1)
    return Told(jnp.concatenate(numbers).T, logprobs, drafts_BN2, routes_BSLK=routes)
