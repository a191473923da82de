"""The cache's size: exactly C + R values per token and layer."""

import jax
import jax.numpy as jnp

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference.cache import cache_bytes_per_token, contiguous_tables, make_cache

V3 = from_config_dict(get_config())


def test_bytes_per_token_of_671b():
    """Spec section 13, item 17."""
    assert cache_bytes_per_token(V3.model, V3.execution) == 70_272


def test_cache_holds_576_values_per_token_and_layer():
    """A sequence has whole pages: 130 tokens take three."""
    cache = jax.eval_shape(lambda: make_cache(V3.model, V3.execution, 2, 130))
    assert cache.pages.shape == (61, 2 * 3, 64, 576)
    assert cache.pages.size * cache.pages.dtype.itemsize == 2 * 192 * cache_bytes_per_token(V3.model, V3.execution)
    assert cache.tables_BJ.shape == (2, 3) and cache.tables_BJ.dtype == jnp.int32
    assert cache.length_B.shape == (2,) and cache.length_B.dtype == jnp.int32


def test_every_page_is_in_one_table():
    """On each of two devices the sequences have its pages from 0 on."""
    tables_BJ = contiguous_tables(4, 3, devices=2)
    assert tables_BJ.tolist() == [[0, 1, 2], [3, 4, 5]] * 2
    cache = make_cache(V3.with_(model={"num_layers": 4}).model, V3.execution, 4, 130)
    assert cache.tables_BJ.tolist() == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)]


def test_fp32_doubles_the_bytes():
    fp32 = V3.with_(execution={"precision": "fp32"})
    assert cache_bytes_per_token(fp32.model, fp32.execution) == 2 * 70_272
    cache = jax.eval_shape(lambda: make_cache(fp32.model, fp32.execution, 1, 8))
    assert cache.pages.dtype == jnp.float32
