"""Weights of benchmarks that decode: random, with a router that spreads tokens over the experts; random contexts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.inference.cache import CACHE_SPECS
from deepseek_jax.model import transformer
from deepseek_jax.parameters import PARAMETERS, Fp8Weight, P, Weights, leaf_name, matrix_shape, num_lead_dims
from pallas_kernels.quantize import quantize_blocks

ROUTER_STD = 0.02  # of logits per unit of the normed stream: at width 2048 their standard deviation is 0.9


def random_weights(config: Config, mesh: jax.sharding.Mesh) -> Weights:
    """Return weights as `transformer.init` makes them, but for the router; those of an FP8 model in FP8."""
    in_fp8 = config.execution.precision == "fp8"

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def change(path, leaf):
        name = leaf_name(path)
        if name == "router_DE":
            return ROUTER_STD / config.model.init_std * leaf
        if not in_fp8 or PARAMETERS[name].precision != "fp8":
            return leaf
        leaf = jax.sharding.reshard(leaf, P())
        matrix = matrix_shape(leaf.shape, num_lead_dims(name, leaf.ndim), PARAMETERS[name].row_dims)
        blocks = quantize_blocks(leaf.reshape(-1, *matrix[-2:]))
        scales = blocks.scales.reshape(*matrix[:-2], *blocks.scales.shape[-2:])
        return Fp8Weight(None, blocks.values.reshape(leaf.shape), scales)

    with jax.set_mesh(mesh):
        weights = jax.jit(functools.partial(transformer.init, config.model))(jax.random.key(config.seed))
        return Weights(jax.tree.map_with_path(change, weights.params), weights.router_bias)


def random_entries(pages: jax.Array) -> jax.Array:
    """Return pages of random entries, of the size of a norm's output, laid out as those of a cache."""
    split: Any = CACHE_SPECS.pages
    make = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), pages.shape, jnp.bfloat16, out_sharding=split).astype(pages.dtype)
    )
    return make()
