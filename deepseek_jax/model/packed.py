"""The attention core of prefill: sequences packed one behind the other, each of which attends to keys of its own.

Queries of T tokens and keys of M tokens lie in two packed arrays. A sequence has a span of each. So the work is that of
the sequences, whatever their lengths are, and no sequence is filled up to the longest:

    queries   0 0 0 1 2 2 . .     start_B 0 3 4   length_B 3 1 2      . belongs to no sequence
    keys      0 0 0 1 2 2 . .     causal: query i of a sequence sees its keys 0 to i

The core returns the log of the sum under the softmax, too. Results over parts of the keys, such as a cached prefix and
the new tokens, are merged by it (`merge`). A query of a sequence without a key has output 0 and log-sum-exp -inf.

Two implementations of one function, chosen by `execution.attention`:

    cudnn    where a sequence attends to itself: NVIDIA's flash attention as in training (`model.flash`), with a row per
             sequence. Rows are as long as the longest sequence of the call, so the host puts sequences of like lengths
             together (`inference.prefill`); only the core is padded. A key behind a query is masked, so what fills up
             a row needs no mask. cuDNN takes packed sequences, too, if values are padded to the dims of the keys.
    others   tiles of queries against the tiles of keys that they can see, in plain XLA. Runs everywhere.

There is no derivative.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Execution
from deepseek_jax.parallel.mesh import vary
from pallas_kernels.lowering import manual_axes

TILE, TILE_ON_GPU = 128, 1024  # queries, and keys, of a tile in plain XLA


class Spans(NamedTuple):
    """Where each of B sequences lies in a packed array; the spans are in the order of the sequences."""

    start_B: jax.Array
    length_B: jax.Array


class Rows(NamedTuple):
    """The sequences of a call as rows of one length, both powers of two.

    Attributes:
        number: at least that of sequences with new tokens.
        length: at least that of the longest of them.
    """

    number: int
    length: int


class Attended(NamedTuple):
    """FP32 or BF16 outputs, and the FP32 log of the sum under the softmax."""

    out_TNH: jax.Array
    lse_TN: jax.Array


def attend(
    execution: Execution,
    q_TNQ: jax.Array,
    k_MNQ: jax.Array,
    v_MNH: jax.Array,
    queries: Spans,
    keys: Spans,
    scale: float,
    *,
    causal: bool,
    rows: Rows,
) -> Attended:
    """Return softmax(q k^T scale) v of each sequence.

    Args:
        execution: says the implementation.
        q_TNQ: packed queries; T is a power of two.
        k_MNQ: packed keys; M is a power of two. What belongs to no sequence must be a number.
        v_MNH: packed values.
        queries: the sequences' spans of the queries, without gaps, from 0 on.
        keys: their spans of the keys.
        scale: of the scores.
        causal: whether query i of a sequence sees its keys up to i, or all of them. If so, queries and keys are of the
            same tokens.
        rows: of what cuDNN takes.
    """
    if execution.attention == "cudnn" and causal:
        q, k, v, spans = manual_axes.invariant((q_TNQ, k_MNQ, v_MNH, queries))
        with manual_axes.unchecked():
            attended = _cudnn(q, k, v, spans, scale, rows)
        return jax.tree.map(lambda x: vary(x, q_TNQ), attended)
    row_T, there_T = rows_of(queries, len(q_TNQ))
    start_T = keys.start_B[row_T]
    seen_T = keys.length_B[row_T]
    if causal:
        seen_T = jnp.minimum(seen_T, jnp.arange(len(q_TNQ)) - queries.start_B[row_T] + 1)
    tile = TILE_ON_GPU if execution.attention == "cudnn" else TILE
    return _tiles(q_TNQ, k_MNQ, v_MNH, start_T, start_T + jnp.where(there_T, seen_T, 0), scale, tile)


def rows_of(spans: Spans, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Return the sequence of each token of spans without gaps, and whether it belongs to one."""
    end_B = spans.start_B + spans.length_B
    tokens = jnp.arange(num_tokens)
    row_T = jnp.searchsorted(end_B, tokens, side="right", method="compare_all")
    return jnp.minimum(row_T, len(end_B) - 1), tokens < end_B[-1]


def merge(first: Attended, second: Attended) -> Attended:
    """Return the attention over the keys of both, in FP32."""
    top_TN = jnp.maximum(first.lse_TN, second.lse_TN)
    top_TN = jnp.where(jnp.isfinite(top_TN), top_TN, 0)
    parts = [(part.out_TNH, jnp.exp(part.lse_TN - top_TN)) for part in (first, second)]
    total_TN = parts[0][1] + parts[1][1]
    sum_TNH = sum(out_TNH.astype(jnp.float32) * weight_TN[..., None] for out_TNH, weight_TN in parts)
    return Attended(sum_TNH / jnp.where(total_TN > 0, total_TN, 1)[..., None], top_TN + jnp.log(total_TN))


