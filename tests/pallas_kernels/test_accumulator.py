"""The emulator of the limited accumulator: exact against integers, and the figures that the specification of this
project quotes.
"""

import math
from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments.studies import accumulator_card
from pallas_kernels import GROUP
from pallas_kernels.accumulator import ROUNDINGS, STEP, Accumulator, block_scaled_multiply, multiply
from pallas_kernels.quantized import LARGEST, Quantized, dequantize, encode, scale_of

E4M3 = ml_dtypes.float8_e4m3fn


def whole_tensor(x):
    """Return E4M3 with the largest magnitude at 448, the per-tensor quantisation of the quoted figures (their scale
    divides out).
    """
    return (x * (LARGEST / np.abs(x).max())).astype(E4M3)


def draw(distribution, shape, seed=0):
    rng = np.random.default_rng(seed)
    return {"normal": rng.standard_normal, "uniform": rng.random}[distribution](shape)


def tiles(x, scale):
    groups = x.astype(np.float32).reshape(x.shape[0], -1, GROUP)
    scales = scale_of(abs(groups).max(axis=-1), scale)
    # m a multiple of 4: no padding
    return Quantized(encode(groups, scales[..., None]).reshape(x.shape), scales.T, "tile")


def blocks(x):
    groups = x.astype(np.float32).reshape(x.shape[0] // GROUP, GROUP, x.shape[1] // GROUP, GROUP)
    scales = scale_of(abs(groups).max(axis=(1, 3)), "fp32")
    return Quantized(encode(groups, scales[:, None, :, None]).reshape(x.shape), scales, "block")


def errors(a, b, accumulator):
    """Return relative L2 error, and largest error over largest magnitude, in percent."""
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    error = multiply(a, b, accumulator) - exact
    return 100 * np.linalg.norm(error) / np.linalg.norm(exact), 100 * abs(error).max() / abs(exact).max()


def exponent_of(x):
    """Return floor(log2(x)) of a positive Fraction."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def dot_in_integers(a, b, fraction_bits, rounding):
    """The definition, one output at a time, in Python's integers."""
    cut = {"toward_zero": math.trunc, "floor": math.floor}[rounding]
    accumulator = Fraction(0)
    for step in range(0, len(a), STEP):
        summands = [
            Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[step:][:STEP], b[step:][:STEP], strict=True)
        ] + [accumulator]
        largest = max(abs(x) for x in summands)
        if largest:
            unit = Fraction(2) ** (exponent_of(largest) - fraction_bits)
            accumulator = sum(cut(x / unit) for x in summands) * unit
    return float(accumulator)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fraction_bits", [3, 13, 40])
def test_equals_integers(rounding, fraction_bits):
    rng = np.random.default_rng(fraction_bits)
    a, b = (rng.standard_normal((3, 128)) * 2.0 ** rng.integers(-6, 6, (3, 128)) for _ in range(2))  # down to denormals
    a, b = (x.clip(-LARGEST, LARGEST).astype(E4M3) for x in (a, b))
    a[:, :40] = 0  # the first step adds nothing
    a[:, 64:96] = LARGEST
    expected = [[dot_in_integers(row, column, fraction_bits, rounding) for column in b] for row in a]
    emulated = multiply(a, b, Accumulator(fraction_bits, rounding, None))
    np.testing.assert_array_equal(emulated, np.float32(expected))
    if fraction_bits == 3:
        assert (emulated != np.float32(a.astype(np.float64) @ b.astype(np.float64).T)).all()


# Relative L2 and largest error in percent at 64 x 64, K = 4096. The tolerance of the largest error is its range over
# eight seeds.
FIGURES = [
    ("normal", Accumulator(13, "toward_zero", None), 0.13, 0.29),
    ("normal", Accumulator(13, "floor", None), 4.0, 5.2),
    ("uniform", Accumulator(13, "toward_zero", None), 7.5, 7.7),
    ("uniform", Accumulator(14, "toward_zero", None), 3.5, 3.6),
    ("normal", Accumulator(13, "floor", 128), 0.16, None),
    ("uniform", Accumulator(13, "toward_zero", 128), 7.5 / 135, None),
]


@pytest.mark.parametrize(("distribution", "accumulator", "l2", "largest"), FIGURES)
def test_figures_at_4096(distribution, accumulator, l2, largest):
    a, b = (whole_tensor(draw(distribution, (64, 4096), seed)) for seed in (0, 1))
    measured_l2, measured_largest = errors(a, b, accumulator)
    assert measured_l2 == pytest.approx(l2, rel=0.05)  # they have two digits
    assert largest is None or measured_largest == pytest.approx(largest, rel=0.02 if distribution == "uniform" else 0.2)


