"""Exact arithmetic: a token's log-probability is the same number, bit for bit, whatever else goes through the model.

The problem. Prefill, decoding and verification of drafts are programs of their own, in several widths. Each sums a
token's products in another order, so its log-probability differs in the last bits from one to the next: with how many
other rows there are, with what of the prompt was cached, with whether tokens were drafted. For sampling that is
nothing. In reinforcement learning the ratio of a token is to be 1 while the weights are those that drew it.

The choice. One compiled program, `pass_tile`, is the only one that runs the model: `TILE` tokens in the absorbed form,
each with its row and position. They may be of one prompt, of many rows that decode, or drafts: first all write their
entries into the pages, then each attends to those of its row up to its own position. What such a program computes for a
token depends on the token and on the pages of its row alone:

    products       of a fixed number of rows, so a row of them is summed in the same order in every call
    experts        in blocks of fixed size (`experts_blocks`); the decoding experts take products as long as an expert's
                   rows, and with them 174 of 240 tokens of `tiny` differed (experiments/log.md)
    attention      a product of each token's own; positions behind it are masked, and add exactly 0
    probabilities  log-probability = logit - logsumexp, both made here; later programs only subtract

That holds for XLA's products on CPUs, was measured, and is tested: it is not a promise of XLA. On GPUs the attention
kernel cuts a row's pages by the lengths of all rows, so there exact arithmetic is refused.

Exact are the log-probabilities of the tokens themselves, drawn ones and those of a prompt. Those of the most probable
others (`num_logprobs`, `top`) come from other programs and differ by rounding; those among kept ids (`Job.kept`) are
refused.

The price is a prefill in tiles of `TILE` tokens in the absorbed form, a dispatch for each tile, and no bursts.
The MTP layer need not be exact: which drafts it makes changes no token (`acceptance`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference import speculative
from deepseek_jax.inference.row_programs import (
    PAGES,
    SPLIT,
    Packed,
    Told,
    choose_first,
    choose_next,
    logits_of,
    of_rows,
    run_decode,
    tell,
)
from deepseek_jax.inference.row_state import Progress, RowState, Settings
from deepseek_jax.inference.sampling import MOST_LOGPROBS, Logprobs, Seen, log_probabilities
from deepseek_jax.inference.speculative import Changing, DraftingRows, Kind, Made, Proposed
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels.lowering import manual_axes

TILE = 32  # tokens that the program takes; with more, decoding few rows is slower, with fewer, prompts


class Queries(NamedTuple):
    """Tokens that are to go through the model: row of the batch, id and position; int32, and which are there."""

    row_T: Array
    token_T: Array
    position_T: Array
    valid_T: Array


class Passed(NamedTuple):
    """What a tile of tokens gives.

    Attributes:
        hidden_TD: after the final norm.
        logits_TV: FP32.
        log_sum_T: their logsumexp.
        routes_TLK: experts.
    """

    hidden_TD: Array
    logits_TV: Array
    log_sum_T: Array
    routes_TLK: Array


Tiles = list[Passed]


def pass_tile(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: Array,
    tables_BJ: Array,
    queries: Queries,
    load_RLE: Array,
) -> tuple[Passed, Array, Array]:
    """Run `TILE` tokens; return what they give, the pages (donated) and the load (`row_programs.run_decode`)."""

    def local(weights, pages, tables_BJ, queries, load_RLE):
        weights = manual_axes.vary(weights, frozenset(ROWS))
        new = queries.token_T[:, None], queries.position_T[:, None], queries.valid_T[:, None]
        step = model, execution, weights, pages, of_rows(tables_BJ, queries.row_T), *new
        hidden_TSD, pages, routes_TSLK, load_RLE = run_decode(load_RLE, *step)
        logits_TV = logits_of(weights.params["head_DV"], hidden_TSD[:, 0])
        passed = Passed(hidden_TSD[:, 0], logits_TV, jax.nn.logsumexp(logits_TV, axis=-1), routes_TSLK[:, 0])
        return passed, pages, load_RLE

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * 3
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, PAGES, SPLIT))
    return run(weights, pages, tables_BJ, queries, load_RLE)


def cut(queries: Queries, start: Array) -> Queries:
    """Return the tile of queries that begins at `start`."""

    def local(queries, start):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, TILE), queries)

    return jax.shard_map(local, in_specs=(SPLIT, P()), out_specs=SPLIT)(queries, start)


def lay_out(progress: Progress, packed: Packed) -> tuple[Queries, Progress]:
    """Return the tokens of pieces of prompts, and the progress with them (donated)."""

    def local(progress, packed):
        num_tokens, row_R, new_R = len(packed.tokens_T), packed.row_R, packed.new_R
        lengths_R = of_rows(progress.length_B, row_R)
        sequences = Sequences.of(lengths_R[:, None], lengths_R, new_R, num_tokens)
        queries = Queries(row_R[sequences.row_T], packed.tokens_T, sequences.position_T, sequences.valid_T)
        length_B = progress.length_B.at[row_R].add(new_R, mode="drop")
        return _filled(queries), progress._replace(length_B=length_B)

    return jax.shard_map(local, in_specs=(SPLIT, SPLIT), out_specs=SPLIT)(progress, packed)


def line_up(progress: Progress, run_B: Array) -> Queries:
    """Return the last token of each row that runs."""

    def local(progress, run_B):
        new = progress.token_B[:, None], progress.length_B[:, None], (run_B & ~progress.finished_B)[:, None]
        return _of_rows(new)

    return jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT)(progress, run_B)


def _of_rows(new: tuple[Array, Array, Array]) -> Queries:
    """Return queries of each row's tokens, positions and which are there, all [B, S]."""
    row_BS = jnp.broadcast_to(jnp.arange(len(new[0]))[:, None], new[0].shape)
    return _filled(Queries(*(x.reshape(-1) for x in (row_BS, *new))))


