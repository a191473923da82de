"""What a block-scaled FP8 tensor is: its values, its scales, how they are grouped, and the arithmetic of one group.

A tensor is cut into groups that share one scale, and each group uses the whole range of E4M3 (largest value 448):

    grouping "tile"    1 x 128: one row, 128 neighbours along the last dim. Activations and gradients. scales [k / 128,
                       pad4(m)]
    grouping "block"   128 x 128. Weights. The last block of a dim may be partial. scales [ceil(n / 128), ceil(k / 128)]

    scale = max|x| / 448                               or, "pow2", the next power of two: 2^ceil(log2(max|x| / 448))
    q     = round_to_nearest_even(x * (1 / scale))     x is approximately q * scale: the scale is the *multiplier* of
                                                       dequantisation

To the bit: max|x| / 448 is a product with the FP32 number nearest to 1 / 448, which is what XLA makes of the division
anyway, and each group takes one exact reciprocal of its scale. So kernels, references and NumPy agree in every bit.

The scales of tiles are transposed: a kernel that multiplies 128 rows at one step along k wants their 128 scales, and
finds them in one piece. Hopper's copy engine wants rows of a multiple of 16 bytes, so m is padded to a multiple of
four; the scales beyond m are 1.

Three decisions about special values, each of which has gone wrong silently in a serious system:

    zeros        max|x| counts as 2^-100 at least, so a group of zeros has a finite scale and zeros as values. The
                 released kernels' 1e-4 suits activations; gradients of a mean over millions of tokens all lie below it,
                 and would lose their bits
    rounding     a power-of-two scale is rounded up *before* it divides; rounding a stored FP32 scale later corrupts the
                 tensor
    NaN, inf     max|x| is NaN or inf, the scale is NaN, and so is everything that a product makes of the group: never a
                 silent 448

Worked example, a tile whose largest magnitude is 3: FP32 scale 3 / 448 = 0.00670, power-of-two scale 2^ceil(-7.22) =
2^-7 = 0.0078; with the second, 3 is stored as 384.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of E4M3 ("fn": finite, with NaN and without infinities)
SMALLEST_AMAX = 2.0**-100  # its scale and the inverse of that are normal numbers of FP32
ROW_ALIGNMENT = 4  # FP32 scales in 16 bytes

Scale = Literal["fp32", "pow2"]
SCALES = ("fp32", "pow2")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("grouping",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An FP8 tensor: `values` E4M3 [..., m, k], and `scales` FP32, laid out as the grouping says.

    Leading dims of the scales are those of the values.
    """

    values: Array
    scales: Array
    grouping: Literal["tile", "block"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape


# How a lowered kernel that takes or returns one is written to a file (`lowering.export_cache`).
jax.export.register_pytree_node_serialization(
    Quantized,
    serialized_name="pallas_kernels.Quantized",
    serialize_auxdata=lambda grouping: json.dumps(grouping).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(text)),
)


def largest_magnitude(x: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    """Return max|x| of FP32 `x` along `axis`, NaN where there is one.

    Found among the bits, as integers: they are in the order of the magnitudes with NaN above infinity, and XLA's
    floating-point maximum along a dim loses a NaN on CPUs (seen with jax 0.11.2 for rows of 128).
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims), jnp.float32)


def scale_of(amax: Array, scale: Scale, largest: float = LARGEST) -> Array:
    """Return the FP32 scale of groups whose largest magnitude is `amax` (FP32): NaN where `amax` is NaN or infinite.

    `largest` is the largest number of the format that is scaled, by default E4M3's.

    Plain arithmetic on FP32 and int32, the same inside a kernel and outside. The power of two comes from the bits of
    the quotient: adding the largest mantissa carries into the exponent exactly when the mantissa is not zero.
    """
    quotient = jnp.maximum(amax, SMALLEST_AMAX) * (1.0 / largest)
    if scale == "pow2":
        bits = jax.lax.bitcast_convert_type(quotient, jnp.int32)
        quotient = jax.lax.bitcast_convert_type((bits + 0x007FFFFF) & ~0x007FFFFF, jnp.float32)
    return jnp.where(amax < jnp.inf, quotient, jnp.nan)  # false for NaN too


def encode(x: Array, scale: Array) -> Array:
    """Return FP32 `x` as E4M3 in units of `scale`, whose shape broadcasts.

    Rounded to nearest even, saturating at 448, NaN where either is NaN.
    """
    return jnp.clip(x * (1.0 / scale), -LARGEST, LARGEST).astype(E4M3)


def decode(values: Array) -> Array:
    """Return E4M3 numbers as FP32, from their bits.

    Not by a cast: where a program casts to E4M3 and back, XLA for GPUs leaves out both (seen with jax 0.11.2, H100),
    and what was to be rounded is not. A barrier would prevent that, too, and fusion with it.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.int32)
    magnitude = bits & 0x7F
    # three bits of mantissa; 120 = 127 - 7
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    number = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    number = jnp.where(magnitude == 0x7F, jnp.nan, number)
    return jnp.where(bits < 0x80, number, -number)


