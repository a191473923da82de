"""The cache's size: exactly C + R values per token and layer."""

import jax
import jax.numpy as jnp

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference.cache import cache_bytes_per_token, make_cache

V3 = from_config_dict(get_config())


def test_bytes_per_token_of_671b():
    """Spec section 13, item 17."""
    assert cache_bytes_per_token(V3.model, V3.execution) == 70_272


def test_cache_holds_576_values_per_token_and_layer():
    cache = jax.eval_shape(lambda: make_cache(V3.model, V3.execution, 2, 32))
    assert cache.layers["dense_layers"].latent_BMC.shape == (3, 2, 32, 512)
    assert cache.layers["moe_layers"].rotary_BMR.shape == (58, 2, 32, 64)
    arrays = jax.tree.leaves(cache.layers)
    assert sum(leaf.size for leaf in arrays) == 2 * 32 * 61 * 576
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) == 2 * 32 * cache_bytes_per_token(
        V3.model, V3.execution
    )
    assert cache.length_B.shape == (2,) and cache.length_B.dtype == jnp.int32


def test_fp32_doubles_the_bytes():
    fp32 = V3.with_(execution={"precision": "fp32"})
    assert cache_bytes_per_token(fp32.model, fp32.execution) == 2 * 70_272
    cache = jax.eval_shape(lambda: make_cache(fp32.model, fp32.execution, 1, 8))
    assert cache.layers["moe_layers"].latent_BMC.dtype == jnp.float32


def test_a_stack_without_layers_has_no_cache():
    moe_only = V3.with_(model={"num_dense_layers": 0})
    cache = jax.eval_shape(lambda: make_cache(moe_only.model, V3.execution, 1, 8))
    assert list(cache.layers) == ["moe_layers"]
