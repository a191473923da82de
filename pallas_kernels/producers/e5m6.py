"""E5M6: attention outputs kept for the backward pass in 12 bits.

DeepSeek-V3, arXiv 2412.19437, section 3.3.3, "a customized E5M6".

The output of attention is read twice, by the o projection and by attention's own backward pass, which FP8 would harm.
So it is cached in 1 sign, 5 exponent and 6 mantissa bits, with a power-of-two scale per tile of 1 x 128 that divides
without a rounding. The report leaves bias and packing open; here the format is FP16 with its mantissa rounded to 6
bits, nearest even:

    exponent 1..30     (1 + mantissa / 64) * 2^(exponent - 15)       largest 65024, smallest normal 2^-14
    exponent 0         mantissa * 2^-20                              zero has a sign
    exponent 31        NaN; there is no infinity

    scale = 2^ceil(log2(max|x| / 65024))

The largest of a tile lands in (32512, 65024]; max|x| counts as 2^-100 at least. Where a tile has a NaN or an infinity,
its scale and all of its values are NaN, as with E4M3.

A value is off by at most 2^-7 of itself, or by 2^-21 of the scale, which is about 2^-37 of the tile's largest.

Packing: a tile's 128 codes of 12 bits lie in 192 bytes as two planes, so that no lane of a kernel ever handles a third
of a byte:

    byte i         0 <= i < 128    the low 8 bits of code i
    byte 128 + i   0 <= i < 64     the high 4 bits of code i, and above them the high 4 bits of code i + 64

Three bytes in a row for two neighbours would be the same size; the planes need no shuffles.
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import GROUP, quantized
from pallas_kernels.quantized import pad_rows

LARGEST = 65024.0  # (2 - 2^-6) * 2^15
HALF = GROUP // 2
TILE_BYTES = GROUP + HALF  # 12 bits each
NAN = 0x7FF  # exponent and mantissa all ones
SIGN = 0x800
MANTISSA_BITS, BIAS = 6, 15
SMALLEST_NORMAL = 2.0**-14
DROPPED = 23 - MANTISSA_BITS  # mantissa bits that FP32 has more
REBIAS = (127 - BIAS) << MANTISSA_BITS
ROUNDER, ROUNDER_BITS = 8.0, 0x41000000  # neighbours in FP32 are 2^-20 apart there: the subnormals' step


def scale_of(amax: Array) -> Array:
    """Return the power-of-two scale of tiles whose largest magnitude is FP32 `amax`, NaN where that is not finite."""
    return quantized.scale_of(amax, "pow2", LARGEST)


def encode(x: Array) -> Array:
    """Return int32 codes of 12 bits of FP32 `x`, already divided by its scale: |x| <= 65024 up to a rounding, or NaN.

    Normal numbers are rounded on their bits; subnormal ones by an addition that leaves multiples of 2^-20. Rounding up
    out of either range gives the next code by itself, for codes are in the order of magnitudes, with NaN beyond the
    last.
    """
    magnitude = jnp.abs(x)
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    odd = (bits >> DROPPED) & 1
    normal = ((bits + ((1 << (DROPPED - 1)) - 1) + odd) >> DROPPED) - REBIAS
    subnormal = lax.bitcast_convert_type(magnitude + ROUNDER, jnp.int32) - ROUNDER_BITS
    code = jnp.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    return jnp.minimum(code, NAN) | ((lax.bitcast_convert_type(x, jnp.int32) >> 20) & SIGN)


def decode(code: Array) -> Array:
    """Return the FP32 values of int32 codes: exact."""
    magnitude = code & NAN
    normal = lax.bitcast_convert_type((magnitude + REBIAS) << DROPPED, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * (SMALLEST_NORMAL / (1 << MANTISSA_BITS))
    value = jnp.where(magnitude < (1 << MANTISSA_BITS), subnormal, normal)
    value = jnp.where(magnitude >= (31 << MANTISSA_BITS), jnp.nan, value)
    return jnp.where((code & SIGN) != 0, -value, value)


def pack(first: Array, second: Array) -> tuple[Array, Array, Array]:
    """Return the bytes (int32, 0 to 255) of codes 0..63 and 64..127 of tiles.

    They are two runs of the low plane, and the high plane.
    """
    return first & 0xFF, second & 0xFF, (first >> 8) | ((second >> 8) << 4)


def unpack(low_first: Array, low_second: Array, high: Array) -> tuple[Array, Array]:
    """Return the codes 0..63 and 64..127 of tiles from their bytes (int32): the inverse of `pack`."""
    return low_first | ((high & 0xF) << 8), low_second | ((high >> 4) << 8)


def e5m6_pack(x: Array) -> tuple[Array, Array]:
    """Return x [m, k] as uint8 [m, k * 3 // 2] and FP32 scales [k / 128, pad4(m)]: the reference."""
    m, k = x.shape
    tiles = x.astype(jnp.float32).reshape(m, k // GROUP, GROUP)
    scales = scale_of(quantized.largest_magnitude(tiles, axis=2))
    codes = encode(tiles * (1.0 / scales[:, :, None]))
    planes = jnp.concatenate(pack(codes[:, :, :HALF], codes[:, :, HALF:]), axis=2)
    packed = planes.astype(jnp.uint8).reshape(m, k // GROUP * TILE_BYTES)
    return packed, jnp.pad(scales.T, ((0, 0), (0, pad_rows(m) - m)), constant_values=1.0)


def e5m6_unpack(packed: Array, scales: Array, m: int, dtype: jnp.dtype) -> Array:
    """Return [m, k] of `dtype`: the reference."""
    planes = packed.reshape(m, -1, TILE_BYTES).astype(jnp.int32)
    codes = jnp.concatenate(unpack(planes[:, :, :HALF], planes[:, :, HALF:GROUP], planes[:, :, GROUP:]), axis=2)
    return (decode(codes) * scales.T[:m, :, None]).reshape(m, -1).astype(dtype)
