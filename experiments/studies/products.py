"""The three products of a linear layer in three arithmetics: exact, ours in FP8, and the recipe emulated.

Of an input x, a weight W and a gradient g of the output: y = x W, dx = g W^T, dW = x^T g.
"""

import functools
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from deepseek_jax.model.linear import linear
from deepseek_jax.model.precision import Input
from deepseek_jax.parameters import Fp8Weight
from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantized import GROUP

PRODUCTS = ("output", "input gradient", "weight gradient")
LARGEST_E4M3, LARGEST_E5M6 = 448.0, 65024.0


def exact(x_TI: np.ndarray, g_TO: np.ndarray, w_IO: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y, dx and dW in FP32."""
    return x_TI @ w_IO, g_TO @ w_IO.T, x_TI.T @ g_TO


@functools.partial(jax.jit, static_argnums=0)
def ours(recipe: Input, x_TI: jax.Array, g_TO: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, ...]:
    """Return y, dx and dW of `model.linear` in FP8."""
    blocks = quantize_blocks(w_IO)
    y_TO, pull = jax.vjp(
        lambda x, carrier: linear(x, Fp8Weight(carrier, blocks.values, blocks.scales), recipe=recipe), x_TI, w_IO
    )
    return y_TO, *pull(g_TO)


def emulated(recipe: Input, x_TI: np.ndarray, g_TO: np.ndarray, w_IO: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return y, dx and dW in FP32 of operands quantised as the report says (figure 6, sections 3.3.2 and 3.3.3)."""
    pow2 = recipe.scale == "pow2"
    tiles_TI, blocks_IO = quantized(x_TI, (1, GROUP), pow2=pow2), quantized(w_IO, (GROUP, GROUP))
    kept_TI = (
        quantized(x_TI, (1, GROUP), pow2=True, rounded=e5m6, largest=LARGEST_E5M6)
        if recipe.kept == "e5m6"
        else tiles_TI
    )
    columns_TI = quantized(kept_TI, (GROUP, 1), pow2=pow2)
    return tiles_TI @ blocks_IO, quantized(g_TO, (1, GROUP)) @ blocks_IO.T, columns_TI.T @ quantized(g_TO, (GROUP, 1))


def e4m3(x: np.ndarray) -> np.ndarray:
    """Round to E4M3."""
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e5m6(x: np.ndarray) -> np.ndarray:
    """Round to five exponent and six mantissa bits, bias 15."""
    step = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 6)
    return np.round(x / step) * step


def quantized(
    x: np.ndarray, group: tuple[int, int], pow2: bool = False, rounded: Callable = e4m3, largest: float = LARGEST_E4M3
) -> np.ndarray:
    """Return `x` [m, n] in FP32, rounded with one scale per group of (rows, columns). The last group may be partial."""
    (m, n), (rows, columns) = x.shape, group
    padded = np.pad(x, ((0, -m % rows), (0, -n % columns)))
    parts = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).astype(np.float64)
    scale = abs(parts).max(axis=(1, 3), keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1.0)
    scale = 2.0 ** np.ceil(np.log2(scale)) if pow2 else scale
    return (rounded((parts / scale).astype(np.float32)) * scale).astype(np.float32).reshape(padded.shape)[:m, :n]