def _tiles(q_TNQ, k_MNQ, v_MNH, start_T, end_T, scale, tile) -> Attended:
    """Let query t attend to the keys from start_T[t] on and before end_T[t]."""
    q_NTQ, k_NMQ, v_NMH = (x.swapaxes(0, 1) for x in (q_TNQ, k_MNQ, v_MNH))
    num_queries, num_keys = len(q_TNQ), len(k_MNQ)
    rows, columns = min(tile, num_queries), min(tile, num_keys)

    def one_tile(_, first):
        q_NSQ = lax.dynamic_slice_in_dim(q_NTQ, first, rows, 1)
        start_S1, end_S1 = (lax.dynamic_slice_in_dim(x, first, rows)[:, None] for x in (start_T, end_T))

        def add(index, carry):
            top_NS, total_NS, sum_NSH = carry
            k_NKQ, v_NKH = (lax.dynamic_slice_in_dim(x, index * columns, columns, 1) for x in (k_NMQ, v_NMH))
            keys = index * columns + jnp.arange(columns)
            scores = jnp.einsum("nsq,nkq->nsk", q_NSQ, k_NKQ, preferred_element_type=jnp.float32) * scale
            scores = jnp.where((keys >= start_S1) & (keys < end_S1), scores, -jnp.inf)
            higher_NS = jnp.maximum(top_NS, scores.max(-1))
            number_NS = jnp.where(jnp.isfinite(higher_NS), higher_NS, 0)
            weights, kept_NS = jnp.exp(scores - number_NS[..., None]), jnp.exp(top_NS - number_NS)
            part_NSH = jnp.einsum(
                "nsk,nkh->nsh", weights.astype(v_NKH.dtype), v_NKH, preferred_element_type=jnp.float32
            )
            return higher_NS, total_NS * kept_NS + weights.sum(-1), sum_NSH * kept_NS[..., None] + part_NSH

        some_S1 = end_S1 > start_S1
        low = jnp.where(some_S1, start_S1, num_keys).min() // columns
        high = (jnp.where(some_S1, end_S1, 0).max() + columns - 1) // columns
        shape = q_NSQ.shape[:2]
        empty = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, v_NMH.shape[2]))
        top_NS, total_NS, sum_NSH = lax.fori_loop(low, high, add, jax.tree.map(lambda x: vary(x, q_TNQ), empty))
        out_NSH = sum_NSH / jnp.where(total_NS > 0, total_NS, 1)[..., None]
        return None, (out_NSH.swapaxes(0, 1).astype(v_MNH.dtype), (top_NS + jnp.log(total_NS)).T)

    first = vary(jnp.arange(0, num_queries, rows), q_TNQ)
    if num_queries == rows:
        return Attended(*one_tile(None, 0)[1])
    out, lse = lax.scan(one_tile, None, first)[1]
    return Attended(out.reshape(num_queries, *out.shape[2:]), lse.reshape(num_queries, -1))


def _cudnn(q_TNQ, k_TNQ, v_TNH, spans: Spans, scale: float, rows: Rows) -> Attended:
    """Let each sequence attend to itself, in a row of its own; sequences without tokens have none.

    A sequence that is alone is its row as it lies. What fills it up then attends to what is before it, for nobody.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    attend: Any = functools.partial(dot_product_attention, scale=scale, mask_type=MaskType.CAUSAL, return_residual=True)
    num_tokens = len(q_TNQ)
    if rows == Rows(1, num_tokens):
        out_RSNH, lse_RNS = attend(q_TNQ[None], k_TNQ[None], v_TNH[None])
        return Attended(out_RSNH[0], lse_RNS[0].T)
    there_B = spans.length_B > 0
    row_R = jnp.nonzero(there_B, size=rows.number, fill_value=0)[0]
    token_RS = jnp.minimum(spans.start_B[row_R][:, None] + jnp.arange(rows.length), num_tokens - 1)
    q, k, v = (x[token_RS] for x in (q_TNQ, k_TNQ, v_TNH))
    out_RSNH, lse_RNS = attend(q, k, v)
    row_T, there_T = rows_of(spans, num_tokens)
    place_T = jnp.clip(jnp.arange(num_tokens) - spans.start_B[row_T], 0, rows.length - 1)
    rank_T = (jnp.cumsum(there_B) - 1)[row_T]
    out_TNH = jnp.where(there_T[:, None, None], out_RSNH[rank_T, place_T], 0)
    return Attended(out_TNH, jnp.where(there_T[:, None], lse_RNS[rank_T, :, place_T], -jnp.inf))
