"""Products of block-scaled FP8 matrices: activations by weights, and the weight gradient's two activations."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.matmul import hopper, hopper_gradient, reference, tpu
from pallas_kernels.quantized import Quantized, check_array, check_quantized

OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def matmul(
    a: Quantized, b: Quantized, *, out_dtype: jax.typing.DTypeLike = jnp.bfloat16, implementation: str = "auto"
) -> Array:
    """Return D = a b^T, each 128 of the sum over k promoted to FP32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    The forward product y = x W^T (b the weight), and the input gradient dx = dy W (b the weight's transpose, scales
    transposed with it).

    Args:
        a: tile [m, k]; k a multiple of 128, any m.
        b: block [n, k]; any n.
        out_dtype: BF16 or FP32, rounded to once, at the end.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        [m, n] of `out_dtype`. A row whose scales are NaN is NaN, and touches no other row.

    Raises:
        ValueError: an operand's grouping, dtype or layout, two different k, or `out_dtype`.
        NotImplementedError: there is no such kernel here.
    """
    check_quantized("a", a, "tile", num_dims=2)
    check_quantized("b", b, "block", num_dims=2)
    check_inner("a", a.shape, "b", b.shape)
    check_out_dtype(out_dtype)
    faces = {"reference": reference.matmul, "hopper": hopper.matmul, "tpu": tpu.matmul}
    return dispatch.choose("matmul", implementation, faces)(a, b, out_dtype=out_dtype)


def matmul_accumulate(a: Quantized, b: Quantized, c: Array | None = None, *, implementation: str = "auto") -> Array:
    """Return c + a b^T, promoted every 128 like `matmul`: the weight gradient dW += dy^T x.

    Tokens lie along k ("1D x 1D").

    Args:
        a: tile [m, k]; k a multiple of 128 (`quantize_tiles_both` pads it with zeros), any m.
        b: tile [n, k]; any n.
        c: FP32 [m, n], what is added to. A kernel writes the sum in its place where the caller donates it. None is
            zero, for the first gradient of a step: no zeros are made or read.
        implementation: "auto", "reference", "hopper" or "tpu".

    Returns:
        FP32 [m, n].

    Raises:
        ValueError: an operand's grouping, dtype or layout, two different k, or c of another shape or dtype.
        NotImplementedError: there is no such kernel here.
    """
    check_quantized("a", a, "tile", num_dims=2)
    check_quantized("b", b, "tile", num_dims=2)
    check_inner("a", a.shape, "b", b.shape)
    if c is not None:
        check_accumulator(c, (a.shape[0], b.shape[0]))
    faces = {
        "reference": reference.matmul_accumulate,
        "hopper": hopper_gradient.matmul_accumulate,
        "tpu": tpu.matmul_accumulate,
    }
    return dispatch.choose("matmul_accumulate", implementation, faces)(a, b, c)


def check_inner(a_name: str, a_shape: tuple[int, ...], b_name: str, b_shape: tuple[int, ...]) -> None:
    """Refuse operands that differ in their last dim, which the product sums over, or have an empty dim.

    Raises:
        ValueError: with both shapes.
    """
    if a_shape[-1] != b_shape[-1]:
        raise ValueError(f"{a_name} has shape {a_shape} and {b_name} {b_shape}: the last dims, k, must be equal")
    if 0 in a_shape or 0 in b_shape:
        raise ValueError(f"{a_name} has shape {a_shape} and {b_name} {b_shape}: every dim must be at least 1")


def check_out_dtype(out_dtype: jax.typing.DTypeLike) -> None:
    """Refuse an output that is neither BF16 nor FP32.

    Raises:
        ValueError: with the dtype.
    """
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f"out_dtype is {jnp.dtype(out_dtype)}; it must be bfloat16 or float32")


def check_accumulator(c: Array, shape: tuple[int, ...]) -> None:
    """Refuse an accumulator that is not FP32 of `shape`.

    Raises:
        ValueError: with both.
    """
    check_array("c", c)
    if c.shape != shape or c.dtype != jnp.float32:
        raise ValueError(f"c is {c.dtype} {c.shape}; this product accumulates into float32 {shape}")
