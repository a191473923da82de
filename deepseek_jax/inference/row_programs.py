"""The programs of a `DeviceBatch`: decoding, prefill, the first token, log-probabilities of prompts.

Each runs on a mesh whose devices have rows and pages of their own. Its results for the host are few small arrays, which
no later step changes or frees: a step can be dispatched before the results of the last are read.

    decode    a token of each row that runs; the next one is chosen; or a burst of several, one after the other
    prefill   packed pieces of prompts; the hidden state of every token stays on the device
    first     the token behind the last piece of each prompt, from these
    evaluate  log-probabilities of the tokens of the pieces, from these
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.inference.cache import CACHE_SPECS
from deepseek_jax.inference.row_sampling import choose, counted
from deepseek_jax.inference.row_state import Progress, RowState, Settings
from deepseek_jax.inference.sampling import MOST_LOGPROBS, Chosen, Logprobs, Seen, log_probabilities
from deepseek_jax.inference.weights import weight_specs
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.model.transformer import routed_decode_step, routed_prefill_step
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parameters import ROWS, P, Weights
from pallas_kernels.lowering import manual_axes

HEAD_CHUNK = 128  # tokens whose logits are there at once; a program never has those of a whole prompt
SPLIT: Any = P(ROWS)
PAGES: Any = CACHE_SPECS.pages


class Told(NamedTuple):
    """What the host reads of a step's tokens.

    Attributes:
        numbers_BX: int32, token, whether there is one, and whether the row has ended; in a burst or with drafts, K
            tokens and how many of them count, the first ones.
        logprobs: as `row_sampling.choose` has them; None from the greedy program. In a burst [B, K] and [B, K, tops].
        drafts_BN2: int32, drafts that were verified and those that stand, in each of N steps with drafts.
        guess_B: int32, drafts of masked rows for the next step, or `NO_TOKEN`.
        routes_BSLK: experts of the tokens that went through the model; None from `first`.
    """

    numbers_BX: Array
    logprobs: Logprobs | None
    drafts_BN2: Array | None = None
    guess_B: Array | None = None
    routes_BSLK: Array | None = None


def decode(
    model: Model,
    execution: Execution,
    width: int,
    kind: str,
    num_tokens: int,
    weights: Weights,
    pages: Array,
    progress: Progress,
    settings: Settings,
    seen: Seen | None,
    tables_BJ: Array,
    run_B: Array,
    load_RLE: Array,
) -> tuple[Told, Array, Progress, Seen | None, Array]:
    """Run the last token of each row of `run_B` that has not ended, and choose the next; do so `num_tokens` times.

    Args:
        model: shape and mathematics.
        execution: of decoding.
        width: the first rows of each device, which alone take part.
        kind: what the settings of all of them allow (`row_sampling.KINDS`).
        num_tokens: of a row. More than one are a loop of known length, between whose steps the host has no part.
        weights: as `decode_weights` returns them.
        pages: donated.
        progress: donated.
        settings: of the rows.
        seen: donated; None where `row_sampling.reads_seen(kind)` is False.
        tables_BJ: int32, pages of each row.
        run_B: bool.
        load_RLE: as `run_decode` has it.
    """

    def local(weights, pages, progress, settings, seen, tables_BJ, run_B, load_RLE):
        weights = manual_axes.vary(weights, frozenset(ROWS))
        all_rows = progress, settings, seen
        progress, settings, seen, tables_BJ, run_B = jax.tree.map(
            lambda x: x[:width], (progress, settings, seen, tables_BJ, run_B)
        )
        state = pages, progress, seen, load_RLE
        step = functools.partial(_step, (model, execution, kind, weights), (settings, tables_BJ, run_B))
        if num_tokens == 1:
            state, told = step(state)
        else:
            state, told_K = lax.scan(lambda state, _: step(state), state, length=num_tokens)
            told = _in_one(told_K)
        pages, progress, seen, load_RLE = state
        progress, seen = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, 0, 0),
            (all_rows[0], all_rows[2]),
            (progress, seen),
        )
        return told, pages, progress, seen, load_RLE

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * 6
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, PAGES, SPLIT, SPLIT, SPLIT))
    return run(weights, pages, progress, settings, seen, tables_BJ, run_B, load_RLE)


def _step(made: tuple[Model, Execution, str, Weights], rows: tuple[Settings, Array, Array], state: Any) -> Any:
    """Choose a token of each row of `rows` (settings, tables, who runs) from the state that `decode` carries on."""
    (model, execution, kind, weights), (settings, tables_BJ, run_B) = made, rows
    pages, progress, seen, load_RLE = state
    run_B &= ~progress.finished_B
    new = progress.token_B[:, None], progress.length_B[:, None], run_B[:, None]
    step = model, execution, weights, pages, tables_BJ, *new
    hidden_BSD, pages, routes_BSLK, load_RLE = run_decode(load_RLE, *step)
    logits_BV = logits_of(weights.params["head_DV"], hidden_BSD[:, 0])
    progress = progress._replace(length_B=progress.length_B + run_B)
    chosen, progress, seen = choose_next(kind, logits_BV, progress, settings, seen, run_B)
    told = tell(chosen, run_B, progress)._replace(routes_BSLK=routes_BSLK)
    return (pages, progress, seen, load_RLE), told


def run_decode(load_RLE: Array, model: Model, *arrays: Any) -> tuple[Array, Array, Array, Array]:
    """Run a step as `transformer.routed_decode_step`, of which all other arguments are.

    `load_RLE` is how many tokens each expert has had, int32 [1, MoE layers, E] of this device; it comes back with more.
    """
    hidden_BSD, pages, routes_BSLK = routed_decode_step(model, *arrays)
    return hidden_BSD, pages, routes_BSLK, with_load(load_RLE, routes_BSLK, valid=arrays[-1])


def with_load(load_RLE: Array, routes: Array, valid: Array) -> Array:
    """Return the load with the experts [..., MoE layers, K] of valid tokens [...]."""
    *_, num_layers, num_experts = load_RLE.shape
    flat_TLK, valid_T = routes.reshape(-1, *routes.shape[-2:]), valid.reshape(-1)
    is_for = (flat_TLK[..., None] == jnp.arange(num_experts)) & valid_T[:, None, None, None]
    return load_RLE + is_for.sum(axis=(0, 2), dtype=jnp.int32)


class Packed(NamedTuple):
    """Pieces of a call, on each device R of them.

    Attributes:
        tokens_T: int32, one piece behind the other.
        row_R: int32, the row of each piece on its device; beyond the rows where there is no piece.
        new_R: int32, its tokens.
        last_R: bool, the first token follows it.
    """

    tokens_T: Array
    row_R: Array
    new_R: Array
    last_R: Array


def prefill(
    model: Model,
    execution: Execution,
    rows: Rows,
    most_tokens: int,
    weights: Weights,
    pages: Array,
    progress: Progress,
    tables_BJ: Array,
    packed: Packed,
    load_RLE: Array,
) -> tuple[Array, Array, Array, Array, Progress, Array]:
    """Run pieces of prompts behind what their rows have; pages and progress are donated.

    Returns:
        the hidden states after the last token of each piece [R, D], those of all tokens, filled up to
        [`most_tokens`, D], the experts of all tokens [T, MoE layers, K], the pages, the progress and the load
        (`run_decode`).
    """

    def local(weights, pages, progress, tables_BJ, packed, load_RLE):
        weights = manual_axes.vary(weights, frozenset(ROWS))
        row_R, new_R = packed.row_R, packed.new_R
        sequences = Sequences.of(
            of_rows(tables_BJ, row_R), of_rows(progress.length_B, row_R), new_R, len(packed.tokens_T)
        )
        options = {"continues": True, "rows": rows}
        step = model, execution, weights, pages, packed.tokens_T, sequences
        hidden_TD, pages, routes_TLK = routed_prefill_step(*step, **options)
        hidden_RD = hidden_TD[jnp.maximum(jnp.cumsum(new_R) - 1, 0)]
        hidden_TD = jnp.pad(hidden_TD, ((0, most_tokens - len(hidden_TD)), (0, 0)))
        length_B = progress.length_B.at[row_R].add(new_R, mode="drop")
        load_RLE = with_load(load_RLE, routes_TLK, sequences.valid_T)
        return hidden_RD, hidden_TD, routes_TLK, pages, progress._replace(length_B=length_B), load_RLE

    in_specs = weight_specs(weights), PAGES, *[SPLIT] * 4
    run = jax.shard_map(local, in_specs=in_specs, out_specs=(SPLIT, SPLIT, SPLIT, PAGES, SPLIT, SPLIT))
    return run(weights, pages, progress, tables_BJ, packed, load_RLE)


def first(
    kind: str, head_DV: Array, progress: Progress, settings: Settings, seen: Any, hidden_RD: Array, packed: Packed
) -> tuple[Told, Progress, Any]:
    """Choose the token behind each last piece of a prompt; `kind`, `seen` and what is donated as in `decode`."""

    def local(head_DV, progress, settings, seen, hidden_RD, packed):
        logits_RV = logits_of(manual_axes.vary(head_DV, frozenset(ROWS)), hidden_RD)
        return choose_first(kind, logits_RV, RowState(progress, settings, seen), packed)

    run = jax.shard_map(local, in_specs=(P(), *[SPLIT] * 5), out_specs=SPLIT)
    return run(head_DV, progress, settings, seen, hidden_RD, packed)


def choose_first(kind: str, logits_RV: Array, rows: RowState, packed: Packed) -> tuple[Told, Progress, Any]:
    """Do what `first` does, on one device, with the logits behind each piece."""
    row_R, (progress, _, seen) = packed.row_R, rows
    of_R = jax.tree.map(lambda x: of_rows(x, row_R), rows)
    last_R = packed.last_R & (of_R.progress.left_B > 0) & ~of_R.progress.finished_B
    # A prompt after which nothing is wanted ends here.
    over_R = packed.last_R & ~last_R
    chosen, progress_R, seen_R = choose_next(kind, logits_RV, of_R.progress, of_R.settings, of_R.seen, last_R)
    progress_R = progress_R._replace(finished_B=progress_R.finished_B | over_R)
    told = tell(chosen, last_R, progress_R)
    where_R = jnp.where(packed.last_R, row_R, len(progress.length_B))
    progress, seen = jax.tree.map(
        lambda old, new: old.at[where_R].set(new, mode="drop"), (progress, seen), (progress_R, seen_R)
    )
    return told, progress, seen


def evaluate(head_DV: Array, hidden_TD: Array, following_T: Array, num_T1: Array) -> Logprobs:
    """Return the log-probabilities of the tokens that follow each hidden state, of the first `num_T1` of a device.

    Logits are made `HEAD_CHUNK` tokens at a time, and only as many as are wanted.
    """

    def local(head_DV, hidden_TD, following_T, num_T1):
        head_DV = manual_axes.vary(head_DV, frozenset(ROWS))
        num_tokens = len(hidden_TD)

        def add(i, found):
            hidden_XD, ids_X = (
                lax.dynamic_slice_in_dim(x, i * HEAD_CHUNK, HEAD_CHUNK) for x in (hidden_TD, following_T)
            )
            part = log_probabilities(logits_of(head_DV, hidden_XD), ids_X, MOST_LOGPROBS)
            return jax.tree.map(
                lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, i * HEAD_CHUNK, 0), found, part
            )

        tops: Any = (jnp.zeros((num_tokens, MOST_LOGPROBS), dtype) for dtype in (jnp.int32, jnp.float32))
        found = jax.tree.map(lambda x: vary(x, hidden_TD), Logprobs(jnp.zeros(num_tokens, jnp.float32), *tops))
        return lax.fori_loop(0, -(-num_T1[0] // HEAD_CHUNK), add, found)

    run = jax.shard_map(local, in_specs=(P(), SPLIT, SPLIT, SPLIT), out_specs=SPLIT)
    return run(head_DV, hidden_TD, following_T, num_T1)


def choose_next(
    kind: str, logits_BV: Array, progress: Progress, settings: Settings, seen: Any, run_B: Array
) -> tuple[Chosen, Progress, Any]:
    """Choose the next token of each row of `run_B`."""
    chosen = choose(kind, settings.choice, logits_BV, progress.length_B, run_B, seen)
    seen = counted(settings.choice, seen, chosen.ids_B, run_B)
    return chosen, progress.after(settings.end_ids_BE, chosen.ids_B, run_B), seen


def _in_one(told_K: Told) -> Told:
    """Return what K steps tell, whose arrays lie one behind the other, as one step of K tokens.

    A row that ends takes no part in the steps behind: its tokens are the first ones.
    """
    tokens_KB, counts_KB, finished_KB = jnp.moveaxis(told_K.numbers_BX, 2, 0)
    numbers_BX = jnp.concatenate([tokens_KB, counts_KB.sum(axis=0)[None], finished_KB[-1:]]).T
    logprobs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), told_K.logprobs)
    assert told_K.routes_BSLK is not None
    return Told(numbers_BX, logprobs, routes_BSLK=jnp.moveaxis(told_K.routes_BSLK[:, :, 0], 0, 1))


def tell(chosen: Chosen, run_B: Array, progress: Progress) -> Told:
    """Return what the host reads of rows with a new token."""
    return Told(
        jnp.stack([chosen.ids_B, run_B.astype(jnp.int32), progress.finished_B.astype(jnp.int32)], 1), chosen.logprobs
    )


def logits_of(head_DV: Array, hidden_BD: Array) -> Array:
    """Return FP32 logits [.., V] of hidden states [.., D]."""
    with jax.named_scope("head"):
        return jnp.matmul(hidden_BD, head_DV, preferred_element_type=jnp.float32)


def of_rows(array: Array, row_R: Array) -> Array:
    """Return the entries of rows; of one that is none, those of the last."""
    return array[jnp.minimum(row_R, len(array) - 1)]
