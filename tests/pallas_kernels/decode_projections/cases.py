"""Operands of the kernels of a decoding step's attention, and what they give in FP64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantized import Quantized


def normal(seed: int, *shape: int, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def table(n: int, pairs: int = 32):
    angles = jnp.arange(n * pairs, dtype=jnp.float32).reshape(n, pairs)
    return jnp.cos(angles), jnp.sin(angles)


def blocks(seed: int, columns: int, k: int) -> Quantized:
    whole = quantize_blocks(normal(seed, columns + -columns % 128, k), implementation="reference")
    return Quantized(whole.values[:columns], whole.scales, "block")


def places(n: int, num_pages: int):
    """Pages and rows, among them pages that do not exist."""
    return jnp.arange(n, dtype=jnp.int32) % (num_pages + 2) - 1, 3 * jnp.arange(n, dtype=jnp.int32) % 64


def distance(found, want) -> float:
    """The largest distance as a share of the largest number; 0 of equals, all zeros among them."""
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    most = np.abs(found - want).max()
    return float(most / np.abs(want).max()) if most else 0.0
