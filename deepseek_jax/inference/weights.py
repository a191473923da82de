"""Weights as decoding reads them: in layers, routed experts on their devices, all else whole; FP8 stays in FP8."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import UpProjection
from deepseek_jax.model.layer import STACKS
from deepseek_jax.model.precision import as_stored, compute_dtype
from deepseek_jax.parameters import (
    PARAMETERS,
    Fp8Weight,
    P,
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


def decode_weights(model: Model, execution: Execution, weights: Weights, mesh: jax.sharding.Mesh) -> Weights:
    """Return the weights that decoding reads, placed on `mesh`: no MTP layers, and matrices in the compute dtype.

    A stack becomes a list of layers: a program that cut a weight out of a stack would copy it. Weights in FP8 stay in
    FP8, except the one that absorbed attention takes apart (`model.absorbed.UpProjection`). Weights that this function
    made stay as they are.

    Raises:
        ValueError: weights in FP8 for an FP32 model.
    """
    place = functools.partial(_place, execution, mesh)
    params = {name: _layers(model, place, name, tree) for name, tree in weights.params.items() if name != "mtp_layers"}
    bias = {name: _layers(model, place, name, tree) for name, tree in weights.router_bias.items() if name in params}
    return Weights(params, bias)


Place = Callable[[Any, Any], Any]


def _layers(model: Model, place: Place, name: str, tree: Any) -> Any:
    """Return the leaves of `tree` in their places, a stack as a list of layers."""
    tops = (jax.tree_util.DictKey(name),)
    if name not in dict(STACKS) or isinstance(tree, list):
        return jax.tree.map_with_path(lambda path, leaf: place((*tops, *path), leaf), tree, is_leaf=_is_weight)
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=_is_weight)
    layers = []
    for path, leaf in leaves:  # one by one, so that no second copy of a whole stack is alive
        whole = place((*tops, *path), leaf)
        count = len(jax.tree.leaves(whole)[0])
        layers.append([_layer(model, leaf_name(path) == APART, whole, i) for i in range(count)])
    return [jax.tree.unflatten(structure, layer) for layer in zip(*layers, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(model: Model, apart: bool, stack: Array | Fp8Weight, i: int) -> Array | Fp8Weight | UpProjection:
    layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stack)
    return UpProjection.of(model, layer) if apart else layer


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Fp8Weight | UpProjection)


def _place(
    execution: Execution, mesh: jax.sharding.Mesh, path: Any, weight: Array | Fp8Weight | UpProjection
) -> Array | Fp8Weight | UpProjection:
    name, dtype = leaf_name(path), compute_dtype(execution)
    if isinstance(weight, Fp8Weight):
        if dtype == jnp.float32:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is in FP8 and execution.precision = 'fp32': load the weights as"
                " 'fp32', or set execution.precision to 'fp8' or 'bf16'"
            )
        if name != APART:
            return _place_fp8(name, weight, mesh)
        weight = _dequantized(name, weight)
    if isinstance(weight, UpProjection):
        return jax.device_put(weight, jax.sharding.NamedSharding(mesh, P()))
    spec = layout_in_use(name, weight.ndim)
    weight = jax.device_put(weight, jax.sharding.NamedSharding(mesh, spec))
    return weight if PARAMETERS[name].precision == "fp32" else weight.astype(dtype)


def _place_fp8(name: str, weight: Fp8Weight, mesh: jax.sharding.Mesh) -> Fp8Weight:
    values = jax.device_put(weight.values, jax.sharding.NamedSharding(mesh, layout_in_use(name, weight.values.ndim)))
    lead = num_lead_dims(name, weight.values.ndim)
    split = P(*layout_in_use(name, weight.values.ndim)[:lead])
    return Fp8Weight(None, values, jax.device_put(weight.scales, jax.sharding.NamedSharding(mesh, split)))


@functools.partial(jax.jit, static_argnums=0)
def _dequantized(name: str, weight: Fp8Weight) -> Array:
    values = weight.values
    matrix = matrix_shape(values.shape, num_lead_dims(name, values.ndim), PARAMETERS[name].row_dims)
    return dequantize(as_stored(values.reshape(matrix), weight.scales))[..., : matrix[-1]].reshape(values.shape)


def weight_specs(weights: Weights) -> Weights:
    """Return the layouts of weights as `decode_weights` places them."""

    def spec(path, leaf: Array | Fp8Weight | UpProjection) -> Any:
        name = leaf_name(path)
        if isinstance(leaf, UpProjection):
            return UpProjection(P(), P())
        if not isinstance(leaf, Fp8Weight):
            return layout_in_use(name, leaf.ndim)
        layout = layout_in_use(name, leaf.values.ndim)
        return Fp8Weight(None, layout, P(*layout[: num_lead_dims(name, leaf.values.ndim)]))

    return jax.tree.map_with_path(spec, weights, is_leaf=_is_weight)
