"""One layer, and the loop over layers.

A layer is attention and a feed-forward, each added to the residual stream. Its two kinds differ only in the
feed-forward. How a layer attends is a value that its caller passes (`model.attention`): expanded over the whole
sequence in training, absorbed over a cache in decoding. So training, decoding, a pipeline stage and an MTP layer share
this code:

    training          run_layers(all layers,      [Part(expanded)])
    overlapped        run_layers(all layers,      [Part(expanded), Part(expanded)])
    pipeline stage    run_layers(layers 8 to 15,  [Part(expanded)])
    decoding          run_cached_layers(all layers, Part(absorbed), pages)

Parts are rows that share nothing but the weights (section 3.2.1: the report overlaps two micro-batches). They pass each
layer side by side, so that the compiler can let one part attend while the rows of the other are on the wire.

This is the one file that calls Flax NNX's `split` and `merge`; all others see nested dicts of arrays. Layers of one
kind are stacked in a leading dim and scanned, so compile time does not grow with depth. Decoding reads each weight once
per token, so there its layers are not stacked: a scan would copy every weight out of its stack before its product.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.adapters import has_adapters
from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import LayerPages
from deepseek_jax.model.attention import Attend, Attention
from deepseek_jax.model.layers import DenseFeedForward
from deepseek_jax.model.moe import FEW_OF_PROMPTS, FEW_TOKENS, IN_BLOCKS, MoE, Observer, RouterBias, unobserved
from deepseek_jax.model.recompute import keep, layer_input, recomputed
from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parameters import TurnedFp8Weight, Weights
from pallas_kernels import dispatch
from pallas_kernels.mla_decode import MOST_QUERIES

Tree = dict[str, Any]
Gather = Callable[[Tree], Tree]
Streams = tuple[jax.Array, ...]  # the residual stream [B, S, D] of each part


class Part(NamedTuple):
    """Rows that pass the layers together.

    Attributes:
        attend: how a layer attends to them.
        valid_BS: False on padding, which reaches no routed expert.
    """

    attend: Attend
    valid_BS: jax.Array


class Layer(nnx.Module):
    """Attention and a feed-forward; each kind defines its own `feed`."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        self.attention = Attention(model, rngs)

    def __call__(
        self, execution: Execution, x_BSD: jax.Array, attend: Attend, cache: Any, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, Any, Any]:
        """Return the residual stream [B, S, D] after the layer, the layer's cache, and what was observed.

        A layer with a cache is not differentiated, so it keeps nothing for a backward pass.
        """
        differentiated = cache is None
        y_BSD, cache = attend(self.attention, x_BSD, cache)
        x_BSD = keep(x_BSD + y_BSD, "middle") if differentiated else x_BSD + y_BSD
        y_BSD, observed = self.feed(execution, x_BSD, valid_BS, observe)
        return x_BSD + y_BSD, cache, observed


class DenseLayer(Layer):
    """One of the first layers: a dense feed-forward."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.ffn = DenseFeedForward(model.dense_hidden, model, rngs)

    def feed(
        self, execution: Execution, x_BSD: jax.Array, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, None]:
        """Return the feed-forward's output, and None: there is no router to observe."""
        return self.ffn(x_BSD), None

    def feed_normed(
        self, execution: Execution, h_BSD: jax.Array, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, None]:
        """Do as `feed`, behind its norm."""
        return self.ffn.normed(h_BSD), None


class MoELayer(Layer):
    """A mixture of experts."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.moe = MoE(model, rngs)

    def feed(
        self, execution: Execution, x_BSD: jax.Array, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, Any]:
        """Return the mixture's output, and what `observe` reports of its router."""
        return self.moe(execution, x_BSD, valid_BS, observe)

    def feed_normed(
        self, execution: Execution, h_BSD: jax.Array, valid_BS: jax.Array, observe: Observer
    ) -> tuple[jax.Array, Any]:
        """Do as `feed`, behind its norm."""
        return self.moe.normed(execution, h_BSD, valid_BS, observe)


