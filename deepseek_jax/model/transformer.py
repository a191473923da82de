"""The whole network behind three functions: `init`, `apply` (training and evaluation) and `decode_step` (the latent
cache).

This is the one file that knows Flax NNX's `split` and `merge`. Everyone else sees nested dicts of arrays:

    params       embed_VD, head_DV, final_norm_D, dense_layers {attention, ffn}, moe_layers {attention, moe},
                 mtp_layers {..., block {attention, moe}}
    router_bias  moe_layers {moe {bias_E}}, mtp_layers {block {moe {bias_E}}}

Layers of one kind are stacked in a leading dim and scanned, so compile time does not grow with depth. `apply` runs
inside the step's shard_map on local arrays; `gather`, called on each layer's weights just before their use and again in
the backward pass, is what makes split weights whole.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.model.attention import Attention
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.layers import DenseFeedForward, gain, matrix, rms_norm
from deepseek_jax.model.moe import MoE, Observer, RouterBias
from deepseek_jax.model.mtp import MtpLayer
from deepseek_jax.model.recompute import keep, recomputed
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.parallel.mesh import vary

Tree = dict[str, Any]


class Output(NamedTuple):
    """What the losses need, of this device's rows."""

    hidden_BSD: jax.Array  # after the final norm: the head's input
    mtp_hidden: tuple[jax.Array, ...]  # one per depth, after its own final norm
    stats: Any  # `RouterStats`, or what else was observed; leading dim: MoE layers, then MTP layers


class DenseLayer(nnx.Module):
    """One of the first layers: attention and a dense feed-forward."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.attention = Attention(config, rngs)
        self.ffn = DenseFeedForward(model.dense_hidden, model, rngs)


class MoELayer(nnx.Module):
    """Attention and a mixture of experts."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.moe = MoE(config, rngs)

    def __call__(
        self, x_BSD: jax.Array, table: tuple[jax.Array, jax.Array], segment_ids_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, Any]:
        """Map the residual stream [B, S, D] to the next one; causal within segments, segment 0 is padding."""
        x_BSD = keep(x_BSD + self.attention(x_BSD, table, segment_ids_BS), "middle")
        y_BSD, observed = self.moe(x_BSD, segment_ids_BS > 0, observe)
        return x_BSD + y_BSD, observed


def _mtp_layer(config: Config, rngs: nnx.Rngs) -> MtpLayer:
    return MtpLayer(config, MoELayer, rngs)


def init(config: Config, key: jax.Array) -> tuple[Tree, Tree]:
    """Make FP32 parameters and zero router biases; under `jax.set_mesh`, in the layout of `parameters.PARAMETERS`."""
    model = config.model
    rngs = nnx.Rngs(params=key)
    params = {
        "embed_VD": matrix(rngs, "embed_VD", (model.vocab_size, model.width), model.init_std)[...],
        "head_DV": matrix(rngs, "head_DV", (model.width, model.vocab_size), model.init_std)[...],
        "final_norm_D": gain(model.width)[...],
    }
    router_bias = {}
    for name, make, count in _stacks(config):
        if count:
            _, weights, bias = nnx.split(
                jax.vmap(functools.partial(make, config))(rngs.split(count)), nnx.Param, RouterBias
            )
            params[name] = nnx.to_pure_dict(weights)
            router_bias |= {name: nnx.to_pure_dict(bias)} if bias else {}
    return params, router_bias


def apply(
    config: Config,
    params: Tree,
    router_bias: Tree,
    batch: Tree,
    gather: Callable[[Tree], Tree] = lambda tree: tree,
    observe: Observer = router_stats,
) -> Output:
    """Run the network over this device's rows.

    Args:
        config: resolved (see `config.resolve`).
        params: parameters as `init` makes them, local to this device.
        router_bias: selection biases.
        batch: `tokens_BS`, `targets_BS`, `positions_BS`, `segment_ids_BS` (0 is padding).
        gather: makes a layer's split weights whole and casts them; identity where they are already.
        observe: what to report of each MoE layer (see `moe.MoE`); by default what balancing needs.
    """
    top = gather({name: params[name] for name in ("embed_VD", "final_norm_D")})
    table = rotary_table(config.model, batch["positions_BS"])
    segments = batch["segment_ids_BS"]
    embed = functools.partial(_embed, config, top["embed_VD"])

    def dense_layer(x_BSD, weights):
        layer = _merge(DenseLayer, config, gather(weights), {})
        x_BSD = keep(x_BSD + layer.attention(x_BSD, table, segments), "middle")
        return x_BSD + layer.ffn(x_BSD), None

    def moe_layer(x_BSD, weights_and_bias):
        weights, bias = weights_and_bias
        return _merge(MoELayer, config, gather(weights), bias)(x_BSD, table, segments, observe)

    x_BSD = embed(batch["tokens_BS"])
    stats = []
    if "dense_layers" in params:
        x_BSD, _ = _scan(config, dense_layer, x_BSD, params["dense_layers"])
    if "moe_layers" in params:
        x_BSD, moe_stats = _scan(config, moe_layer, x_BSD, (params["moe_layers"], router_bias["moe_layers"]))
        stats.append(moe_stats)
    hidden_BSD = rms_norm(x_BSD, top["final_norm_D"], config.model.norm_eps)
    mtp_hidden, state_BSD = [], hidden_BSD
    for depth in range(config.model.num_mtp_layers):
        weights, bias = jax.tree.map(lambda a, i=depth: a[i], (params["mtp_layers"], router_bias["mtp_layers"]))
        embedded_BSD = embed(_ahead(batch["targets_BS"], depth))
        state_BSD, mtp_stats = recomputed(
            config, functools.partial(_mtp_depth, config, gather, observe), scanned=False
        )(state_BSD, embedded_BSD, weights, bias, table, segments)
        mtp_hidden.append(state_BSD)
        stats.append(jax.tree.map(lambda a: a[None], mtp_stats))
    return Output(hidden_BSD, tuple(mtp_hidden), jax.tree.map(lambda *a: jnp.concatenate(a), *stats) if stats else None)


