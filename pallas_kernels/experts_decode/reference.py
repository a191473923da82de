"""The routed experts of a decoding step in plain jnp: the specification, and the way on CPUs.

A loop over the experts that have tokens; others are not read. An expert takes the rows of its tokens together, filled
up to the next power of two: a product with one row reads the weights as long as one with four, and with 16 three times
as long (two CPU cores, the shapes of configs/tiny.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.lowering import manual_axes
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize


def experts_decode(
    h: Array | Quantized, experts: Array, gates: Array, gate_up: Any, down: Any, base: Array, *, num_experts: int
) -> Array:
    """Return y [T, D]; the weights [., D, 2F] and [., F, D], or blocks [., 2F, D] and [., D, F], begin at `base`."""
    in_fp8 = isinstance(gate_up, Quantized)
    rows = dequantize(h) if isinstance(h, Quantized) else h
    num_tokens = len(rows)
    chosen = experts == jnp.arange(num_experts)[:, None, None]  # [E, T, K]
    gates_ET, there_ET = jnp.where(chosen, gates, 0).sum(2), chosen.any(2)
    count_E, rank_ET = there_ET.sum(1, dtype=jnp.int32), jnp.cumsum(there_ET, axis=1) - 1
    sizes = [size for size in (2**i for i in range(1, 31)) if size < num_tokens]
    level_E = sum((count_E > size for size in sizes), jnp.zeros_like(count_E))
    order = jnp.argsort(count_E == 0, stable=True)
    token = jnp.arange(num_tokens)

    def visit(i: Array, y: Array) -> Array:
        e = order[i]
        gates_T, there_T, rank_T = gates_ET[e], there_ET[e], rank_ET[e]

        def some(size: int) -> Array:
            picked = (rank_T == jnp.arange(size)[:, None]) & there_T
            source = jnp.where(picked, token, 0).sum(1)  # of an empty place the first token, which nobody reads
            out = ffn(rows[source], gates_T[source], *weights, in_fp8)
            return out[jnp.minimum(rank_T, size - 1)]

        weights = [matrix(w, base + e) for w in (gate_up, down)]
        ways = [*(functools.partial(some, size) for size in sizes), lambda: ffn(rows, gates_T, *weights, in_fp8)]
        return y + jnp.where(there_T[:, None], lax.switch(level_E[e], ways), 0)

    axes = manual_axes.varies_over((rows, experts, gates, gate_up, down, base))
    y = manual_axes.vary(jnp.zeros(rows.shape, jnp.float32), axes)
    y = lax.fori_loop(0, (count_E > 0).sum(), visit, y)
    return y.astype(jnp.bfloat16 if in_fp8 else rows.dtype)


def matrix(weight: Any, index: Any) -> Any:
    """Return one expert's matrix."""
    if isinstance(weight, Quantized):
        return Quantized(matrix(weight.values, index), matrix(weight.scales, index), "block")
    return lax.dynamic_index_in_dim(weight, index, keepdims=False)


def ffn(x: Array, gates: Array, gate_up: Any, down: Any, in_fp8: bool) -> Array:
    """Return the gated output of one expert in FP32; in FP8 the activations are tiles of 128 channels."""
    hidden = product(x, gate_up)
    if in_fp8:  # rounded as in training
        hidden = hidden.astype(jnp.bfloat16).astype(jnp.float32)
    gate, up = jnp.split(hidden, 2, axis=1)
    act = jax.nn.silu(gate) * up * gates[:, None]
    if in_fp8:
        act = dequantize(quantize_tiles(act, implementation="reference"))
    return product(act.astype(x.dtype), down)


def product(x: Array, weight: Any) -> Array:
    """Return FP32 x W."""
    if isinstance(weight, Quantized):
        return jnp.matmul(x, dequantize(weight).T, precision=lax.Precision.HIGHEST)
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)
