"""The latent cache: per token and layer the C normalised latent and R rotated key channels, and nothing else.

    {"dense_layers": {"latent": [L, B, M, C], "rotary": [L, B, M, R]}, "moe_layers": same, "length": [B]}

The two parts are separate arrays because absorbed attention reads the latent twice, as key and as value, and the rotary
part once (`model/attention.py`). `length` counts the tokens written; a slot at or beyond it is never read, so slots
need no clearing. At the 671B shape a token takes 61 * 576 BF16 values, 70,272 bytes; keys and values of 128 heads would
take 4,997,120 (DeepSeek-V3 section 2.1.1).
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.transformer import compute_dtype

Cache = dict[str, jax.Array | dict[str, jax.Array]]


def make_cache(config: Config, batch_size: int, num_slots: int) -> Cache:
    """Return an empty cache of M = `num_slots` positions for `batch_size` sequences, in the dtype of the
    activations.
    """
    model, dtype = config.model, compute_dtype(config)

    def layers(count: int) -> dict[str, jax.Array]:
        return {
            "latent": jnp.zeros((count, batch_size, num_slots, model.kv_latent), dtype),
            "rotary": jnp.zeros((count, batch_size, num_slots, model.rotary_dim), dtype),
        }

    stacks = {"dense_layers": model.num_dense_layers, "moe_layers": model.num_moe_layers}
    cache = {name: layers(count) for name, count in stacks.items() if count}
    return cache | {"length": jnp.zeros((batch_size,), jnp.int32)}


def cache_bytes_per_token(config: Config) -> int:
    """Return the bytes one token takes in the caches of all main-model layers."""
    model = config.model
    return model.num_layers * (model.kv_latent + model.rotary_dim) * compute_dtype(config).itemsize
