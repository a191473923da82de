"""What XLA makes of the same work, timed in the same run: the yardsticks of the benchmark."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench.operation import Program
from pallas_kernels.bench.shapes import XLA_DENSE, Dense, Linear, Shape
from pallas_kernels.quantized import E4M3, LARGEST

XLA_FP8 = "XLA FP8 per tensor"
XLA_BF16 = "XLA BF16"
COPY = "device copy"
COPY_WORDS = 2**28  # of 4 bytes: 1 GiB read, 1 GiB written
CUBLAS_ALIGNMENT = 16  # rows of an FP8 operand; XLA would pad others inside the timed program


def yardsticks(shape: Shape, precision: str) -> dict[str, Program]:
    """Return what stands beside an operation on `shape`; the first is what its ratio is taken to.

    Memory-bound shapes are compared with a device copy. Others with XLA's products, in FP8 and BF16 or in BF16 alone:
    of the same shape where it is dense, else of `shapes.XLA_DENSE`.
    """
    if shape.unit == "GB/s":
        return {COPY: Program(_invert, (jnp.arange(COPY_WORDS, dtype=jnp.uint32),), 2 * 4 * COPY_WORDS)}
    if isinstance(shape, Linear):
        x, dy, w = (
            _normal(i, dims) for i, dims in enumerate([(shape.m, shape.k), (shape.m, shape.n), (shape.n, shape.k)])
        )
        return {XLA_BF16: Program(_linear, (x, dy, w), shape.flops)}
    dense = shape if isinstance(shape, Dense) else XLA_DENSE
    rows = -(-dense.m // CUBLAS_ALIGNMENT) * CUBLAS_ALIGNMENT
    operands = _normal(0, (rows, dense.k)), _normal(1, (dense.n, dense.k))
    found = (
        {XLA_FP8: Program(_multiply, tuple(map(_whole_tensor, operands)), dense.flops)} if precision == "fp8" else {}
    )
    return found | {XLA_BF16: Program(_multiply, operands, dense.flops)}


def _normal(seed: int, shape: tuple[int, int]) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@jax.jit
def _whole_tensor(x: Array) -> Array:
    """Return E4M3 with the largest magnitude at 448."""
    return (x.astype(jnp.float32) * (LARGEST / jnp.abs(x).max().astype(jnp.float32))).astype(E4M3)


@jax.jit
def _multiply(a: Array, b: Array) -> Array:
    """Return a b^T in BF16, accumulated in FP32 (by cuBLASLt's fast accumulation for FP8)."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


@jax.jit
def _linear(x: Array, dy: Array, w: Array) -> tuple[Array, Array, Array]:
    """Return y, dx and dw of a linear layer, dw in FP32 as it is accumulated."""
    return _multiply(x, w), dy @ w, jnp.matmul(dy.T, x, preferred_element_type=jnp.float32)


@jax.jit
def _invert(words: Array) -> Array:
    """Return the words with every bit turned: a copy that is one kernel, and not the copy engine's work."""
    return ~words
