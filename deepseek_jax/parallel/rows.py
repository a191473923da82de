"""Rows of tokens by index: taken, as arrays or in FP8, and summed.

Both directions read by index and neither writes by index. Five tokens, one expert each, six slots:

    source_Z    1 0 3 5 2 4        slot 3 is empty: 5 = T * K
    slots_TK    1 0 4 2 5          token 0 lies in slot 1
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import Quantized

WORD = 4  # bytes that are read at once where a row is bytes


def take_rows(rows: Any, index_Z: jax.Array) -> Any:
    """Return the rows of an array [W, D], or of `Quantized` tiles [W, D], by index; W and beyond: zeros.

    FP8 rows bring their scales; those of a row of zeros are 1. Z must then be a multiple of 4
    (`pallas_kernels.quantized`).
    """
    if isinstance(rows, Quantized):
        return Quantized(take_bytes(rows.values, index_Z), _take_scales(rows.scales, index_Z), rows.grouping)
    return _take(rows, index_Z)


def take_bytes(values: jax.Array, index_Z: jax.Array) -> jax.Array:
    """Return rows of E4M3 [W, D] by index, read four bytes at a time; W and beyond: zeros."""
    num_rows, width = values.shape
    words = lax.bitcast_convert_type(values, jnp.uint8).reshape(num_rows, width // WORD, WORD)
    taken = _take(lax.bitcast_convert_type(words, jnp.uint32), index_Z)
    taken = lax.bitcast_convert_type(taken, jnp.uint8).reshape(-1, width)
    return lax.bitcast_convert_type(taken, values.dtype)


def sum_rows(y_ZD: jax.Array, slots_TK: jax.Array) -> jax.Array:
    """Sum the rows of each token's slots in FP32; slot index Z adds zero. Return [T, D] in the dtype of `y_ZD`."""
    # K gathers fuse with their sum.
    parts = (_take(y_ZD, slots_TK[:, k]).astype(jnp.float32) for k in range(slots_TK.shape[1]))
    return sum(parts).astype(y_ZD.dtype)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_scales(scales: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(scales, index, axis=1, mode="fill", fill_value=1)
