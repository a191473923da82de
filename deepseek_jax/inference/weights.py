"""Weights as decoding reads them: in layers, routed experts on their devices, all else whole; FP8 stays in FP8.

Adapters stay beside their weights (`adapters.Adapted`), so that a sampler multiplies as the trainer does. Merged, a
weight of FP8 would be quantised once more, or take twice the bytes in BF16 and read activations that were not
quantised. Products that decoding joins in one (queries and latents; the shared expert among the routed ones) stay apart
where one of them has an adapter. `kv_b_CNX` alone is merged, in FP32: the absorbed form takes it apart in any case.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.adapters import Adapted, halves, has_adapters
from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import UpProjection
from deepseek_jax.model.attention import Beside
from deepseek_jax.model.layer import STACKS
from deepseek_jax.model.precision import as_stored, compute_dtype
from deepseek_jax.model.router import in_parts
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import (
    EXPERTS,
    PARAMETERS,
    Fp8Weight,
    P,
    TurnedFp8Weight,
    Weights,
    layout_in_use,
    leaf_name,
    matrix_shape,
    num_lead_dims,
)
from pallas_kernels import GROUP
from pallas_kernels.quantized import dequantize

APART = "kv_b_CNX"


def takes_fp8(model: Model, execution: Execution) -> bool:
    """Whether weights in FP8 can be decoded as they are: activations in BF16, and sums over whole groups of 128."""
    heads = model.num_heads * model.value_dim
    sums = model.width, model.query_latent, heads, model.dense_hidden, model.expert_hidden
    return execution.precision != "fp32" and not any(size % GROUP for size in sums)


def decode_weights(
    model: Model, execution: Execution, weights: Weights, mesh: jax.sharding.Mesh, drafts: bool = False
) -> Weights:
    """Return the weights that decoding reads, placed on `mesh`: matrices in the compute dtype, and no MTP layers.

    With `drafts` the first MTP layer comes along (`model.drafter`).

    A stack becomes a list of layers: a program that cut a weight out of a stack would copy it. Weights in FP8 stay in
    FP8, except the one that absorbed attention takes apart (`model.absorbed.UpProjection`). Weights that this function
    made stay as they are.

    Raises:
        ValueError: weights in FP8 for an FP32 model, or drafts from a model without an MTP layer.
    """
    if drafts and "mtp_layers" not in weights.params:
        raise ValueError(
            "drafts are made by the MTP layer, and these weights have none; set num_drafts to 0, or take a model with"
            " model.num_mtp_layers = 1"
        )
    target = _Target(model, execution, mesh)
    names = [name for name in weights.params if drafts or name != "mtp_layers"]
    params = {name: _layers(target, name, _first(name, weights.params[name])) for name in names}
    bias = {
        name: _layers(target, name, _first(name, tree)) for name, tree in weights.router_bias.items() if name in params
    }
    return Weights(params, bias)


def _first(name: str, tree: Any) -> Any:
    """Return a stack of MTP layers with the first alone, and others as they are."""
    if name != "mtp_layers":
        return tree
    return tree[:1] if isinstance(tree, list) else jax.tree.map(lambda leaf: leaf[:1], tree)


class _Target(NamedTuple):
    """What weights are prepared for."""

    model: Model
    execution: Execution
    mesh: jax.sharding.Mesh


def _layers(target: _Target, name: str, tree: Any) -> Any:
    """Return the leaves of `tree` in their places, a stack as a list of layers."""
    top = (jax.tree_util.DictKey(name),)
    if name not in (*dict(STACKS), "mtp_layers") or isinstance(tree, list):
        return jax.tree.map_with_path(lambda path, leaf: _place(target, (*top, *path), leaf), tree, is_leaf=_is_weight)
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=_is_weight)
    columns = []
    for path, leaf in leaves:  # one by one, so that no second copy of a whole stack is alive
        whole, path = _place(target, (*top, *path), leaf), (*top, *path)
        count, dtype = len(jax.tree.leaves(whole)[0]), compute_dtype(target.execution)
        columns.append([_layer(target.model, dtype, leaf_name(path), whole, i) for i in range(count)])
    layers = [jax.tree.unflatten(structure, leaves) for leaves in zip(*columns, strict=True)]
    # The kernels for few tokens take the shared expert along. They do not take FP32, where the reference gives all
    # experts as many rows as a routed one needs, round after round: the shared one, which has every token, needs more.
    inside = axis_size(target.mesh, EXPERTS) == 1 and compute_dtype(target.execution) != jnp.float32
    return [_prepared(layer, inside) for layer in layers]


def _prepared(layer: Any, inside: bool) -> Any:
    """Return a layer whose products are joined where decoding reads them together; `inside`: the shared expert's
    among those of the routed ones.
    """
    if "block" in layer:
        return layer | {"block": _prepared(layer["block"], inside)}
    if "attention" in layer:
        layer = layer | {"attention": _with_queries_beside(layer["attention"])}
    return _with_shared_inside(layer) if inside else layer


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(model: Model, dtype: jnp.dtype, name: str, stack: Any, i: int) -> Any:
    """Return the weight of layer i in the form that decoding multiplies with."""
    layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stack)
    if isinstance(layer, Adapted):
        return dataclasses.replace(layer, base=_turned(model, dtype, name, layer.base))
    return _turned(model, dtype, name, layer)


def _turned(model: Model, dtype: jnp.dtype, name: str, layer: Any) -> Any:
    if name == APART:
        return UpProjection.of(model, layer)
    if name == "router_DE" and dtype == jnp.bfloat16:
        return in_parts(layer)
    if isinstance(layer, Fp8Weight):
        row = PARAMETERS[name]
        return TurnedFp8Weight.of(layer, row.input_dims, stacked=int(row.per_expert))
    return layer


def _with_queries_beside(attention: Any) -> Any:
    """Return attention's weights with both products of its norm in one weight.

    Not if blocks of FP8 would shift, or if one of them has an adapter.
    """
    name = "q_a_DA" if "q_a_DA" in attention else "q_DNQ"
    queries, rest = attention[name], attention["kv_a_DC"]
    if isinstance(queries, Adapted) or isinstance(rest, Adapted):
        return attention
    out = queries.shape[1:]
    if isinstance(queries, TurnedFp8Weight):
        if math.prod(out) % GROUP:
            return attention
        values = jnp.concatenate([queries.values, rest.values])
        scales = jnp.concatenate([queries.scales, rest.scales])
        both = TurnedFp8Weight(values, scales, (values.shape[1], values.shape[0]))
    else:
        both = jnp.concatenate([queries.reshape(len(queries), -1), rest], axis=1)
    return attention | {name: Beside(out), "kv_a_DC": both}


def _with_shared_inside(layer: Any) -> Any:
    """Return a layer whose shared expert, if it has one, lies behind the routed ones (`model.moe`).

    Not if one of them has an adapter.
    """
    moe = layer.get("moe", {})
    if "shared" not in moe or has_adapters(moe):
        return layer
    shared, rest = moe["shared"], {name: leaf for name, leaf in moe.items() if name != "shared"}
    gate_up, down = _join(rest["gate_up_ED2F"], rest["down_EFD"], shared["gate_up_D2F"], shared["down_FD"])
    return layer | {"moe": rest | {"gate_up_ED2F": gate_up, "down_EFD": down}}


@jax.jit
def _join(gate_up: Any, down: Any, shared_gate_up: Any, shared_down: Any) -> tuple[Any, Any]:
    """Append the shared expert, cut into experts of the routed ones' width."""
    if not isinstance(down, TurnedFp8Weight):
        width, hidden = gate_up.shape[1], down.shape[1]
        more = shared_gate_up.reshape(width, 2, -1, hidden).transpose(2, 0, 1, 3)
        return _append(gate_up, more), _append(down, shared_down.reshape(-1, hidden, width))

    def joined(whole, more_gate_up, more_down):  # [E, 2F, D] and [E, D, F], or their scales
        rows, columns = whole[1].shape[1:]
        more_gate_up = more_gate_up.reshape(2, -1, columns, rows).swapaxes(0, 1).reshape(-1, 2 * columns, rows)
        more_down = more_down.reshape(rows, -1, columns).swapaxes(0, 1)
        return _append(whole[0], more_gate_up), _append(whole[1], more_down)

    values = joined((gate_up.values, down.values), shared_gate_up.values, shared_down.values)
    scales = joined((gate_up.scales, down.scales), shared_gate_up.scales, shared_down.scales)
    shapes = ((v.shape[0], *old.shape[1:]) for v, old in zip(values, (gate_up, down), strict=True))
    gate_up, down = (TurnedFp8Weight(*parts) for parts in zip(values, scales, shapes, strict=True))
    return gate_up, down


