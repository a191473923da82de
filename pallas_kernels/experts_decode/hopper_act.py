"""What the first product of experts on Hopper leaves for the second: gated activations, in BF16 or in tiles."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.experts_decode.hopper_slots import ROWS
from pallas_kernels.experts_decode.hopper_stream import L
from pallas_kernels.quantized import E4M3, largest_magnitude, scale_of


def store_act(outputs: tuple, sums: list[Array], weights: Array, row: Array, column: Array) -> None:
    """Store silu(gate) * up * weight, transposed; `sums` are those of gate, then of up, 64 columns each."""
    half, n = len(sums) // 2, sums[0].shape[1]
    weights = lax.broadcast_in_dim(weights, sums[0].shape, [1])
    if len(outputs) == 2:  # rounded as in training
        sums = [total.astype(jnp.bfloat16).astype(jnp.float32) for total in sums]
    acts = [gate / (1 + jnp.exp(-gate)) * up for gate, up in zip(sums[:half], sums[half:], strict=True)]
    acts = [jnp.where(weights == 0, 0.0, act * weights) for act in acts]  # of rows without this expert, NaN or not
    rows, dtype = pl.ds(row, n), jnp.bfloat16
    if len(outputs) == 2:
        largest = [largest_magnitude(act, axis=0) for act in acts]
        scale = scale_of(jnp.maximum(*largest), "fp32")
        outputs[1][lax.div(column, jnp.int32(GROUP)), rows] = scale
        inverse, dtype = lax.broadcast_in_dim(1.0 / scale, sums[0].shape, [1]), E4M3
        acts = [act * inverse for act in acts]
    for i, act in enumerate(acts):
        target = outputs[0].at[rows, pl.ds(column + i * ROWS, ROWS)].transpose((1, 0))
        target[...] = turned(act, dtype)


def turned(x: Array, dtype: jnp.dtype) -> Array:
    """Return FP32 [64, N] in `dtype`, neighbours along the 64 in one register."""
    if dtype == E4M3:  # shuffles know 16 and 32 bits
        return plgpu.layout_cast(x, L.WGMMA_TRANSPOSED).astype(dtype)
    return plgpu.layout_cast(x.astype(dtype), L.WGMMA_TRANSPOSED)
