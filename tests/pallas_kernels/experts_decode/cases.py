"""Cases of experts at decode, and what they must give, in FP64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.quantized import Quantized, dequantize


def make(num_tokens, k, num_experts, width, hidden, *, dtype=jnp.bfloat16, routing="spread", seed=0):
    """Return h, experts, gates, gate_up, down; one assignment in ten is out of range, below or above."""
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)]).astype(np.int32)
    if routing == "one":
        experts[:] = experts[0]
    out = rng.random(experts.shape)
    experts[out < 0.05], experts[out > 0.95] = -1, num_experts + 3
    if routing == "nobody":
        experts[:] = num_experts
    h = rng.normal(size=(num_tokens, width))
    gate_up = rng.normal(size=(num_experts, width, 2 * hidden)) / width**0.5
    down = rng.normal(size=(num_experts, hidden, width)) / hidden**0.5
    gates = rng.random(experts.shape) + 0.1
    weights = [jnp.asarray(x, dtype) for x in (gate_up, down)]
    return jnp.asarray(h, dtype), jnp.asarray(experts), jnp.asarray(gates, jnp.float32), *weights


def in_fp8(h, experts, gates, gate_up, down):
    """Return the same case with rows and weights in FP8."""
    blocks = [quantize_blocks(w.swapaxes(1, 2), implementation="reference") for w in (gate_up, down)]
    return quantize_tiles(h, scale="pow2", implementation="reference"), experts, gates, *blocks


def expected(h, experts, gates, gate_up, down):
    """Return y in FP64, one assignment after the other, from what the operands stand for."""

    def numbers(x):
        if isinstance(x, Quantized):
            x = dequantize(x)
            return np.asarray(x if x.ndim == 2 else x.swapaxes(1, 2), np.float64)
        return np.asarray(x, np.float64)

    h, gate_up, down = numbers(h), numbers(gate_up), numbers(down)
    y = np.zeros(h.shape)
    for token, (chosen, weights) in enumerate(zip(np.asarray(experts), np.asarray(gates, np.float64), strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            if 0 <= expert < len(down):
                gate, up = np.split(h[token] @ gate_up[expert], 2)
                y[token] += weight * (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    return y


def error(result, want):
    """Return the relative L2 error; the absolute one where nothing is wanted."""
    result = np.asarray(result, np.float64)
    assert np.isfinite(result).all()
    return np.linalg.norm(result - want) / (np.linalg.norm(want) or 1)
