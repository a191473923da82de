"""The whole network behind three functions: `init`, `apply` (training, evaluation) and `decode_step` (over a cache).

    params       embed_VD, head_DV, final_norm_D, dense_layers {attention, ffn}, moe_layers {attention, moe},
                 mtp_layers {..., block {attention, moe}}
    router_bias  moe_layers {moe {bias_E}}, mtp_layers {block {moe {bias_E}}}

`apply` and `decode_step` work on the arrays of one device, inside a program's shard_map. The head is not here: a loss
makes logits in chunks (`model.head`), decoding makes those of one position.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.attention import Attend, absorbed, expanded
from deepseek_jax.model.layer import DenseLayer, Gather, MoELayer, Tree, make_stack, merge, run_layers
from deepseek_jax.model.layers import gain, matrix, rms_norm
from deepseek_jax.model.moe import Observer, unobserved
from deepseek_jax.model.mtp import MtpLayer
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.model.recompute import recomputed
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.parameters import Weights


class Inputs(NamedTuple):
    """What the network reads: this device's rows.

    Attributes:
        tokens_BS: int32 ids.
        positions_BS: int32, from 0 at the start of a document or of a row.
        valid_BS: False on padding, which reaches no routed expert and is counted nowhere.
        segment_ids_BS: attention stays within a segment; None: attention is causal over the whole row.
        next_BS: the token that follows each position, which MTP layers embed; None: MTP layers do not run.
    """

    tokens_BS: jax.Array
    positions_BS: jax.Array
    valid_BS: jax.Array
    segment_ids_BS: jax.Array | None = None
    next_BS: jax.Array | None = None


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
) -> Output:
    """Run the network over this device's rows.

    Args:
        model: shape and mathematics.
        execution: resolved (`parallel.program.resolve`).
        weights: as `init` makes them, local to this device.
        inputs: rows.
        gather: makes a layer's split weights whole and casts them; the identity if they are whole and cast already.
        observe: what to report of each router (`model.moe`).
    """
    top = gather({name: weights.params[name] for name in ("embed_VD", "final_norm_D")})
    attend = expanded(execution, rotary_table(model, inputs.positions_BS), inputs.segment_ids_BS)
    x_BSD = embed(execution, top["embed_VD"], inputs.tokens_BS)
    x_BSD, _, observed = run_layers(model, execution, weights, x_BSD, attend, {}, inputs.valid_BS, gather, observe)
    hidden_BSD = rms_norm(x_BSD, top["final_norm_D"], model.norm_eps)
    mtp_hidden, state_BSD = [], hidden_BSD
    for depth in range(model.num_mtp_layers if inputs.next_BS is not None else 0):
        layer = jax.tree.map(lambda a, i=depth: a[i], (weights.params["mtp_layers"], weights.router_bias["mtp_layers"]))
        embedded_BSD = embed(execution, top["embed_VD"], _shifted(inputs.next_BS, depth))
        run = functools.partial(_mtp_depth, model, execution, attend, gather, observe)
        state_BSD, mtp_observed = recomputed(execution, run, scanned=False)(
            layer, embedded_BSD, state_BSD, inputs.valid_BS
        )
        mtp_hidden.append(state_BSD)
        observed.append(jax.tree.map(lambda a: a[None], mtp_observed))
    whole = jax.tree.map(lambda *a: jnp.concatenate(a), *observed) if observed else None
    return Output(hidden_BSD, tuple(mtp_hidden), whole)


def decode_step(
    model: Model,
    execution: Execution,
    weights: Weights,
    cache: Tree,
    tokens_BS: jax.Array,
    positions_BS: jax.Array,
    valid_BS: jax.Array,
) -> tuple[jax.Array, Tree]:
    """Run new tokens through the absorbed form over the latent cache.

    Args:
        model: shape and mathematics.
        execution: resolved.
        weights: as decoding reads them (`inference.weights.decode_weights`).
        cache: a stack of caches for each stack of layers, "dense_layers" and "moe_layers" (`model.attention.Cache`).
        tokens_BS: new tokens; S is 1, or the length of a piece of the prompt.
        positions_BS: their positions, which are also their slots in the cache.
        valid_BS: False where there is no token: it reaches no routed expert, and its output means nothing.

    Returns:
        hidden_BSD after the final norm, and the cache with the new tokens written.
    """
    attend = absorbed(rotary_table(model, positions_BS), positions_BS)
    x_BSD = embed(execution, weights.params["embed_VD"], tokens_BS)
    x_BSD, cache, _ = run_layers(model, execution, weights, x_BSD, attend, cache, valid_BS)
    return rms_norm(x_BSD, weights.params["final_norm_D"], model.norm_eps), cache


@jax.named_scope("embedding")
def embed(execution: Execution, embed_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Return the embeddings of tokens in the dtype of the activations."""
    return embed_VD[tokens_BS].astype(compute_dtype(execution))


def _shifted(next_BS: jax.Array, steps: int) -> jax.Array:
    """Shift tokens left by `steps`. Token 0 fills the freed positions; predictions made there carry no loss."""
    return jnp.pad(next_BS[:, steps:], ((0, 0), (0, steps)))


def _mtp_depth(
    model: Model,
    execution: Execution,
    attend: Attend,
    gather: Gather,
    observe: Observer,
    layer: tuple[Tree, Tree],
    embedded_BSD: jax.Array,
    state_BSD: jax.Array,
    valid_BS: jax.Array,
) -> tuple[jax.Array, Any]:
    """Run one depth of multi-token prediction; return its state after its final norm, and what was observed."""
    params, bias = layer
    mtp = merge(MtpLayer, model, gather(params), bias)
    x_BSD = mtp.merge(embedded_BSD, state_BSD)
    x_BSD, _, observed = mtp.block(execution, x_BSD, attend, None, valid_BS, observe)
    return mtp.final(x_BSD), observed
