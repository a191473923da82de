"""The cache's size: exactly C + R values per token and layer."""

import dataclasses

import jax
import jax.numpy as jnp

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference.cache import cache_bytes_per_token, make_cache

V3 = from_config_dict(get_config())


def test_bytes_per_token_of_671b():
    """Spec section 13, item 17."""
    assert cache_bytes_per_token(V3) == 70_272


def test_cache_holds_576_values_per_token_and_layer():
    cache = jax.eval_shape(lambda: make_cache(V3, 2, 32))
    assert cache["dense_layers"]["latent"].shape == (3, 2, 32, 512)
    assert cache["moe_layers"]["rotary"].shape == (58, 2, 32, 64)
    arrays = jax.tree.leaves((cache["dense_layers"], cache["moe_layers"]))
    assert sum(leaf.size for leaf in arrays) == 2 * 32 * 61 * 576
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) == 2 * 32 * cache_bytes_per_token(V3)
    assert cache["length"].shape == (2,) and cache["length"].dtype == jnp.int32


def test_fp32_doubles_the_bytes():
    fp32 = dataclasses.replace(V3, execution=dataclasses.replace(V3.execution, precision="fp32"))
    assert cache_bytes_per_token(fp32) == 2 * 70_272
    assert jax.eval_shape(lambda: make_cache(fp32, 1, 8))["moe_layers"]["latent"].dtype == jnp.float32


def test_a_stack_without_layers_has_no_cache():
    moe_only = dataclasses.replace(V3, model=dataclasses.replace(V3.model, num_dense_layers=0))
    assert sorted(jax.eval_shape(lambda: make_cache(moe_only, 1, 8))) == ["length", "moe_layers"]