def decode_step(
    config: Config, params: Tree, router_bias: Tree, cache: Tree, tokens_BS: jax.Array, positions_BS: jax.Array
) -> tuple[jax.Array, Tree]:
    """Run new tokens through the absorbed form over the latent cache.

    Args:
        config: resolved; the exchange must be "local".
        params: whole weights in the compute dtype.
        router_bias: selection biases.
        cache: `{"dense_layers" | "moe_layers": {"latent": [L, B, M, C], "rotary": [L, B, M, R]}}`.
        tokens_BS: new tokens; S may be 1 or a whole prompt.
        positions_BS: their positions, which are also their slots in the cache.

    Returns:
        hidden_BSD after the final norm, and the cache with the new tokens written.
    """
    table = rotary_table(config.model, positions_BS)
    valid_BS = jnp.ones_like(tokens_BS, dtype=bool)

    def dense_layer(x_BSD, inputs):
        weights, layer_cache = inputs
        layer = _merge(DenseLayer, config, weights, {})
        y_BSD, layer_cache = layer.attention.absorbed(x_BSD, table, layer_cache, positions_BS)
        x_BSD += y_BSD
        return x_BSD + layer.ffn(x_BSD), layer_cache

    def moe_layer(x_BSD, inputs):
        weights, bias, layer_cache = inputs
        layer = _merge(MoELayer, config, weights, bias)
        y_BSD, layer_cache = layer.attention.absorbed(x_BSD, table, layer_cache, positions_BS)
        x_BSD += y_BSD
        return x_BSD + layer.moe(x_BSD, valid_BS)[0], layer_cache

    x_BSD, cache = _embed(config, params["embed_VD"], tokens_BS), dict(cache)
    if "dense_layers" in params:
        x_BSD, cache["dense_layers"] = lax.scan(dense_layer, x_BSD, (params["dense_layers"], cache["dense_layers"]))
    if "moe_layers" in params:
        stacked = (params["moe_layers"], router_bias["moe_layers"], cache["moe_layers"])
        x_BSD, cache["moe_layers"] = lax.scan(moe_layer, x_BSD, stacked)
    return rms_norm(x_BSD, params["final_norm_D"], config.model.norm_eps), cache


def compute_dtype(config: Config) -> jnp.dtype:
    """The dtype of activations, and of weights where they are multiplied and not in FP8."""
    return jnp.dtype(jnp.float32 if config.execution.precision == "fp32" else jnp.bfloat16)


def _stacks(config: Config):
    model = config.model
    yield "dense_layers", DenseLayer, model.num_dense_layers
    yield "moe_layers", MoELayer, model.num_moe_layers
    yield "mtp_layers", _mtp_layer, model.num_mtp_layers


@functools.cache
def _graphdef(make: Callable, config: Config):
    layer = jax.eval_shape(lambda key: make(config, nnx.Rngs(params=key)), jax.eval_shape(lambda: jax.random.key(0)))
    return nnx.split(layer, nnx.Param, RouterBias)[0]


def _merge(make: Callable, config: Config, weights: Tree, bias: Tree) -> Any:
    return nnx.merge(_graphdef(make, config), weights, bias)


@jax.named_scope("embedding")
def _embed(config: Config, embed_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    return embed_VD[tokens_BS].astype(compute_dtype(config))


def _ahead(targets_BS: jax.Array, steps: int) -> jax.Array:
    """Targets shifted left by `steps`: t_{i + 1 + steps}. The freed places hold token 0 and carry no loss."""
    return jnp.pad(targets_BS[:, steps:], ((0, 0), (0, steps)))


def _mtp_depth(config, gather, observe, state_BSD, embedded_BSD, weights, bias, table, segments):
    layer = _merge(_mtp_layer, config, gather(weights), bias)
    x_BSD, observed = layer.block(layer.merge(embedded_BSD, state_BSD), table, segments, observe)
    return layer.final(x_BSD), observed


def _scan(config: Config, body: Callable, x_BSD: jax.Array, layers: Any):
    num = len(jax.tree.leaves(layers)[0])
    scanned = config.execution.scan_unroll < num
    body = recomputed(config, body, scanned)
    if scanned:
        return lax.scan(body, x_BSD, layers, unroll=config.execution.scan_unroll)
    outputs = []  # unrolled altogether, nothing that the backward pass needs is stacked and cut apart again
    for layer in _unstack(layers):
        x_BSD, out = body(x_BSD, layer)
        outputs.append(out)
    return x_BSD, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


@jax.custom_vjp
def _unstack(layers: Any) -> list[Any]:
    """The layers one by one.

    Their gradients are put into one array one after the other, each in its place, where XLA lets kernels write them.
    Those of indices are a sum of arrays, zero but for one layer each. A concatenation XLA moves into the optimizer's
    pass over all parameters, and makes two passes of it; behind a barrier it copies at half the memory's rate (21 ms of
    a step).
    """
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(len(jax.tree.leaves(layers)[0]))]


def _stack(_, grads):
    def one(*parts):
        whole = vary(jnp.zeros((len(parts), *parts[0].shape), parts[0].dtype), parts[0])
        for i, part in enumerate(parts):
            whole = lax.dynamic_update_index_in_dim(whole, part, i, 0)
        return whole

    return (jax.tree.map(one, *grads),)


_unstack.defvjp(lambda layers: (_unstack(layers), None), _stack)
