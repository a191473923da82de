"""Quantisation to block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): who needs which form of a tensor.

    quantize_tiles           activations and gradients, as the left operand of a product
    quantize_blocks          weights, once per optimizer step
    quantize_tiles_both      a gradient, which both products of the backward pass read: dx along its row, dW along its
                             column
    requantize_transposed    the cached activation as dW wants it: dequantised, transposed, quantised along the tokens
    quantize_rows            the dispatch: the rows that go to the experts, in their order

Scales cannot be transposed with a tensor: a tile is 128 neighbours along k, and its transpose needs 128 neighbours
along m. So the transposed forms are quantised anew, from x itself where it is at hand.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP
from pallas_kernels.dispatch import choose
from pallas_kernels.quantize import hopper, hopper_transposed, reference, tpu
from pallas_kernels.quantized import Quantized, Scale, check_array, check_quantized, check_scale, on_rows

DTYPES = (jnp.bfloat16, jnp.float32)


def quantize_tiles(x: Array, *, scale: Scale = "fp32", implementation: str = "auto") -> Quantized:
    """Quantise in tiles of 1 x 128.

    Args:
        x: BF16 or FP32 [m, k], any m >= 1, k a multiple of 128.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        tiles [m, k].

    Raises:
        ValueError: shape, dtype or `scale`.
    """
    _check("x", x, num_dims=(2,), whole_groups=True)
    check_scale(scale)
    faces = {"reference": reference.quantize_tiles, "hopper": hopper.quantize_tiles, "tpu": tpu.quantize_tiles}
    return choose("quantize_tiles", implementation, faces)(x, scale)


def quantize_blocks(w: Array, *, scale: Scale = "fp32", implementation: str = "auto") -> Quantized:
    """Quantise in blocks of 128 x 128; edge blocks may be partial, in n and in k.

    Args:
        w: BF16 or FP32 [n, k], or [G, n, k] for the weights of G experts.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        blocks of the shape of `w`.

    Raises:
        ValueError: shape, dtype or `scale`.
    """
    _check("w", w, num_dims=(2, 3), whole_groups=False)
    check_scale(scale)
    faces = {"reference": reference.quantize_blocks, "hopper": hopper.quantize_blocks, "tpu": tpu.quantize_blocks}
    return choose("quantize_blocks", implementation, faces)(w, scale)


def quantize_tiles_both(
    x: Array, *, scale: Scale = "fp32", implementation: str = "auto"
) -> tuple[Quantized, Quantized]:
    """Quantise in tiles, and the transpose in tiles, reading x once.

    Args:
        x: BF16 or FP32 [m, k], any m >= 1, k a multiple of 128.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        tiles [m, k], and tiles [k, m rounded up to 128], whose columns beyond m are zeros: 128 tokens of one channel
        share a scale.

    Raises:
        ValueError: shape, dtype or `scale`.
    """
    _check("x", x, num_dims=(2,), whole_groups=True)
    check_scale(scale)
    faces = {
        "reference": reference.quantize_tiles_both,
        "hopper": hopper_transposed.quantize_tiles_both,
        "tpu": tpu.quantize_tiles_both,
    }
    return choose("quantize_tiles_both", implementation, faces)(x, scale)


def requantize_transposed(
    q: Quantized, *, num_rows: Array | None = None, scale: Scale = "fp32", implementation: str = "auto"
) -> Quantized:
    """Transpose a quantised tensor: dequantise in FP32, transpose, quantise along what were its rows.

    With power-of-two scales on both sides the second rounding loses next to nothing, which is why V3 uses them where it
    matters.

    Args:
        q: tiles [m, k].
        num_rows: int32 scalar; the rows from it on hold nothing, and the columns that they become are unspecified: on
            Hopper they are not computed. None: all rows.
        scale: of the result: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        tiles [k, m rounded up to 128], whose columns beyond m are zeros.

    Raises:
        ValueError: `q` is not made of tiles [m, k], or `scale`.
    """
    check_quantized("q", q, "tile", 2)
    _check_not_empty("q", q.shape)
    check_scale(scale)
    faces = {
        "reference": reference.requantize_transposed,
        "hopper": on_rows(hopper_transposed.requantize_transposed, num_rows),
        "tpu": tpu.requantize_transposed,
    }
    return choose("requantize_transposed", implementation, faces)(q, scale)


def quantize_rows(x: Array, rows: Array, *, scale: Scale = "pow2", implementation: str = "auto") -> Quantized:
    """Gather rows and quantise them in tiles: the dispatch of tokens to experts.

    Args:
        x: BF16 or FP32 [m, k], any m >= 1, k a multiple of 128.
        rows: int32 [w], w >= 1. Row i of the result is x[rows[i]], or zeros where rows[i] is outside [0, m), negative
            included.
        scale: "pow2", which V3 uses before the experts, or "fp32".
        implementation: see `dispatch.choose`.

    Returns:
        tiles [w, k].

    Raises:
        ValueError: shapes, dtypes or `scale`.
    """
    _check("x", x, num_dims=(2,), whole_groups=True)
    check_array("rows", rows)
    if rows.ndim != 1 or rows.dtype != jnp.int32:
        raise ValueError(f"rows has shape {rows.shape} and dtype {rows.dtype}; it must be int32 [w]")
    _check_not_empty("rows", rows.shape)
    check_scale(scale)
    faces = {"reference": reference.quantize_rows, "hopper": hopper.quantize_rows, "tpu": tpu.quantize_rows}
    return choose("quantize_rows", implementation, faces)(x, rows, scale)


def _check(name: str, x: Array, num_dims: tuple[int, ...], whole_groups: bool) -> None:
    check_array(name, x)
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be bfloat16 or float32")
    if x.ndim not in num_dims:
        raise ValueError(f"{name} has shape {x.shape}; it must have {' or '.join(map(str, num_dims))} dims")
    _check_not_empty(name, x.shape)
    if whole_groups and x.shape[-1] % GROUP:
        raise ValueError(f"{name} has shape {x.shape}: its last dim must be a multiple of {GROUP}; pad it with zeros")


def _check_not_empty(name: str, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}: no dim may be 0")
