"""Quantisation: what NumPy and ml_dtypes give to the bit, for every kind of number; kernels equal the reference to the
bit.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP, quantize
from pallas_kernels.grouped import reference as grouped_reference
from pallas_kernels.hopper import stream
from pallas_kernels.matmul import reference as matmul_reference
from pallas_kernels.quantize import hopper, hopper_transposed
from pallas_kernels.quantize import reference as quantize_reference
from pallas_kernels.quantized import E4M3, Quantized, decode, dequantize

M, K = 70, 256  # m is a multiple of neither 64 nor 4
DTYPES = (jnp.bfloat16, jnp.float32)
ROWS = (3, 0, 69, 70, -1, 5, 5, 2**30, -(2**31), 10, 33)  # in and out of order, doubled, outside on both sides


def sample(dtype=jnp.bfloat16, shape=(M, K), seed=0) -> jax.Array:
    """Outlier channels, and rows with each special value: NaN, infinities, zeros, denormals, the largest and the
    smallest normal number.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp2(6 * rng.normal(size=shape[-1]))
    x[..., 0, 7] = np.nan
    x[..., 1, 100] = -np.inf
    x[..., 2, :] = 0
    x[..., 3, :] = 1e-39 * rng.normal(size=shape[-1])
    x[..., 4, :] = 3e38 * rng.uniform(-1, 1, size=shape[-1])
    x[..., 5, :] *= 1e-37
    x[..., 6, :] = 448 * np.sign(x[..., 6, :])
    return jnp.asarray(x, jnp.float32).astype(dtype)


def numpy_scales(amax: np.ndarray, scale: str) -> np.ndarray:
    quotient = np.maximum(amax, np.float32(2.0**-100)) * np.float32(1 / 448)
    if scale == "pow2":
        mantissa, exponent = np.frexp(quotient)
        quotient = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return np.where(np.isfinite(amax), quotient, np.float32(np.nan)).astype(np.float32)


