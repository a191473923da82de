"""The whole network: `init`, `apply` (training, evaluation), and over a cache `prefill_step` and `decode_step`.

    params       embed_VD, head_DV, final_norm_D, dense_layers {attention, ffn}, moe_layers {attention, moe},
                 mtp_layers {..., block {attention, moe}}
    router_bias  moe_layers {moe {bias_E}}, mtp_layers {block {moe {bias_E}}}

All but `init` work on the arrays of one device, inside a program's shard_map. The head is not here: a loss
makes logits in chunks (`model.head`), decoding makes those of one position.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import absorbed, places_of
from deepseek_jax.model.attention import expanded
from deepseek_jax.model.decode_layers import has_kernels, run_decode_layers
from deepseek_jax.model.layer import (
    DenseLayer,
    Gather,
    MoELayer,
    Part,
    Streams,
    Tree,
    make_stack,
    run_cached_layers,
    run_layers,
)
from deepseek_jax.model.layers import gain, matrix, rms_norm
from deepseek_jax.model.moe import Observer, chosen_experts, unobserved
from deepseek_jax.model.mtp import MtpLayer, run_depth
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.prefill import Sequences, expanded_over_pages
from deepseek_jax.model.recompute import recomputed
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.model.router import Replay, replaying
from deepseek_jax.parameters import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the network reads: this device's tokens, of whole rows or of rows that devices share (`parallel.context`).

    Attributes:
        tokens_BS: int32 ids.
        positions_BS: int32, from 0 at the start of a document or of a row.
        valid_BS: False on padding, which reaches no routed expert and is counted nowhere.
        segment_ids_BM: of whole rows; attention stays within a segment. None: it is causal over the whole row.
        following: for each MTP depth k the token k + 1 places behind each position [B, S], which it embeds (`shifted`
            of whole rows); empty: MTP layers do not run.
        detached: whether what MTP layers read of the main model is constant for them: its states and its embedding.
        replay: routes that the MoE layers take in the place of their routers'; MTP layers choose for themselves.
    """

    tokens_BS: jax.Array
    positions_BS: jax.Array
    valid_BS: jax.Array
    segment_ids_BM: jax.Array | None = None
    following: tuple[jax.Array, ...] = ()
    detached: bool = dataclasses.field(default=False, metadata={"static": True})
    replay: Replay | None = None


class Output(NamedTuple):
    """What an objective needs of this device's rows.

    Attributes:
        hidden_BSD: after the final norm, the input of the head.
        mtp_hidden: one per depth, after its own final norm.
        observed: what `observe` reports of each router; leading dim: MoE layers, then MTP layers. None if there are no
            routers, or nothing is reported.
    """

    hidden_BSD: jax.Array
    mtp_hidden: tuple[jax.Array, ...]
    observed: Any


def init(model: Model, key: jax.Array) -> Weights:
    """Make FP32 parameters and zero router biases; under `jax.set_mesh`, each in its layout (`parameters`)."""
    rngs = nnx.Rngs(params=key)
    params = {
        "embed_VD": matrix(rngs, "embed_VD", (model.vocab_size, model.width), model.init_std)[...],
        "head_DV": matrix(rngs, "head_DV", (model.width, model.vocab_size), model.init_std)[...],
        "final_norm_D": gain(model.width)[...],
    }
    router_bias = {}
    stacks = (
        ("dense_layers", DenseLayer, model.num_dense_layers),
        ("moe_layers", MoELayer, model.num_moe_layers),
        ("mtp_layers", MtpLayer, model.num_mtp_layers),
    )
    for name, kind, count in stacks:
        if count:
            params[name], bias = make_stack(kind, model, rngs, count)
            router_bias |= {name: bias} if bias else {}
    return Weights(params, router_bias)