@pytest.mark.parametrize(
    ("distribution", "rounding", "cure"),
    [("normal", "toward_zero", 10), ("normal", "floor", 25), ("uniform", "toward_zero", 135)],
)
def test_promotion_cures(distribution, rounding, cure):
    a, b = (whole_tensor(draw(distribution, (64, 4096), seed)) for seed in (2, 3))
    l2_of = {interval: errors(a, b, Accumulator(13, rounding, interval))[0] for interval in (None, 512, 128)}
    assert l2_of[None] / l2_of[128] == pytest.approx(cure, rel=0.1)
    assert l2_of[None] > l2_of[512] > l2_of[128]


def test_one_long_interval_is_no_promotion():
    a, b = (whole_tensor(draw("normal", (8, 512), seed)) for seed in (0, 1))
    np.testing.assert_array_equal(
        multiply(a, b, Accumulator(13, "floor", 512)), multiply(a, b, Accumulator(13, "floor", None))
    )
    np.testing.assert_array_equal(
        multiply(a, b, Accumulator(13, "floor", 4096)), multiply(a, b, Accumulator(13, "floor", None))
    )


def metric(x, y):
    """DeepGEMM's: 1 - 2<x, y> / (|x|^2 + |y|^2)."""
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_block_scaled_product_meets_the_metric(scale):
    x, w = draw("normal", (128, 1024)), draw("normal", (256, 1024), seed=1)
    a, b = tiles(x, scale), blocks(w)
    emulated = block_scaled_multiply(a, b, Accumulator()).astype(np.float64)
    assert 6.5e-4 < metric(emulated, x @ w.T) < 7.2e-4
    exact = np.asarray(dequantize(a), np.float64) @ np.asarray(dequantize(b), np.float64).T
    assert np.linalg.norm(emulated - exact) / np.linalg.norm(exact) < 1.5e-4  # what promotion leaves (0.013% above)


def test_scales_belong_to_their_rows_and_columns():
    x, w = draw("normal", (8, 256)) * 4.0 ** np.arange(8)[:, None], draw("normal", (256, 256), seed=1)
    w[:128, 128:] *= 100
    for b in (blocks(w), tiles(w, "pow2")):
        a = tiles(x, "fp32")
        exact = np.asarray(dequantize(a), np.float64) @ np.asarray(dequantize(b), np.float64).T
        error = block_scaled_multiply(a, b, Accumulator(30)) - exact
        for half in (slice(0, 128), slice(128, 256)):  # which differ in size by up to 100, as the rows do
            assert (np.linalg.norm(error[:, half], axis=1) < 3e-7 * np.linalg.norm(exact[:, half], axis=1)).all()


def test_nan_stays_visible():
    a, b = whole_tensor(draw("normal", (4, 256))), whole_tensor(draw("normal", (4, 256), seed=1))
    a[1, 130] = np.nan
    for interval in (None, 128):
        assert (
            np.isnan(multiply(a, b, Accumulator(13, "floor", interval))).all(axis=1) == [False, True, False, False]
        ).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "fraction_bits = 0"),
        ((45,), "fraction_bits = 45"),
        ((13, "nearest"), "'nearest'"),
        ((13, "floor", 48), "48"),
        ((13, "floor", 0), "0"),
    ],
)
def test_parameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Accumulator(*arguments)


def test_operands_are_checked():
    a, b = whole_tensor(draw("normal", (4, 256))), whole_tensor(draw("normal", (4, 128)))
    with pytest.raises(ValueError, match=r"\(4, 256\) and b \(4, 128\)"):
        multiply(a, b, Accumulator())
    with pytest.raises(ValueError, match="float32"):
        multiply(a.astype(np.float32), a, Accumulator())
    with pytest.raises(ValueError, match="multiple of 32"):
        multiply(a[:, :40], a[:, :40], Accumulator())
    q = jax.tree.map(np.asarray, tiles(draw("normal", (4, 256)), "fp32"))
    with pytest.raises(ValueError, match="must divide 128"):
        block_scaled_multiply(q, q, Accumulator(promotion_interval=256))


def test_the_product_that_a_card_never_promotes(on_hopper):
    a, b = accumulator_card.draw("standard_normal", 384)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    product = on_hopper(accumulator_card.unpromoted, a, b)  # the interpreter adds in FP32
    assert accumulator_card.relative(np.asarray(product), exact) < 1e-4