def _filled(queries: Queries) -> Queries:
    """Return queries of whole tiles."""
    missing = -len(queries.row_T) % TILE
    return jax.tree.map(lambda x: jnp.pad(x, (0, missing)), queries)


def decode(
    kind: str,
    progress: Progress,
    settings: Settings,
    seen: Seen | None,
    run_B: Array,
    tiles: Tiles,
) -> tuple[Told, Progress, Seen | None]:
    """Choose the next token of each row behind its tiles; `kind` and what is donated as in `row_programs.decode`."""

    def local(progress, settings, seen, run_B, tiles):
        passed = _joined(tiles, len(run_B))
        run_B &= ~progress.finished_B
        progress = progress._replace(length_B=progress.length_B + run_B)
        chosen, progress, seen = choose_next(kind, passed.logits_TV, progress, settings, seen, run_B)
        told = _exactly(tell(chosen, run_B, progress), passed)
        return told._replace(routes_BSLK=passed.routes_TLK[:, None]), progress, seen

    return jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT)(progress, settings, seen, run_B, tiles)


def first(kind: str, progress: Progress, settings: Settings, seen: Any, behind: Passed, packed: Packed) -> Any:
    """Do what `row_programs.first` does with what is `behind` each piece."""

    def local(progress, settings, seen, behind, packed):
        told, progress, seen = choose_first(kind, behind.logits_TV, RowState(progress, settings, seen), packed)
        return _exactly(told, behind), progress, seen

    return jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT)(progress, settings, seen, behind, packed)


def gather(most_tokens: int, tiles: Tiles, new_R: Array) -> tuple[Passed, Array, Array]:
    """Return what is behind each piece, and the hidden states, filled up, and experts of all tokens."""

    def local(tiles, new_R):
        passed = _joined(tiles, len(tiles) * TILE)
        end_R = jnp.maximum(jnp.cumsum(new_R) - 1, 0)
        hidden_TD = passed.hidden_TD[:most_tokens]
        hidden_TD = jnp.pad(hidden_TD, ((0, most_tokens - len(hidden_TD)), (0, 0)))
        return jax.tree.map(lambda x: x[end_R], passed), hidden_TD, passed.routes_TLK

    return jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT)(tiles, new_R)