def scales_shape(shape: tuple[int, ...], grouping: str) -> tuple[int, ...]:
    """Return the shape of the scales of values of `shape`."""
    *lead, m, k = shape
    if grouping == "tile":
        return (*lead, k // GROUP, pad_rows(m))
    return (*lead, -(-m // GROUP), -(-k // GROUP))


def pad_rows(m: int) -> int:
    """Return m rounded up to what the scales of tiles are padded to."""
    return -(-m // ROW_ALIGNMENT) * ROW_ALIGNMENT


def dequantize(q: Quantized) -> Array:
    """Return the FP32 tensor that `q` stands for, of its shape."""
    *_, m, k = q.shape
    if q.grouping == "tile":
        scales = jnp.repeat(q.scales.swapaxes(-1, -2)[..., :m, :], GROUP, axis=-1)
    else:
        scales = jnp.repeat(jnp.repeat(q.scales, GROUP, axis=-2)[..., :m, :], GROUP, axis=-1)[..., :k]
    return decode(q.values) * scales


def check_quantized(name: str, q: Quantized, grouping: str, num_dims: int) -> None:
    """Refuse an operand of the wrong kind, with its numbers.

    Raises:
        ValueError: not a `Quantized`; grouping, dtype, number of dims, an inner dim that is not a multiple of 128, or
            scales of the wrong layout.
    """
    if not isinstance(q, Quantized):
        raise ValueError(
            f"{name} is {describe(q)}; it must be Quantized: call pallas_kernels.quantize.quantize_{grouping}s"
        )
    check_array(f"{name}.values", q.values)
    check_array(f"{name}.scales", q.scales)
    if q.grouping != grouping:
        raise ValueError(
            f"{name} is grouped by {q.grouping!r}; this product takes {grouping!r} (quantize_{grouping}s makes it)"
        )
    if q.values.dtype != E4M3 or q.scales.dtype != jnp.float32:
        raise ValueError(
            f"{name} has values {q.values.dtype} and scales {q.scales.dtype}; it must have float8_e4m3fn and float32"
        )
    if q.values.ndim != num_dims:
        raise ValueError(f"{name} has shape {q.shape}; it must have {num_dims} dims")
    if q.shape[-1] % GROUP:
        raise ValueError(f"{name} has shape {q.shape}: its last dim must be a multiple of {GROUP}; pad it with zeros")
    expected = scales_shape(q.shape, grouping)
    if q.scales.shape != expected:
        raise ValueError(
            f"{name} has values {q.shape} and scales {q.scales.shape}; scales of {grouping}s are laid out as {expected}"
        )


def check_array(name: str, x: Any) -> None:
    """Refuse what is not an array (an abstract one is), before anything asks for its shape.

    Raises:
        ValueError: with what it is.
    """
    if not (hasattr(x, "shape") and hasattr(x, "dtype") and hasattr(x, "ndim")):
        raise ValueError(f"{name} is {describe(x)}; it must be an array: jax.numpy.asarray makes one")


def on_rows(kernel: Callable, num_rows: Any) -> Callable:
    """Return `kernel` for the first `num_rows` rows alone, or for all if that is None.

    Raises:
        ValueError: it is no int32 scalar.
    """
    if num_rows is None:
        return kernel
    check_array("num_rows", num_rows)
    if num_rows.dtype != jnp.int32 or num_rows.ndim:
        raise ValueError(f"num_rows is {describe(num_rows)}; it must be an int32 scalar, or None for all rows")
    return functools.partial(kernel, num_rows=num_rows)


def describe(x: Any) -> str:
    """Return the type of an operand, and of an array its dtype and shape."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"an array {x.dtype} {tuple(x.shape)}"
    return f"of type {type(x).__name__}"


def check_scale(scale: str) -> None:
    """Refuse an unknown kind of scale.

    Raises:
        ValueError: not "fp32" or "pow2".
    """
    if scale not in SCALES:
        raise ValueError(f"scale = {scale!r} is unknown; it must be one of {SCALES}")