STACKS = (("dense_layers", DenseLayer), ("moe_layers", MoELayer))  # in the order of the layers


def run_layers(
    model: Model,
    execution: Execution,
    weights: Weights,
    streams: Streams,
    parts: Sequence[Part],
    gather: Gather = lambda tree: tree,
    observe: Observer = unobserved,
) -> tuple[Streams, list[Any]]:
    """Run the residual stream through the layers that `weights` has: all of a model, or those of a pipeline stage.

    Args:
        model: shape of the layers.
        execution: resolved (`parallel.program.resolve`).
        weights: stacks "dense_layers" and "moe_layers"; either may be absent, and other parameters are ignored. Instead
            of stacks they may be lists of layers, which are not scanned.
        streams: each part's residual stream [B, S, D] before the first of these layers.
        parts: as many.
        gather: makes a layer's split weights whole and casts them; called just before their use, and again where the
            backward pass recomputes the layer, unless `execution.gather` = "kept".
        observe: what to report of each router (`model.moe`).

    Returns:
        the residual streams, and the reports of `observe`: one tree [layers, ...] per stack with routers, or an empty
        list if it reports nothing.
    """
    observations = []

    def body(kind, streams, layer):
        params, bias = layer
        whole = merge(kind, model, gather(params), bias)
        streams, _, observed = run_layer(whole, execution, streams, parts, None, observe)
        return streams, observed

    for name, kind in STACKS:
        if name not in weights.params:
            continue
        stack: Any = weights.params[name], weights.router_bias.get(name, {})
        if isinstance(stack[0], list):
            stack = list(zip(stack[0], stack[1] or [{}] * len(stack[0]), strict=True))
        streams, observed = _scan(execution, functools.partial(body, kind), streams, stack)
        if observed is not None:
            observations.append(observed)
    return streams, observations