def apply(
    model: Model,
    execution: Execution,
    weights: Weights,
    inputs: Inputs,
    gather: Gather = lambda tree: tree,
    observe: Observer = unobserved,
    num_parts: int = 1,
) -> Output:
    """Run the network over this device's rows.

    Args:
        model: shape and mathematics.
        execution: resolved (`parallel.program.resolve`).
        weights: as `init` makes them, local to this device.
        inputs: rows.
        gather: makes a layer's split weights whole and casts them; the identity if they are whole and cast already.
        observe: what to report of each router (`model.moe`).
        num_parts: into so many parts the rows are cut, which pass the layers side by side (`model.layer`).
    """
    weights = weights._replace(router_bias=replaying(weights.router_bias, inputs.replay, num_parts))
    top = gather({name: weights.params[name] for name in ("embed_VD", "final_norm_D")})
    cut = _cut(inputs, num_parts)
    parts = [
        Part(expanded(execution, rotary_table(model, part.positions_BS), part.segment_ids_BM), part.valid_BS)
        for part in cut
    ]
    streams = tuple(embed(execution, top["embed_VD"], part.tokens_BS) for part in cut)
    streams, observed = run_layers(model, execution, weights, streams, parts, gather, observe)
    return finish(model, execution, weights, top, parts, cut, streams, observed, gather, observe)


def finish(
    model: Model,
    execution: Execution,
    weights: Weights,
    top: Tree,
    parts: list[Part],
    cut: list[Inputs],
    streams: Streams,
    observed: list[Any],
    gather: Gather,
    observe: Observer,
) -> Output:
    """Run what follows the last layer: the final norm, and MTP layers.

    Args:
        model, execution, weights, gather, observe: as of `apply`; "mtp_layers" may be a list of layers.
        top: final_norm_D, and for MTP layers embed_VD; gathered.
        parts: how each part passes a layer.
        cut: what each part reads.
        streams: the residual stream of each part after the last layer.
        observed: reports of the layers' routers (`run_layers`).
    """
    states = tuple(rms_norm(x_BSD, top["final_norm_D"], model.norm_eps) for x_BSD in streams)
    hidden = [jnp.concatenate(states)]
    read = lax.stop_gradient if cut[0].detached else lambda main: main
    states = read(states)
    for depth in range(len(cut[0].following)):
        layer = _nth(weights.params["mtp_layers"], depth), _nth(weights.router_bias["mtp_layers"], depth)
        embedded = tuple(embed(execution, read(top["embed_VD"]), part.following[depth]) for part in cut)
        run = functools.partial(run_depth, model, execution, parts, gather, observe)
        states, mtp_observed = recomputed(execution, run, scanned=False)(layer, embedded, states)
        hidden.append(jnp.concatenate(states))
        observed = [*observed, jax.tree.map(lambda a: a[None], mtp_observed)]
    whole = jax.tree.map(lambda *a: jnp.concatenate(a), *observed) if observed else None
    return Output(hidden[0], tuple(hidden[1:]), whole)


def _nth(layers: Any, index: int) -> Tree:
    return layers[index] if isinstance(layers, list) else jax.tree.map(lambda a: a[index], layers)


def prefill_step(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: jax.Array,
    tokens_T: jax.Array,
    sequences: Sequences,
    *,
    continues: bool,
    rows: Rows,
) -> tuple[jax.Array, jax.Array]:
    """Run new tokens of packed sequences through the expanded form, behind what the latent cache has of them.

    Args:
        model: shape and mathematics.
        execution: resolved.
        weights: as decoding reads them (`inference.weights.decode_weights`).
        pages: the cache of all layers [L, pages, 64, C + R] (`model.absorbed`).
        tokens_T: packed new tokens.
        sequences: where they lie.
        continues: whether any sequence has a prefix in the cache.
        rows: that the new tokens of the sequences fill (`model.packed`).

    Returns:
        hidden_TD after the final norm, which means nothing where there is no token, and the pages with the new tokens.
    """
    options = {"continues": continues, "rows": rows}
    return _prefill_step(unobserved, model, execution, weights, pages, tokens_T, sequences, **options)[:2]