def _append(experts: Array, more: Array) -> Array:
    return jnp.concatenate([experts, jax.sharding.reshard(more, jax.typeof(experts).sharding)])


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Adapted | Beside | Fp8Weight | TurnedFp8Weight | UpProjection)


def _place(target: _Target, path: Any, weight: Any) -> Any:
    """Return a weight on the mesh, in its dtype; one that `decode_weights` made stays as it is."""
    name, dtype, mesh = leaf_name(path), compute_dtype(target.execution), target.mesh
    if isinstance(weight, Adapted):
        return _place_adapted(target, path, weight)
    if isinstance(weight, Fp8Weight):
        if dtype == jnp.float32:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is in FP8 and execution.precision = 'fp32': load the weights as"
                " 'fp32', or set execution.precision to 'fp8' or 'bf16'"
            )
        if name != APART:
            return _place_fp8(name, weight, mesh)
        weight = dequantized(name, weight)
    if isinstance(weight, Beside | UpProjection | TurnedFp8Weight):
        return jax.device_put(
            weight, jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), _spec(path, weight))
        )
    spec = layout_in_use(name, weight.ndim)
    weight = jax.device_put(weight, jax.sharding.NamedSharding(mesh, spec))
    return weight if PARAMETERS[name].precision == "fp32" else weight.astype(dtype)


