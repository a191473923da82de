"""Weights as decoding reads them: routed experts on their devices, all else whole; FP8 weights stay in FP8."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax.config import Execution, Model
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

TAKEN_APART = {"kv_b_CNX"}  # absorbed attention multiplies with its two parts, so it is dequantised


def takes_fp8(model: Model, execution: Execution) -> bool:
    """Whether weights in FP8 can be decoded as they are: activations in BF16, and sums over whole groups of 128."""
    heads = model.num_heads * model.value_dim
    sums = model.width, model.query_latent, heads, model.dense_hidden, model.expert_hidden
    return execution.precision != "fp32" and not any(size % GROUP for size in sums)


def decode_weights(execution: Execution, weights: Weights, mesh: jax.sharding.Mesh) -> Weights:
    """Return the weights that decoding reads, placed on `mesh`: no MTP layers, and matrices in the compute dtype.

    Weights in FP8 stay in FP8, except the one that absorbed attention takes apart.

    Raises:
        ValueError: weights in FP8 for an FP32 model.
    """
    dtype = compute_dtype(execution)

    def place(path, weight: Array | Fp8Weight) -> Array | Fp8Weight:
        name = leaf_name(path)
        if isinstance(weight, Fp8Weight):
            if dtype == jnp.float32:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is in FP8 and execution.precision = 'fp32': load the weights as"
                    " 'fp32', or set execution.precision to 'fp8' or 'bf16'"
                )
            if name not in TAKEN_APART:
                return _place_fp8(name, weight, mesh)
            weight = _dequantized(name, weight)
        spec = layout_in_use(name, weight.ndim)
        weight = jax.device_put(weight, jax.sharding.NamedSharding(mesh, spec))
        return weight if PARAMETERS[name].precision == "fp32" else weight.astype(dtype)

    kept = {name: tree for name, tree in weights.params.items() if name != "mtp_layers"}
    params = jax.tree.map_with_path(place, kept, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
    bias = {name: tree for name, tree in weights.router_bias.items() if name != "mtp_layers"}
    return Weights(params, jax.device_put(bias, jax.sharding.NamedSharding(mesh, P())))


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

    def spec(path, leaf: Array | Fp8Weight) -> Any:
        name = leaf_name(path)
        if not isinstance(leaf, Fp8Weight):
            return layout_in_use(name, leaf.ndim)
        layout = layout_in_use(name, leaf.values.ndim)
        return Fp8Weight(None, layout, P(*layout[: num_lead_dims(name, leaf.values.ndim)]))

    return jax.tree.map_with_path(spec, weights, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))