def run_cached_layers(
    model: Model,
    execution: Execution,
    weights: Weights,
    x_BSD: jax.Array,
    part: Part,
    pages: jax.Array,
    observe: Observer = unobserved,
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Run the residual stream of new tokens through layers with a cache.

    The layers of a kind are one jitted function, which is traced and lowered once.

    Args:
        model, execution: as of `run_layers`.
        weights: lists of layers "dense_layers" and "moe_layers", in the form of `merge_cached`; either may be absent.
        x_BSD: before the first layer.
        part: how a layer attends (`model.absorbed`), and which tokens are there.
        pages: the cache [L, pages, 64, C + R] of all these layers in order.
        observe: what to report of each router (`model.moe`).

    Returns:
        the residual stream and the pages after the last layer, and what `observe` reports of each layer with a router.
    """
    few = cached_execution(execution, part.valid_BS)  # its kernels for experts know no adapters

    @functools.partial(jax.jit, static_argnums=0)
    def run(kind, params, bias, x_BSD, cache):
        layer = merge_cached(kind, model, params, bias)
        chosen = execution if has_adapters(params.get("moe", {})) else few
        (x_BSD,), cache, observed = run_layer(layer, chosen, (x_BSD,), [part], cache, observe)
        return x_BSD, cache.pages, observed

    number, observations = 0, []
    for name, kind in STACKS:
        layers, biases = weights.params.get(name, []), weights.router_bias.get(name)
        for i, params in enumerate(layers):
            cache = LayerPages(pages, jnp.int32(number))
            x_BSD, pages, observed = run(kind, params, biases[i] if biases else {}, x_BSD, cache)
            observations += [observed] if observed is not None else []
            number += 1
    return x_BSD, pages, observations


def cached_execution(execution: Execution, valid_BS: jax.Array) -> Execution:
    """Return the execution of a call over a cache: few tokens have kernels for experts, those of prompts on Hopper."""
    most = FEW_TOKENS
    if valid_BS.shape[1] > MOST_QUERIES:
        most = FEW_OF_PROMPTS[execution.precision] if dispatch.on_hopper() and execution.experts == "grouped" else 0
    few = execution.exchange == "local" and execution.experts != IN_BLOCKS and valid_BS.size <= most
    return dataclasses.replace(execution, experts="few") if few else execution


def merge_cached(kind: type[nnx.Module], model: Model, params: Tree, bias: Tree) -> Any:
    """Return a layer with weights in the form that decoding reads; its shared expert may lie behind the routed ones."""
    params = jax.tree.map(_restored, params, is_leaf=lambda leaf: isinstance(leaf, TurnedFp8Weight))
    moe = params.get("block", params).get("moe")
    inside = moe is not None and "shared" not in moe
    return merge(kind, dataclasses.replace(model, num_shared_experts=0) if inside else model, params, bias)


def _restored(leaf: Any) -> Any:
    return leaf.restored() if isinstance(leaf, TurnedFp8Weight) else leaf


def run_layer(
    layer: Layer, execution: Execution, streams: Streams, parts: Sequence[Part], cache: Any, observe: Observer
) -> tuple[Streams, Any, Any]:
    """Run each part through a layer; return their residual streams, the cache, and the sum of what was observed."""
    streams = layer_input(streams) if cache is None else streams
    outputs = [
        layer(execution, x_BSD, part.attend, cache, part.valid_BS, observe)
        for x_BSD, part in zip(streams, parts, strict=True)
    ]
    streams, (cache, *_), observed = zip(*outputs, strict=True)
    return streams, cache, jax.tree.map(lambda *reports: functools.reduce(jnp.add, reports), *observed)


def make_stack(kind: type[nnx.Module], model: Model, rngs: nnx.Rngs, count: int) -> tuple[Tree, Tree]:
    """Make `count` layers of a kind; return their parameters and their selection biases, each with a leading dim."""
    layers = jax.vmap(functools.partial(kind, model))(rngs.split(count))
    _, params, bias = nnx.split(layers, nnx.Param, RouterBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


def merge(kind: type[nnx.Module], model: Model, params: Tree, bias: Tree) -> Any:
    """Return a layer with the given parameters, which may be `Fp8Weight`s."""
    return nnx.merge(_graphdef(kind, model), params, bias)


@functools.cache
def _graphdef(kind: type[nnx.Module], model: Model):
    layer = jax.eval_shape(lambda key: kind(model, nnx.Rngs(params=key)), jax.eval_shape(lambda: jax.random.key(0)))
    return nnx.split(layer, nnx.Param, RouterBias)[0]


def _scan(execution: Execution, body: Callable, streams: Streams, layers: Any):
    is_list = isinstance(layers, list)
    num = len(layers) if is_list else len(jax.tree.leaves(layers)[0])
    scanned = not is_list and execution.scan_unroll < num
    body = recomputed(execution, body, scanned)
    if scanned:
        return lax.scan(body, streams, layers, unroll=execution.scan_unroll)
    outputs = []  # fully unrolled: what the backward pass needs is not stacked and cut apart again
    for layer in layers if is_list else _unstack(layers):
        streams, out = body(streams, layer)
        outputs.append(out)
    return streams, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


@jax.custom_vjp
def _unstack(layers: Any) -> list[Any]:
    """Return the layers one by one.

    The backward pass writes their gradients into one array, each into its place, and XLA lets the kernels write there
    directly. Two other ways lost. The gradient of plain indexing is a sum of arrays, each zero but for one layer. After
    a concatenation the optimizer passes twice over all parameters; behind a barrier it is a copy of 21 ms of a step.
    """
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(len(jax.tree.leaves(layers)[0]))]


def _stack(_, grads):
    def stack_leaf(*parts):
        whole = vary(jnp.zeros((len(parts), *parts[0].shape), parts[0].dtype), parts[0])
        for i, part in enumerate(parts):
            whole = lax.dynamic_update_index_in_dim(whole, part, i, 0)
        return whole

    return (jax.tree.map(stack_leaf, *grads),)


_unstack.defvjp(lambda layers: (_unstack(layers), None), _stack)