def _place_adapted(target: _Target, path: Any, weight: Adapted) -> Any:
    """Return a weight and its pair on the mesh, in the compute dtype; one that is to be taken apart is merged."""
    name, dtype, mesh = leaf_name(path), compute_dtype(target.execution), target.mesh
    layouts = _spec(path, weight).pair
    pair = jax.device_put(weight.pair, {key: jax.sharding.NamedSharding(mesh, spec) for key, spec in layouts.items()})
    if name == APART:
        in_fp32 = target._replace(execution=dataclasses.replace(target.execution, precision="fp32"))
        base = dequantized(name, weight.base) if isinstance(weight.base, Fp8Weight) else weight.base
        whole = Adapted(_place(in_fp32, path, base.astype(jnp.float32)), pair, weight.scale)
        return _merged(whole).astype(dtype)
    return Adapted(_place(target, path, weight.base), jax.tree.map(lambda w: w.astype(dtype), pair), weight.scale)


@jax.jit
def _merged(weight: Adapted) -> Array:
    """Return W + scale A B, all in FP32 and whole on every device."""
    a, b = halves(weight)
    return weight.base + weight.scale * jnp.matmul(a, b, precision="highest").reshape(weight.base.shape)


def _place_fp8(name: str, weight: Fp8Weight, mesh: jax.sharding.Mesh) -> Fp8Weight:
    values = jax.device_put(weight.values, jax.sharding.NamedSharding(mesh, layout_in_use(name, weight.values.ndim)))
    lead = num_lead_dims(name, weight.values.ndim)
    split = P(*layout_in_use(name, weight.values.ndim)[:lead])
    return Fp8Weight(None, values, jax.device_put(weight.scales, jax.sharding.NamedSharding(mesh, split)))


@functools.partial(jax.jit, static_argnums=0)
def dequantized(name: str, weight: Fp8Weight) -> Array:
    """Return a weight of FP8 in FP32, stacked as it is; `name` is its name in `PARAMETERS`."""
    values = weight.values
    matrix = matrix_shape(values.shape, num_lead_dims(name, values.ndim), PARAMETERS[name].row_dims)
    return dequantize(as_stored(values.reshape(matrix), weight.scales))[..., : matrix[-1]].reshape(values.shape)


def weight_specs(weights: Weights) -> Weights:
    """Return the layouts of weights as `decode_weights` places them."""
    return jax.tree.map_with_path(_spec, weights, is_leaf=_is_weight)


def _spec(path: Any, leaf: Any) -> Any:
    name = leaf_name(path)
    if isinstance(leaf, Beside):
        return leaf
    layout: Any = P()
    if isinstance(leaf, Adapted):
        pair: Any = {key: layout_in_use(key, half.ndim) for key, half in (leaf.pair or {}).items()}
        return Adapted(_spec(path, leaf.base), pair, leaf.scale)
    if isinstance(leaf, UpProjection):
        return UpProjection(layout, layout)
    if isinstance(leaf, TurnedFp8Weight):
        layout = P(EXPERTS) if PARAMETERS[name].per_expert else P()
        return TurnedFp8Weight(layout, layout, leaf.shape)
    if isinstance(leaf, Fp8Weight):
        layout = layout_in_use(name, leaf.values.ndim)
        scales: Any = P(*layout[: num_lead_dims(name, leaf.values.ndim)])
        return Fp8Weight(None, layout, scales)
    return layout_in_use(name, leaf.ndim)
