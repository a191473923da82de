"""How prefill attends: new tokens of packed sequences in the expanded form, behind what the cache has of them.

A call takes T tokens of several sequences, one behind the other (`model.packed`), and writes their entries into the
sequences' pages (`model.absorbed`). New tokens attend to each other with keys and values of all heads: 3.4 times less
arithmetic than the absorbed form, and they are made once per token. What lies in the pages already, a shared prefix or
an earlier piece of the same prompt, is expanded a chunk at a time, attended to, and merged:

    in the cache   65 tokens of sequence 0, none of 1, 3 of 2     pages 0 0 2, packed; a chunk is a number of them
    new            2, 4 and 1 tokens                              0 0 1 1 1 1 2

The loop over chunks ends with the pages that there are. A program for sequences that begin has no such loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.model import packed
from deepseek_jax.model.absorbed import LayerPages, Places, UpProjection, write
from deepseek_jax.model.attention import Attend, Attention
from deepseek_jax.model.packed import Attended, Rows, Spans
from deepseek_jax.model.rope import rotary_table, softmax_scale
from pallas_kernels.mla_decode.schedule import PAGE

CHUNK_PAGES = {"cudnn": 64}  # of the cache, expanded at once; a power of two
SMALL_CHUNK_PAGES = 8  # with other implementations


class Sequences(NamedTuple):
    """The packed sequences of a call.

    Attributes:
        tables_BJ: int32, numbers of each sequence's pages in order.
        prefix_B: int32, tokens that the cache has of a sequence; 0 for one without new tokens.
        queries: where its new tokens lie.
        row_T: the sequence of each token.
        position_T: its position there.
        valid_T: False where there is no token.
    """

    tables_BJ: jax.Array
    prefix_B: jax.Array
    queries: Spans
    row_T: jax.Array
    position_T: jax.Array
    valid_T: jax.Array

    @classmethod
    def of(cls, tables_BJ: jax.Array, length_B: jax.Array, new_B: jax.Array, num_tokens: int) -> "Sequences":
        """Pack `new_B` tokens of each sequence behind the `length_B` that the cache has."""
        queries = Spans(jnp.cumsum(new_B) - new_B, new_B)
        row_T, valid_T = packed.rows_of(queries, num_tokens)
        prefix_B = jnp.where(new_B > 0, length_B, 0)
        position_T = prefix_B[row_T] + jnp.arange(num_tokens) - queries.start_B[row_T]
        return cls(tables_BJ, prefix_B, queries, row_T, jnp.where(valid_T, position_T, 0), valid_T)

    def places(self) -> Places:
        """Return where the entries of the new tokens lie; a position behind a sequence's table lies nowhere."""
        column_T = self.position_T // PAGE
        inside_T = self.valid_T & (column_T < self.tables_BJ.shape[1])
        page_T = self.tables_BJ[self.row_T, jnp.minimum(column_T, self.tables_BJ.shape[1] - 1)]
        page_T = jnp.where(inside_T, page_T, -1)
        return Places(self.tables_BJ, page_T[None], self.position_T[None] % PAGE, self.prefix_B, None)


def expanded_over_pages(
    model: Model, execution: Execution, sequences: Sequences, *, continues: bool, rows: Rows
) -> Attend:
    """Write each new token into the cache, and attend to all tokens of its sequence up to that one.

    Args:
        model: shape.
        execution: says which core attends.
        sequences: their tokens are the one row of x [1, T, D].
        continues: whether any sequence has a prefix in the cache.
        rows: that the new tokens of the sequences fill.
    """
    table, places = rotary_table(model, sequences.position_T[None]), sequences.places()
    scale, queries = softmax_scale(model), sequences.queries

    @jax.named_scope("attention")
    def attend(attention: Attention, x_1TD: jax.Array, cache: LayerPages) -> tuple[jax.Array, LayerPages]:
        q_1TNQ, entry = attention.project(x_1TD, table)
        cache = write(cache, entry, places)
        up = attention.kv_b_CNX.get_value()
        k_TNQ, v_TNH = expand(up, entry.latent_BSC[0], entry.rotary_BSR[0])
        with jax.named_scope("attention_core"):
            attended = packed.attend(
                execution, q_1TNQ[0], k_TNQ, v_TNH, queries, queries, scale, causal=True, rows=rows
            )
            if continues:
                attended = _with_prefix(model, execution, q_1TNQ[0], up, cache, sequences, attended, rows)
        return attention.output(attended.out_TNH.astype(x_1TD.dtype)[None]), cache

    return attend


def expand(up: UpProjection, latent_TC: jax.Array, rotary_TR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys [T, N, Q] and values [T, N, H] of all heads.

    They are two products. XLA would make one of them, and put both weights together and cut its result for that.
    """
    content_TNP = jnp.einsum("tc,npc->tnp", latent_TC, up.key_NPC)
    v_TNH = jnp.einsum("tc,nch->tnh", lax.optimization_barrier(latent_TC), up.value_NCH)
    rotary_TNR = jnp.broadcast_to(rotary_TR[:, None], (*content_TNP.shape[:2], rotary_TR.shape[1]))
    return jnp.concatenate([content_TNP, rotary_TNR], axis=2), v_TNH


def _with_prefix(
    model: Model,
    execution: Execution,
    q_TNQ: jax.Array,
    up: UpProjection,
    cache: LayerPages,
    sequences: Sequences,
    attended: Attended,
    rows: Rows,
) -> Attended:
    """Merge what the new tokens made of each other with what they make of the pages before them."""
    num_layers, num_pages, _, width = cache.pages.shape
    flat = cache.pages.reshape(num_layers * num_pages, PAGE, width)
    tables_BJ, prefix_B = sequences.tables_BJ, sequences.prefix_B
    most = 1 << (tables_BJ.size - 1).bit_length()
    chunk = min(CHUNK_PAGES.get(execution.attention, SMALL_CHUNK_PAGES), most)
    pages_B = -(-prefix_B // PAGE)
    end_B = jnp.cumsum(pages_B)
    first_B = end_B - pages_B

    def add(index: jax.Array, attended: Attended) -> Attended:
        slot_X = index * chunk + jnp.arange(chunk)
        row_X = jnp.searchsorted(end_B, slot_X, side="right", method="compare_all")
        row_X = jnp.minimum(row_X, len(end_B) - 1)
        column_X = slot_X - first_B[row_X]
        page_X = jnp.clip(tables_BJ[row_X, jnp.clip(column_X, 0, tables_BJ.shape[1] - 1)], 0, num_pages - 1)
        there = (column_X * PAGE)[:, None] + jnp.arange(PAGE) < prefix_B[row_X][:, None]
        entries = jnp.where(there[..., None], flat[cache.layer * num_pages + page_X], 0)  # it may be NaN
        k_MNQ, v_MNH = expand(up, *lax.split(entries.reshape(-1, width), (model.kv_latent, model.rotary_dim), axis=1))
        begin_B = first_B * PAGE - index * chunk * PAGE
        start_B, stop_B = (jnp.clip(x, 0, chunk * PAGE) for x in (begin_B, begin_B + prefix_B))
        keys = Spans(start_B, stop_B - start_B)
        scale = softmax_scale(model)
        part = packed.attend(execution, q_TNQ, k_MNQ, v_MNH, sequences.queries, keys, scale, causal=False, rows=rows)
        return packed.merge(attended, part)

    attended = attended._replace(out_TNH=attended.out_TNH.astype(jnp.float32))
    return lax.fori_loop(0, (end_B[-1] + chunk - 1) // chunk, add, attended)