def evaluate(most_tokens: int, tiles: Tiles, following_T: Array) -> Logprobs:
    """Return the log-probabilities of the tokens behind those of the tiles, filled up."""

    def local(tiles, following_T):
        passed = _joined(tiles, len(tiles) * TILE)
        ids_T = jnp.pad(following_T, (0, TILE))[: len(passed.log_sum_T)]
        found = log_probabilities(passed.logits_TV, ids_T, MOST_LOGPROBS)
        found = found._replace(chosen_B=_logprobs(passed.logits_TV, ids_T, passed.log_sum_T))
        return jax.tree.map(
            lambda x: jnp.pad(x[:most_tokens], ((0, max(most_tokens - len(x), 0)), *[(0, 0)] * (x.ndim - 1))), found
        )

    return jax.shard_map(local, in_specs=SPLIT, out_specs=SPLIT)(tiles, following_T)


def propose(
    model: Model, execution: Execution, kind: Kind, weights: Weights, pages: Array, *rows: Any
) -> tuple[Proposed, Queries, Array]:
    """Draft tokens of each row, as `speculative.speculate`; return them, what is to be verified, and the pages."""

    def local(weights, pages, *rows):
        made, rows, state = _drafting(model, execution, kind, weights, pages, rows)
        proposed, pages = speculative.propose(made, rows, state)
        return proposed, _of_rows(proposed.new), pages

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * len(rows)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, SPLIT, PAGES))
    return run(weights, pages, *rows)


def settle(
    model: Model,
    execution: Execution,
    kind: Kind,
    weights: Weights,
    pages: Array,
    proposed: Proposed,
    tiles: Tiles,
    *rows: Any,
) -> tuple[Told, Array, Progress, Array, Seen | None]:
    """Verify what was proposed by its tiles, as `speculative.speculate`."""

    def local(weights, pages, proposed, tiles, *rows):
        made, rows, state = _drafting(model, execution, kind, weights, pages, rows)
        batch, length = proposed.new[0].shape
        passed = _joined(tiles, batch * length)
        by_row = jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), passed)
        state, told = speculative.settle(made, rows, state, proposed, by_row.hidden_TD, by_row.logits_TV)
        told = _exactly(told, passed)._replace(routes_BSLK=by_row.routes_TLK)
        return told, state.pages, state.progress, state.draft_BD, state.seen

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * (2 + len(rows))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, PAGES, *[SPLIT] * 3))
    return run(weights, pages, proposed, tiles, *rows)


def _drafting(model, execution, kind, weights, pages, rows) -> tuple[Made, DraftingRows, Changing]:
    made, rows = Made(model, execution, kind, manual_axes.vary(weights, frozenset(ROWS))), DraftingRows(*rows)
    return made, rows, Changing(pages, rows.progress, rows.draft_BD, rows.seen, rows.load_RLE)


def _joined(tiles: Tiles, num_tokens: int) -> Passed:
    """Return what the tokens of several tiles give, without those that fill the last."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num_tokens], *tiles)


def _exactly(told: Told, passed: Passed) -> Told:
    """Return it with the log-probabilities of the tile's own numbers; tokens lie in the order of `passed`."""
    if told.logprobs is None:
        return told
    shape, num_tokens = told.logprobs.chosen_B.shape, told.numbers_BX.shape[1] - 2
    ids_T = told.numbers_BX[:, :num_tokens].reshape(-1)
    chosen_T = _logprobs(passed.logits_TV, ids_T, passed.log_sum_T)
    return told._replace(logprobs=told.logprobs._replace(chosen_B=chosen_T.reshape(shape)))


def _logprobs(logits_TV: Array, ids_T: Array, log_sum_T: Array) -> Array:
    return jnp.take_along_axis(logits_TV, jnp.maximum(ids_T, 0)[:, None], axis=-1)[:, 0] - log_sum_T
