"""The routed experts of a decoding step in plain jnp: the specification, and the way on CPUs.

Experts that no token chose are not read. The tokens of one are taken together by a product with ones and zeros, as many
rows as the next power of two: a product of one row reads the weights as long as one of four. Measured on two CPU cores
at the shapes of configs/tiny.py, one layer: experiments/log.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize

UNROLLED = 16  # experts, up to which each has code of its own and is read in place: a slice at run time is copied


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
    level_E = sum((count_E > size).astype(jnp.int32) for size in sizes) if sizes else jnp.zeros_like(count_E)

    def visit(e: Any, y: Array) -> Array:
        weights = [matrix(w, base + e) for w in (gate_up, down)]
        ways = [lambda y, size=size: y + some(e, size, *weights) for size in sizes]
        return lax.switch(level_E[e], [*ways, lambda y: y + whole(e, *weights)], y)

    def some(e, size, *weights):
        picked = (rank_ET[e] == jnp.arange(size)[:, None]) & there_ET[e]
        out = ffn(pick(picked, rows), gates_ET[e] @ picked.T.astype(jnp.float32), *weights, in_fp8)
        return pick(picked.T, out)

    def whole(e, *weights):
        out = ffn(rows, gates_ET[e], *weights, in_fp8)
        return jnp.where(there_ET[e][:, None], out, 0)

    y = jnp.zeros(rows.shape, jnp.float32)
    return over(count_E, visit, y).astype(jnp.bfloat16 if in_fp8 else rows.dtype)


def over(count_E: Array, visit: Callable[[Any, Array], Array], y: Array) -> Array:
    """Fold `visit` over the experts that have tokens."""
    if len(count_E) <= UNROLLED:
        for e in range(len(count_E)):
            y = lax.cond(count_E[e] > 0, lambda y, e=e: visit(e, y), lambda y: y, y)
        return y
    order = jnp.argsort(count_E == 0, stable=True)
    return lax.fori_loop(0, (count_E > 0).sum(), lambda i, y: visit(order[i], y), y)


def matrix(weight: Any, index: Any) -> Any:
    """Return one expert's matrix."""
    if isinstance(weight, Quantized):
        return Quantized(matrix(weight.values, index), matrix(weight.scales, index), "block")
    return weight[index] if isinstance(index, int) else lax.dynamic_index_in_dim(weight, index, keepdims=False)


def pick(picked: Array, x: Array) -> Array:
    """Return FP32 rows of x [T, D] where `picked` [rows, T] is True; a NaN in a row that is not picked stays there."""
    finite = jnp.where(picked.any(0)[:, None], x, 0)
    return jnp.matmul(picked.astype(x.dtype), finite, precision=lax.Precision.HIGHEST)


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
