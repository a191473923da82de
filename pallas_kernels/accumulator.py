"""An emulator of Hopper's limited FP8 accumulator, and why DeepSeek-V3 promotes sums every 128 along k.

An FP8 product on Hopper does not add in FP32 (arXiv 2412.19437, section 3.5.2). Each step takes 32 products per output:

    1. The 32 products, exact, and the accumulator are shifted to the largest exponent among them.
    2. Of each, `fraction_bits` bits behind the leading one of the largest are kept; what was shifted out is cut off.
    3. The 33 integers that remain are added without error, and are the new accumulator.

Worked example with 3 fraction bits: accumulator 8, products 1.5 and 0.75. The largest exponent is 3, so the last bit
kept is worth 2^(3 - 3) = 1: they become 8 + 1 + 0 = 9 instead of 10.25. The larger the sum has grown, the more of each
product is lost; with data of one sign all losses point the same way, and the error grows with k.

The cure ("promotion", section 3.3.2): every 128 along k, four steps, the accumulator is added to an FP32 sum and starts
again at zero.

Sources disagree about the parameters. The report says that the top 14 bits are kept, Zhao et al. (arXiv 2505.09343) 13
fraction bits, and nobody says which way negative numbers are cut: "toward_zero" acts on sign and magnitude, "floor" on
two's complement. Hence they are parameters; the card decides. An interpreter decides nothing: it accumulates in FP32,
and so does XLA on a CPU.

Two details that no source states, and that matter little: the exponent of a product is that of its value (the sum of
its factors' exponents, one less where the significands' product reaches two, changes the floor's promoted error by 4%
and nothing else), and the accumulator is read as the sum stands, since only the next alignment cuts it.

NumPy in FP64, where every quantity above is exact: products of E4M3 have 8 significant bits, and the integers stay
below 2^53. Doing the same in int32 would be no shorter and not faster; a test compares with Python's integers.
"""

import dataclasses
from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, Quantized

STEP = 32  # elements along k that one FP8 wgmma adds at once
ROUNDINGS = {"toward_zero": np.trunc, "floor": np.floor}
MOST_FRACTION_BITS = 44  # 33 summands of 45 bits and a sign stay below 2^53


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """What the emulator adds with.

    Attributes:
        fraction_bits: kept behind the leading bit of the largest summand; 13 by Zhao et al.
        rounding: "toward_zero" or "floor" (two's complement).
        promotion_interval: elements along k between additions to the FP32 sum, a multiple of 32; None never promotes.
    """

    fraction_bits: int = 13
    rounding: Literal["toward_zero", "floor"] = "toward_zero"
    promotion_interval: int | None = GROUP

    def __post_init__(self):
        if not 1 <= self.fraction_bits <= MOST_FRACTION_BITS:
            raise ValueError(
                f"fraction_bits = {self.fraction_bits} must be from 1 to {MOST_FRACTION_BITS}, where FP64 emulates it"
                " exactly"
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding = {self.rounding!r} must be one of {tuple(ROUNDINGS)}")
        if self.promotion_interval is not None and (self.promotion_interval < STEP or self.promotion_interval % STEP):
            raise ValueError(
                f"promotion_interval = {self.promotion_interval} must be a positive multiple of {STEP}, or None"
            )


def multiply(a: ArrayLike, b: ArrayLike, accumulator: Accumulator) -> np.ndarray:
    """Return a b^T in FP32 [m, n] as the limited accumulator adds it, without scales.

    Takes 256 * m * n bytes of memory; 64 x 64 x 4096 takes a tenth of a second.

    Args:
        a: E4M3 [m, k], k a multiple of 32.
        b: E4M3 [n, k].
        accumulator: its parameters.

    Raises:
        ValueError: dtypes or shapes.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != E4M3 or b.dtype != E4M3:
        raise ValueError(f"a is {a.dtype} and b is {b.dtype}; the emulator adds products of float8_e4m3fn")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] % STEP:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; they must be [m, k] and [n, k] with k a multiple of {STEP}"
        )
    k = a.shape[1]
    a, b = a.astype(np.float64), b.astype(np.float64)
    interval = accumulator.promotion_interval or k
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for start in range(0, k, interval):
        partial = np.zeros(total.shape)
        for step in range(start, min(start + interval, k), STEP):
            products = a[:, None, step : step + STEP] * b[:, step : step + STEP]
            partial = _add_step(partial, products, accumulator)
        total += partial.astype(np.float32)
    return total


def _add_step(partial: np.ndarray, products: np.ndarray, accumulator: Accumulator) -> np.ndarray:
    """Return `partial` [m, n] plus `products` [m, n, 32], as the accumulator adds them.

    All are aligned to the largest and cut to units of its last fraction bit.
    """
    cut = ROUNDINGS[accumulator.rounding]
    _, exponent = np.frexp(np.maximum(np.abs(products).max(axis=-1), np.abs(partial)))  # of a significand in [0.5, 1)
    units = np.ldexp(1.0, accumulator.fraction_bits - (exponent - 1))
    return (cut(products * units[..., None]).sum(axis=-1) + cut(partial * units)) / units


def block_scaled_multiply(a: Quantized, b: Quantized, accumulator: Accumulator) -> np.ndarray:
    """Return a b^T in FP32 [m, n] as the Hopper kernels compute it: each partial sum of 128 along k is scaled.

    Args:
        a: tiles [m, k].
        b: blocks or tiles [n, k].
        accumulator: its promotion interval must divide 128, since each partial sum has scales of its own.

    Raises:
        ValueError: the promotion interval, or what `multiply` refuses.
    """
    if accumulator.promotion_interval is None or GROUP % accumulator.promotion_interval:
        raise ValueError(
            f"promotion_interval = {accumulator.promotion_interval} must divide {GROUP}: scales change every {GROUP}"
            " along k"
        )
    a_values, b_values = np.asarray(a.values), np.asarray(b.values)
    a_scales, b_scales = _scales_of_rows(a), _scales_of_rows(b)
    total = np.zeros((a_values.shape[0], b_values.shape[0]), np.float32)
    for group in range(a_values.shape[1] // GROUP):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        partial = multiply(a_values[:, columns], b_values[:, columns], accumulator)
        total += partial * (a_scales[group][:, None] * b_scales[group])
    return total


def _scales_of_rows(q: Quantized) -> np.ndarray:
    """Return FP32 [k / 128, m]: the scale of every row in every group along k."""
    m = q.shape[0]
    scales = np.asarray(q.scales)
    return scales[:, :m] if q.grouping == "tile" else np.repeat(scales, GROUP, axis=0)[:m].T