def routed_prefill_step(model: Model, *arrays: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do as `prefill_step`, of which all arguments are; return also the experts of each token [T, MoE layers, K]."""
    hidden_TD, pages, routes = _prefill_step(chosen_experts, model, *arrays, **options)
    return hidden_TD, pages, _routes(model, routes, (1, len(hidden_TD)))[0]


def _prefill_step(observe, model, execution, weights, pages, tokens_T, sequences, *, continues, rows):
    attend = expanded_over_pages(model, execution, sequences, continues=continues, rows=rows)
    part = Part(attend, sequences.valid_T[None])
    x_1TD = embed(execution, weights.params["embed_VD"], tokens_T[None])
    x_1TD, pages, observed = run_cached_layers(model, execution, weights, x_1TD, part, pages, observe)
    return rms_norm(x_1TD[0], weights.params["final_norm_D"], model.norm_eps), pages, observed


def decode_step(
    model: Model,
    execution: Execution,
    weights: Weights,
    pages: jax.Array,
    tables_BJ: jax.Array,
    tokens_BS: jax.Array,
    positions_BS: jax.Array,
    valid_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run a few new tokens of each sequence through the absorbed form over the latent cache.

    Args:
        model: shape and mathematics.
        execution: resolved.
        weights: as decoding reads them (`inference.weights.decode_weights`).
        pages: the cache of all layers [L, pages, 64, C + R] (`model.absorbed`).
        tables_BJ: int32, numbers of each sequence's pages in order.
        tokens_BS: new tokens; S is at most 4: one, and what is drafted.
        positions_BS: their positions.
        valid_BS: False where there is no token: it is written nowhere, it reaches no routed expert, and its output
            means nothing. A row has its first tokens or none (`model.absorbed`).

    Returns:
        hidden_BSD after the final norm, and the pages with the new tokens written.
    """
    new = tokens_BS, positions_BS, valid_BS
    return _decode_step(unobserved, model, execution, weights, pages, tables_BJ, *new)[:2]


def routed_decode_step(model: Model, *arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do as `decode_step`, of which all arguments are; return also the experts of each token [B, S, MoE layers, K]."""
    hidden_BSD, pages, routes = _decode_step(chosen_experts, model, *arrays)
    return hidden_BSD, pages, _routes(model, routes, hidden_BSD.shape[:2])


def _decode_step(observe, model, execution, weights, pages, tables_BJ, tokens_BS, positions_BS, valid_BS):
    x_BSD = embed(execution, weights.params["embed_VD"], tokens_BS)
    if has_kernels(model, execution, weights, valid_BS, pages):
        table, places = rotary_table(model, positions_BS), places_of(model, tables_BJ, positions_BS, valid_BS)
        return run_decode_layers(model, execution, weights, x_BSD, table, places, valid_BS, pages, observe)
    part = Part(absorbed(model, tables_BJ, positions_BS, valid_BS), valid_BS)
    x_BSD, pages, observed = run_cached_layers(model, execution, weights, x_BSD, part, pages, observe)
    return rms_norm(x_BSD, weights.params["final_norm_D"], model.norm_eps), pages, observed


def _routes(model: Model, routes: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Put the experts of all layers together; a model without MoE layers has none."""
    none = jnp.zeros((*shape, 0, model.experts_per_token), jnp.uint8)
    return jnp.stack(routes, axis=2) if routes else none


@jax.named_scope("embedding")
def embed(execution: Execution, embed_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Return the embeddings of tokens in the dtype of the activations."""
    return embed_VD[tokens_BS].astype(compute_dtype(execution))


def _cut(inputs: Inputs, num_parts: int) -> list[Inputs]:
    """Cut rows into parts of the same number."""
    rows = inputs.tokens_BS.shape[0]
    if rows % num_parts:
        raise ValueError(
            f"execution.interleave = {num_parts} does not divide the {rows} rows of a device and micro-batch; use 1, or"
            " change training.micro_batch_size"
        )
    size = rows // num_parts
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], inputs) for i in range(num_parts)]


def shifted(next_BS: jax.Array, steps: int) -> jax.Array:
    """Shift the tokens of whole rows left by `steps`.

    Token 0 fills the freed positions; predictions made there carry no loss.
    """
    return jnp.pad(next_BS[:, steps:], ((0, 0), (0, steps)))