def numpy_tiles(x: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    scales = numpy_scales(np.abs(groups).max(axis=2), scale)
    with np.errstate(invalid="ignore"):
        values = np.clip(groups * (np.float32(1) / scales)[..., None], -448, 448)
    return values.reshape(x.shape).astype(ml_dtypes.float8_e4m3fn), np.pad(
        scales.T, ((0, 0), (0, -len(x) % 4)), constant_values=1
    )


def assert_same(actual, expected) -> None:
    """Equal in shape, dtype and every bit; NaN stands for any NaN."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        a, e = np.asarray(a).astype(np.float32), np.asarray(e).astype(np.float32)
        np.testing.assert_array_equal(a, e)
        np.testing.assert_array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(e[~np.isnan(e)]))


@functools.cache
def cases() -> dict:
    """Each operation with its operands: all that a kernel must do."""
    tiles = {f"tiles {dtype.dtype}": (quantize.quantize_tiles, (sample(dtype),)) for dtype in DTYPES}
    both = {f"both {dtype.dtype}": (quantize.quantize_tiles_both, (sample(dtype),)) for dtype in DTYPES}
    rows = {
        f"rows {dtype.dtype}": (quantize.quantize_rows, (sample(dtype), jnp.array(ROWS, jnp.int32))) for dtype in DTYPES
    }
    blocks = {
        "blocks": (quantize.quantize_blocks, (sample(jnp.float32, (200, K)),)),
        "blocks, n and k partial": (quantize.quantize_blocks, (sample(jnp.float32, (M, 200)),)),
        "blocks of groups": (quantize.quantize_blocks, (sample(jnp.bfloat16, (2, M, K)),)),
    }
    requantized = {
        "requantized": (
            quantize.requantize_transposed,
            (quantize.quantize_tiles(sample(), implementation="reference"),),
        )
    }
    return tiles | both | rows | blocks | requantized


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_numpy_to_the_bit(dtype, scale):
    x = sample(dtype)
    q = quantize.quantize_tiles(x, scale=scale, implementation="reference")
    assert_same((q.values, q.scales), numpy_tiles(np.asarray(x), scale))


def test_every_value_near_a_rounding_boundary_is_rounded_like_numpy():
    """All of BF16's numbers below 448, each in a group whose scale is 1: ties, subnormals and both signs."""
    bits = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    numbers = bits[np.isfinite(bits.astype(np.float32)) & (np.abs(bits.astype(np.float32)) <= 448)]
    x = np.full((-(-len(numbers) // 127), GROUP), 448, ml_dtypes.bfloat16)
    x[:, 1:].flat[: len(numbers)] = numbers
    q = quantize.quantize_tiles(jnp.asarray(x), implementation="reference")
    assert_same((q.values, q.scales), numpy_tiles(x, "fp32"))


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_blocks_are_numpy_to_the_bit(scale):
    w = np.asarray(sample(jnp.float32, (200, 300)))
    q = quantize.quantize_blocks(jnp.asarray(w), scale=scale, implementation="reference")
    assert q.scales.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        at = np.s_[i * GROUP : (i + 1) * GROUP, j * GROUP : (j + 1) * GROUP]
        block_scale = numpy_scales(np.abs(w[at]).max(), scale)
        with np.errstate(invalid="ignore"):
            values = np.clip(w[at] * (np.float32(1) / block_scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert_same((q.values[at], q.scales[i, j]), (values, block_scale))


def test_every_code_is_decoded_as_by_numpy():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(decode(jnp.asarray(codes)), codes.astype(np.float32))
    assert np.signbit(decode(jnp.asarray(codes[0x80:0x81]))).all()  # -0


def casts_from_fp8(jaxpr) -> list:
    """All operations of a program, inner programs included, that cast E4M3 to another floating-point number."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type" and equation.invars[0].aval.dtype == E4M3:
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += casts_from_fp8(getattr(inner, "jaxpr", inner))
    return found


def test_what_was_rounded_is_not_cast_back():
    """XLA for GPUs leaves out a cast to E4M3 that a cast from it follows, in one program: references would not quantise
    at all.
    """
    x, w, sizes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((256, 256), jnp.float32), ((2, 128, 256), jnp.float32), ((2,), jnp.int32))
    )

    def tiles(x):
        return quantize_reference.quantize_tiles(x, "fp32")

    def blocks(w):
        return quantize_reference.quantize_blocks(w, "fp32")

    programs = {
        "the search itself": (lambda x: tiles(x).values.astype(jnp.float32), (x,)),
        "dequantize": (lambda x: dequantize(tiles(x)), (x,)),
        "matmul": (lambda x: matmul_reference.matmul(tiles(x), blocks(x)), (x,)),
        "grouped": (lambda x, w, sizes: grouped_reference.grouped_matmul(tiles(x), blocks(w), sizes), (x, w, sizes)),
        "requantised": (lambda x: quantize_reference.requantize_transposed(tiles(x), "pow2"), (x,)),
    }
    casts = {
        name: len(casts_from_fp8(jax.make_jaxpr(program)(*arguments).jaxpr))
        for name, (program, arguments) in programs.items()
    }
    assert casts == {name: int(name == "the search itself") for name in programs}


def test_transposed_forms_are_the_tiles_of_the_transpose():
    x = sample()
    rows, columns = quantize.quantize_tiles_both(x, implementation="reference")
    transposed = np.pad(np.asarray(x).T, ((0, 0), (0, GROUP - M)))
    assert_same(rows, quantize.quantize_tiles(x, implementation="reference"))
    assert_same((columns.values, columns.scales), numpy_tiles(transposed, "fp32"))
    again = quantize.requantize_transposed(rows, implementation="reference")
    transposed = np.pad(np.asarray(dequantize(rows)).T, ((0, 0), (0, GROUP - M)))
    assert_same((again.values, again.scales), numpy_tiles(transposed, "fp32"))


def test_requantising_powers_of_two_changes_nothing_but_what_becomes_subnormal():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(GROUP, GROUP)), jnp.bfloat16)
    q = quantize.quantize_tiles(x, scale="pow2", implementation="reference")
    again = quantize.requantize_transposed(q, scale="pow2", implementation="reference")
    before, after = np.asarray(dequantize(q)), np.asarray(dequantize(again)).T
    normal = np.abs(before) >= np.asarray(again.scales)[0, None, :].max() * 2.0**-6
    assert normal.mean() > 0.9
    np.testing.assert_array_equal(after[normal], before[normal])


def test_rows_outside_are_zeros_and_leak_no_nan():
    x = jnp.full((4, GROUP), jnp.nan, jnp.bfloat16).at[2].set(1)
    q = quantize.quantize_rows(x, jnp.array([2, -1, 4, 2**31 - 1, -4], jnp.int32), implementation="reference")
    np.testing.assert_array_equal(np.asarray(dequantize(q)), np.array([[1.0], [0], [0], [0], [0]]) * np.ones(GROUP))
    np.testing.assert_array_equal(np.asarray(q.scales[0, 5:]), 1)


@pytest.mark.parametrize("case", cases())
def test_kernels_are_the_reference_to_the_bit(case, on_hopper):
    operation, args = cases()[case]
    operation = functools.partial(
        operation, scale="pow2" if case in ("tiles bfloat16", "both float32", "blocks") else "fp32"
    )
    expected = operation(*args, implementation="reference")
    assert_same(on_hopper(operation, *args, implementation="hopper"), expected)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        assert_same(operation(*args, implementation="tpu"), expected)


@pytest.mark.parametrize("warpgroups", [1, 2])
@pytest.mark.parametrize(
    "operation", ["quantize_tiles", "quantize_blocks", "quantize_tiles_both", "requantize_transposed", "quantize_rows"]
)
def test_one_block_takes_more_tiles_than_its_ring_has_slots(operation, warpgroups, monkeypatch, on_hopper):
    monkeypatch.setattr(stream, "num_multiprocessors", lambda: 1)
    config = stream.TuningConfig(blocks=1, warpgroups=warpgroups, stages=2, out_slots=2)
    x = sample(shape=(140, 3 * GROUP))  # a tile at the edge, and one whose second warpgroup has no rows
    tiles = quantize.quantize_tiles(x, implementation="reference")
    args = {"requantize_transposed": (tiles,), "quantize_rows": (x, jnp.arange(33, dtype=jnp.int32))}.get(
        operation, (x,)
    )
    module = hopper if hasattr(hopper, operation) else hopper_transposed
    actual = on_hopper(getattr(module, operation), *args, "fp32", config)
    assert_same(actual, getattr(quantize, operation)(*args, scale="fp32", implementation="reference"))


def test_rows_that_hold_nothing_are_not_requantised(monkeypatch, on_hopper):
    monkeypatch.setattr(stream, "num_multiprocessors", lambda: 1)
    tiles = quantize.quantize_tiles(sample(shape=(300, GROUP)), implementation="reference")
    got = on_hopper(lambda q, n: hopper_transposed.requantize_transposed(q, "fp32", num_rows=n), tiles, jnp.int32(130))
    of_all = quantize.requantize_transposed(tiles, implementation="reference")
    got, of_all = (np.asarray(q.values).view(np.uint8) for q in (got, of_all))
    np.testing.assert_array_equal(got[:, :256], of_all[:, :256])
    assert (got[:, 256:300] != of_all[:, 256:300]).mean() > 0.9


@pytest.mark.parametrize("case", cases())
def test_hopper_kernels_lower_for_cuda(case):
    operation, args = cases()[case]
    program = (
        jax.jit(functools.partial(operation, implementation="hopper"))
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert program.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize.quantize_tiles(jnp.zeros((4, 100))), "(4, 100).*multiple of 128"),
        (lambda: quantize.quantize_tiles(jnp.zeros((4, 128), jnp.float16)), "float16.*bfloat16 or float32"),
        (lambda: quantize.quantize_tiles(jnp.zeros((1, 4, 128))), "must have 2 dims"),
        (lambda: quantize.quantize_tiles(jnp.zeros((0, 128))), "no dim may be 0"),
        (lambda: quantize.quantize_tiles(jnp.zeros((4, 128)), scale="fp16"), "fp16.*must be one of"),
        (lambda: quantize.quantize_blocks(jnp.zeros(128)), "must have 2 or 3 dims"),
        (lambda: quantize.quantize_rows(jnp.zeros((4, 128)), jnp.zeros(4)), "float32.*must be int32"),
        (
            lambda: quantize.requantize_transposed(Quantized(jnp.zeros((5, 128), E4M3), jnp.ones((1, 5)), "tile")),
            r"laid out as \(1, 8\)",
        ),
    ],
)
def test_wrong_operands_are_refused_with_their_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
