"""The MTP layer over the latent cache: what drafts tokens in decoding (DeepSeek-V3 section 5.4.3).

At position i the layer combines the main model's state h_i, after its final norm, with the embedding of token i + 1,
and predicts token i + 2 (`model.mtp`). It attends to its own entries, which are one layer more of the same pages,
behind those of the main model: same tables, same positions. An entry needs the token that follows, so it is written
after that token is chosen:

    main model   positions 0 1 2    t0 t1 t2 -> logits, from which t3 is chosen
    MTP layer    positions 0 1 2    (h0, t1) (h1, t2) (h2, t3) -> its state at 2, whose logits are a draft of t4
    recursion    position  3        (state at 2, t4) -> a draft of t5, and so on: an entry that is written again when
                                    h3 is known

The released model has one layer, and its output stands in for h in the recursion, as in vLLM and SGLang: both are
states before the head that predict the next token. Models with more depths are drafted with the first alone. The entry
of depth k at position i embeds token i + k, so with k depths the entries of k tokens would have to be made again after
every step.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import LayerPages, absorbed, places_of
from deepseek_jax.model.decode_layers import has_kernels, run_mtp_layer
from deepseek_jax.model.layer import Part, cached_execution, merge_cached, run_layer
from deepseek_jax.model.moe import unobserved
from deepseek_jax.model.mtp import MtpLayer
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences, expanded_over_pages
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.model.transformer import embed
from deepseek_jax.parameters import Weights


def draft_prefill_step(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: jax.Array,
    next_T: jax.Array,
    hidden_TD: jax.Array,
    sequences: Sequences,
    *,
    continues: bool,
    rows: Rows,
) -> tuple[jax.Array, jax.Array]:
    """Run the MTP layer over the tokens of a prefill, after `transformer.prefill_step`.

    Args:
        model: shape and mathematics.
        execution: resolved.
        weights: as `inference.weights.decode_weights` makes them with `drafts`.
        pages: [L + 1, pages, 64, C + R].
        next_T: the token behind each packed one.
        hidden_TD: of the main model, after its final norm.
        sequences: where the tokens lie.
        continues: whether any sequence has a prefix in the cache.
        rows: that the tokens fill (`model.packed`).

    Returns:
        the layer's states [T, D] after its final norm, and the pages with its entries.
    """
    attend = expanded_over_pages(model, execution, sequences, continues=continues, rows=rows)
    part = Part(attend, sequences.valid_T[None])
    states_1TD, pages = _run(model, execution, weights, pages, next_T[None], hidden_TD[None], part)
    return states_1TD[0], pages


def draft_step(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: jax.Array,
    tables_BJ: jax.Array,
    next_BS: jax.Array,
    hidden_BSD: jax.Array,
    positions_BS: jax.Array,
    valid_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run the MTP layer over a few positions of each sequence.

    Args:
        model: shape and mathematics.
        execution: resolved.
        weights: as `inference.weights.decode_weights` makes them with `drafts`.
        pages: [L + 1, pages, 64, C + R].
        tables_BJ: int32, numbers of each sequence's pages in order.
        next_BS: the token behind each position; S is at most 4.
        hidden_BSD: of the main model after its final norm, or in its place the state that this function returned for
            the position before.
        positions_BS: of the states.
        valid_BS: as in `transformer.decode_step`.

    Returns:
        the layer's states [B, S, D] after its final norm, and the pages with its entries.
    """
    if has_kernels(model, execution, weights, valid_BS, pages):
        table, places = rotary_table(model, positions_BS), places_of(model, tables_BJ, positions_BS, valid_BS)
        embedded_BSD = embed(execution, weights.params["embed_VD"], next_BS)
        with jax.named_scope("draft"):
            new = table, places, valid_BS, pages
            return run_mtp_layer(model, execution, weights, embedded_BSD, hidden_BSD, *new)
    part = Part(absorbed(model, tables_BJ, positions_BS, valid_BS), valid_BS)
    return _run(model, execution, weights, pages, next_BS, hidden_BSD, part)


def _run(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: jax.Array,
    next_BS: jax.Array,
    hidden_BSD: jax.Array,
    part: Part,
) -> tuple[jax.Array, jax.Array]:
    params, bias = weights.params["mtp_layers"][0], weights.router_bias["mtp_layers"][0]
    embedded_BSD = embed(execution, weights.params["embed_VD"], next_BS)
    few = cached_execution(execution, part.valid_BS)

    @jax.jit
    def run(params, bias, embedded_BSD, hidden_BSD, cache):
        mtp = merge_cached(MtpLayer, model, params, bias)
        streams = (mtp.merge(embedded_BSD, hidden_BSD),)
        (x_BSD,), cache, _ = run_layer(mtp.block, few, streams, [part], cache, unobserved)
        return mtp.final(x_BSD), cache.pages

    with jax.named_scope("draft"):
        return run(params, bias, embedded_BSD, hidden_BSD, LayerPages(pages, jnp.int32(model.num_layers)))
