"""Kernels that norm or gate a tensor and quantise it in one pass, as the operand of an FP8 product.

    rms_norm_quantize           the input of attention and of an FFN
    swiglu_quantize             the input of the down projection, forward
    swiglu_backward_quantize    the gradient of the pre-activations as both products of the backward pass read it, and
                                the recomputed output
    e5m6_pack, e5m6_unpack      attention's output between the passes

Separate passes would move each tensor once more in BF16 and eat what FP8 gains; DeepSeek-V3 (arXiv 2412.19437, sections
3.3.3 and 3.5.2) names these fusions. `reference` states where numbers are rounded. All take BF16 rows [m, ...] with any
m, and all are memory-bound.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP
from pallas_kernels.dispatch import choose
from pallas_kernels.producers import e5m6, hopper, hopper_backward, hopper_e5m6, hopper_norm, reference, tpu
from pallas_kernels.quantized import Quantized, Scale, check_array, check_scale, on_rows, scales_shape

OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def rms_norm_quantize(
    x: Array, gain: Array, eps: float, *, scale: Scale = "fp32", implementation: str = "auto"
) -> Quantized:
    """Norm each row by its root mean square, multiply by the gain and quantise in tiles.

    Args:
        x: BF16 [m, k], k a multiple of 128.
        gain: FP32 [k].
        eps: what is added to the mean square.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`. The Hopper kernel holds rows in shared memory: up to 18432.

    Returns:
        tiles [m, k] of the norm rounded to BF16: the same numbers as the norm, then `quantize_tiles`.

    Raises:
        ValueError: shapes, dtypes or `scale`.
    """
    _check_rows("x", x, GROUP)
    check_array("gain", gain)
    if gain.shape != x.shape[1:] or gain.dtype != jnp.float32:
        raise ValueError(
            f"gain has shape {gain.shape} and dtype {gain.dtype}; for x {x.shape} it must be float32 {x.shape[1:]}"
        )
    check_scale(scale)
    faces = {"reference": reference.rms_norm_quantize, "tpu": tpu.rms_norm_quantize}
    if x.shape[1] <= hopper_norm.WIDEST_ROW:
        faces["hopper"] = hopper_norm.rms_norm_quantize
    return choose("rms_norm_quantize", implementation, faces)(x, gain, eps, scale)


def swiglu_quantize(
    hidden: Array,
    weight: Array | None = None,
    *,
    num_rows: Array | None = None,
    scale: Scale = "fp32",
    implementation: str = "auto",
) -> Quantized:
    """Quantise silu(gate) * up in tiles.

    Args:
        hidden: BF16 [m, 2f], a row's gate before its up; f a multiple of 128.
        weight: FP32 [m], the gate weight of a routed expert, a factor of each row; or None.
        num_rows: int32 scalar; the rows from it on hold nothing, and their results are unspecified: on Hopper they are
            not computed. None: all rows.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        tiles [m, f] of the FP32 product: it is not rounded to BF16 on the way.

    Raises:
        ValueError: shapes, dtypes or `scale`.
    """
    _check_swiglu(hidden, weight, scale)
    faces = {
        "reference": reference.swiglu_quantize,
        "hopper": on_rows(hopper.swiglu_quantize, num_rows),
        "tpu": tpu.swiglu_quantize,
    }
    return choose("swiglu_quantize", implementation, faces)(hidden, weight, scale)


def swiglu_backward_quantize(
    hidden: Array,
    grad: Array,
    weight: Array | None = None,
    *,
    num_rows: Array | None = None,
    scale: Scale = "fp32",
    implementation: str = "auto",
) -> tuple[Quantized, Quantized, Quantized, Array | None]:
    """Differentiate silu(gate) * up * weight, and recompute it, both quantised.

    The gradient of the pre-activations comes in both groupings.

    Args:
        hidden: BF16 [m, 2f], as in `swiglu_quantize`.
        grad: BF16 [m, f], the gradient of the down projection's input, of the product after the weight.
        weight: FP32 [m] or None, as in `swiglu_quantize`.
        num_rows: as there. What is unspecified are rows, columns of the transposed, and elements of the last result.
        scale: "fp32", or "pow2" for powers of two.
        implementation: see `dispatch.choose`.

    Returns:
        tiles [m, 2f] of the gradient of `hidden`; tiles [2f, m rounded up to 128] of its transpose, zeros beyond m;
        tiles [f, m rounded up to 128] of the transposed output, of the same FP32 numbers as `swiglu_quantize`, for the
        weight gradient of the down projection; and the gradient of `weight`, FP32 [m], or None.

    Raises:
        ValueError: shapes, dtypes or `scale`.
    """
    _check_swiglu(hidden, weight, scale)
    check_array("grad", grad)
    expected = (hidden.shape[0], hidden.shape[1] // 2)
    if grad.shape != expected or grad.dtype != jnp.bfloat16:
        raise ValueError(
            f"grad has shape {grad.shape} and dtype {grad.dtype}; for hidden {hidden.shape} it must be bfloat16"
            f" {expected}"
        )
    faces = {
        "reference": reference.swiglu_backward_quantize,
        "hopper": on_rows(hopper_backward.swiglu_backward_quantize, num_rows),
        "tpu": tpu.swiglu_backward_quantize,
    }
    return choose("swiglu_backward_quantize", implementation, faces)(hidden, grad, weight, scale)


def e5m6_pack(x: Array, *, implementation: str = "auto") -> tuple[Array, Array]:
    """Round to E5M6 with a power-of-two scale per tile of 1 x 128, and pack 128 values in 192 bytes.

    `producers/e5m6.py` describes format and bytes.

    Args:
        x: BF16 [m, k], k a multiple of 128.
        implementation: see `dispatch.choose`.

    Returns:
        uint8 [m, k * 3 / 2], and FP32 scales [k / 128, m rounded up to 4], 1 beyond m.

    Raises:
        ValueError: shape or dtype.
    """
    _check_rows("x", x, GROUP)
    faces = {"reference": e5m6.e5m6_pack, "hopper": hopper_e5m6.e5m6_pack, "tpu": tpu.e5m6_pack}
    return choose("e5m6_pack", implementation, faces)(x)


def e5m6_unpack(
    packed: Array, scales: Array, *, m: int, dtype: jax.typing.DTypeLike = jnp.bfloat16, implementation: str = "auto"
) -> Array:
    """Return what `e5m6_pack` packed: exact in BF16 and FP32.

    Args:
        packed: uint8 [m, k * 3 / 2].
        scales: FP32 [k / 128, m rounded up to 4].
        m: rows.
        dtype: BF16 or FP32.
        implementation: see `dispatch.choose`.

    Returns:
        [m, k] of `dtype`.

    Raises:
        ValueError: shapes or dtypes.
    """
    check_array("packed", packed)
    check_array("scales", scales)
    if (
        packed.dtype != jnp.uint8
        or packed.ndim != 2
        or packed.shape[0] != m
        or m < 1
        or packed.shape[1] % e5m6.TILE_BYTES
    ):
        raise ValueError(
            f"packed is {packed.dtype} {packed.shape}; for m = {m} it must be uint8 [{m}, multiple of"
            f" {e5m6.TILE_BYTES}]"
        )
    expected = scales_shape((m, packed.shape[1] // e5m6.TILE_BYTES * GROUP), "tile")
    if scales.dtype != jnp.float32 or scales.shape != expected:
        raise ValueError(
            f"scales is {scales.dtype} {scales.shape}; for packed {packed.shape} it must be float32 {expected}"
        )
    if jnp.dtype(dtype) not in OUT_DTYPES:
        raise ValueError(f"dtype = {jnp.dtype(dtype)}; it must be bfloat16 or float32")
    faces = {"reference": e5m6.e5m6_unpack, "hopper": hopper_e5m6.e5m6_unpack, "tpu": tpu.e5m6_unpack}
    return choose("e5m6_unpack", implementation, faces)(packed, scales, m, jnp.dtype(dtype))


def _check_swiglu(hidden: Array, weight: Array | None, scale: str) -> None:
    _check_rows("hidden", hidden, 2 * GROUP)
    if weight is not None:
        check_array("weight", weight)
    if weight is not None and (weight.shape != hidden.shape[:1] or weight.dtype != jnp.float32):
        raise ValueError(
            f"weight has shape {weight.shape} and dtype {weight.dtype}; it must be float32 {hidden.shape[:1]}"
        )
    check_scale(scale)


def _check_rows(name: str, x: Array, multiple: int) -> None:
    check_array(name, x)
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be bfloat16")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}; it must have 2 dims of at least 1")
    if x.shape[1] % multiple:
        raise ValueError(
            f"{name} has shape {x.shape}: its last dim must be a multiple of {multiple}; pad it with zeros"
        )
