"""The routed experts of a decoding step in plain jnp: the specification, and the way on CPUs.

    in turn      a loop over the experts that have tokens; others are not read. An expert takes the rows of its tokens
                 together, filled up to the next power of two: a product with one row reads the weights as long as one
                 with four, and with 16 three times as long
    at once      where there are at least two assignments to an expert: all with some rows each, as one batched
                 product, which reads the weights in place; again for those that have more

Measured on two CPU cores with the shapes of configs/tiny.py: experiments/log.md.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.lowering import manual_axes
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize

MANY = 2  # assignments to an expert, from which on all experts are multiplied at once


def experts_decode(
    h: Array | Quantized,
    experts: Array,
    gates: Array,
    gate_up: Any,
    down: Any,
    base: Array,
    dense: Any = None,
    *,
    num_experts: int,
    parts: bool = False,
) -> Array:
    """Return y [T, D], or with `parts` FP32 [1, T, D].

    The weights [., D, 2F] and [., F, D], or blocks [., 2F, D] and [., D, F], begin at `base`.
    """
    del dense  # says the same as experts and gates
    in_fp8 = isinstance(gate_up, Quantized)
    rows = dequantize(h) if isinstance(h, Quantized) else h
    chosen = experts == jnp.arange(num_experts)[:, None, None]  # [E, T, K]
    gates_ET, there_ET = jnp.where(chosen, gates, 0).sum(2), chosen.any(2)
    rank_ET = jnp.cumsum(there_ET, axis=1) - 1
    axes = manual_axes.varies_over((rows, experts, gates, gate_up, down, base))
    zeros = manual_axes.vary(jnp.zeros(rows.shape, jnp.float32), axes)
    if not in_fp8 and len(gate_up) == num_experts and MANY * num_experts <= experts.size:
        y = at_once(rows, experts, gates_ET, there_ET, rank_ET, gate_up, down, zeros)
    else:
        y = in_turn(rows, gates_ET, there_ET, rank_ET, gate_up, down, base, zeros)
    return y[None].astype(jnp.float32) if parts else y.astype(jnp.bfloat16 if in_fp8 else rows.dtype)


def in_turn(
    rows: Array, gates_ET: Array, there_ET: Array, rank_ET: Array, gate_up: Any, down: Any, base: Array, y: Array
) -> Array:
    """Return y [T, D] plus what the experts give, one after the other."""
    in_fp8, num_tokens = isinstance(gate_up, Quantized), len(rows)
    count_E, token = there_ET.sum(1, dtype=jnp.int32), jnp.arange(num_tokens)
    sizes = [size for size in (2**i for i in range(1, 31)) if size < num_tokens]
    level_E = sum((count_E > size for size in sizes), jnp.zeros_like(count_E))
    order = jnp.argsort(count_E == 0, stable=True)

    def visit(i: Array, y: Array) -> Array:
        e = order[i]
        gates_T, there_T, rank_T = gates_ET[e], there_ET[e], rank_ET[e]

        def some(size: int) -> Array:
            source = sources(rank_T == jnp.arange(size)[:, None], there_T, token)
            out = ffn(rows[source], gates_T[source], *weights, in_fp8)
            return out[jnp.minimum(rank_T, size - 1)]

        weights = matrix(gate_up, base + e), matrix(down, base + e)
        ways = [*(functools.partial(some, size) for size in sizes), lambda: ffn(rows, gates_T, *weights, in_fp8)]
        return y + jnp.where(there_T[:, None], lax.switch(level_E[e], ways), 0)

    return lax.fori_loop(0, (count_E > 0).sum(), visit, y)


def at_once(
    rows: Array,
    experts: Array,
    gates_ET: Array,
    there_ET: Array,
    rank_ET: Array,
    gate_up: Array,
    down: Array,
    y: Array,
) -> Array:
    """Return y [T, D] plus what all experts give, some rows of each at a time."""
    num_experts, token = len(gates_ET), jnp.arange(len(rows))
    size = 2 ** max(2, math.ceil(math.log2(1.5 * experts.size / num_experts)))
    expert_TK = jnp.clip(experts, 0, num_experts - 1)
    rank_TK, real_TK = jnp.take_along_axis(rank_ET.T, expert_TK, axis=1), expert_TK == experts

    def some(i: Array, y: Array) -> Array:
        first = i * size
        source = sources(rank_ET[:, None] == first + jnp.arange(size)[:, None], there_ET[:, None], token)
        hidden = jnp.einsum("erd,edf->erf", rows[source], gate_up, preferred_element_type=jnp.float32)
        gate, up = jnp.split(hidden, 2, axis=2)
        act = jax.nn.silu(gate) * up * jnp.take_along_axis(gates_ET, source, axis=1)[..., None]
        out = jnp.einsum("erf,efd->erd", act.astype(rows.dtype), down, preferred_element_type=jnp.float32)
        here = real_TK & (rank_TK >= first) & (rank_TK < first + size)
        return y + jnp.where(here[..., None], out[expert_TK, jnp.clip(rank_TK - first, 0, size - 1)], 0).sum(1)

    return lax.fori_loop(0, (there_ET.sum(1).max() + size - 1) // size, some, y)


def sources(at: Array, there: Array, token: Array) -> Array:
    """Return which token fills each place; of an empty place the first one, whose result nobody reads."""
    return jnp.where(at & there, token, 0).sum(-1)


def matrix(weight: Any, index: Any) -> Any:
    """Return one expert's matrix."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), weight)


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
