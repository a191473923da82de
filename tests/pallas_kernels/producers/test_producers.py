"""The fused producers: what they mean, and that every kernel makes the same bytes as the reference.

Hopper kernels run in GPU interpret mode with race detection on a machine of one multiprocessor, so that a few tiles
already go round the rings, and are lowered for CUDA at V3's shapes; TPU kernels run in TPU interpret mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.model import layers
from pallas_kernels import GROUP, producers
from pallas_kernels.hopper import stream
from pallas_kernels.producers import hopper, hopper_backward, hopper_norm, reference, tpu
from pallas_kernels.quantized import dequantize

EPS = 1e-6
STEP = 2.0**-4  # of E4M3: rounding moves a value by this part of itself at most
TPU = pltpu.InterpretParams()


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(stream, "num_multiprocessors", lambda: 1)


def draw(shape, seed=0, dtype=jnp.bfloat16):
    """Normal numbers, one channel of which is a hundred times larger."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x[..., 3] *= 100.0
    return jnp.asarray(x, dtype)


def swiglu_inputs(m, f, weighted):
    weight = jnp.asarray(np.random.default_rng(1).uniform(0.0, 1.0, m), jnp.float32) if weighted else None
    return draw((m, 2 * f)), draw((m, f), seed=2), weight


def same(kernel, expected, scale_ulps=0):
    """Require equal values and scales; scales may differ by units in the last place where FP32 sums are contracted
    differently.
    """
    assert kernel.shape == expected.shape
    assert kernel.grouping == expected.grouping == "tile"
    np.testing.assert_array_equal(bytes_of(kernel.values), bytes_of(expected.values))
    np.testing.assert_array_max_ulp(np.asarray(kernel.scales), np.asarray(expected.scales), maxulp=scale_ulps)


def same_gradients(kernel, expected):
    """Require equal results of `swiglu_backward_quantize`."""
    *kernel, kernel_weight = kernel
    *expected, expected_weight = expected
    for one, other in zip(kernel, expected, strict=True):
        same(one, other, scale_ulps=4)
    if expected_weight is None:
        assert kernel_weight is None
    else:
        np.testing.assert_allclose(kernel_weight, expected_weight, rtol=1e-5, atol=1e-4)


def bytes_of(values):
    return np.asarray(values).view(np.uint8)


def close(q, x):
    """Require that tiles stand for FP32 x up to E4M3's rounding: a part of each value, or half a subnormal step of the
    scale.
    """
    x = np.asarray(x, np.float32)
    scales = np.repeat(np.asarray(q.scales).T[: x.shape[0]], GROUP, axis=1)
    assert np.all(np.abs(np.asarray(dequantize(q)) - x) <= np.maximum(np.abs(x) * STEP * (1 + 1e-5), scales * 2.0**-10))


def test_norm_is_the_models():
    x, gain = draw((5, 256)), draw(256, seed=1, dtype=jnp.float32)
    np.testing.assert_array_equal(reference.rms_norm(x, gain, EPS), layers.rms_norm(x, gain, EPS))
    close(producers.rms_norm_quantize(x, gain, EPS, implementation="reference"), layers.rms_norm(x, gain, EPS))


def test_norm_is_numpys_rounding_compiled_or_not():
    """Rows of one magnitude, a power of two: their norm is exact, and what is quantised is the gain, rounded to BF16.

    XLA may leave out a cast to BF16 and back, but not on CPUs (jax 0.11.2), so that the program's text must show what
    forbids it.
    """
    signs, gain = (
        np.sign(np.random.default_rng(0).normal(size=(5, 256))),
        np.random.default_rng(1).normal(size=256).astype(np.float32),
    )
    x = jnp.asarray(signs * np.exp2(np.arange(5.0))[:, None], jnp.bfloat16)
    normed = (signs * gain).astype(ml_dtypes.bfloat16).astype(np.float32).reshape(5, 2, GROUP)
    scales = np.abs(normed).max(axis=2) * np.float32(1 / 448)
    values = (normed * (np.float32(1) / scales)[..., None]).astype(ml_dtypes.float8_e4m3fn).reshape(5, 256)

    def norm(x, gain):
        return producers.rms_norm_quantize(x, gain, 0.0, implementation="reference")

    for q in (norm(x, gain), jax.jit(norm)(x, gain)):
        np.testing.assert_array_equal(np.asarray(q.scales)[:, :5], scales.T)
        np.testing.assert_array_equal(bytes_of(q.values), bytes_of(values))
    assert "reduce_precision" in jax.jit(norm).lower(x, gain).as_text()


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_is_the_models(weighted):
    hidden, _, weight = swiglu_inputs(5, 256, weighted)
    expected = layers.swiglu(hidden.astype(jnp.float32).reshape(5, 2, 256))
    close(
        producers.swiglu_quantize(hidden, weight, implementation="reference"),
        expected * weight[:, None] if weighted else expected,
    )


def test_swiglu_is_quantised_without_a_rounding_to_bf16():
    hidden, _, _ = swiglu_inputs(64, 256, False)
    exact = np.asarray(layers.swiglu(hidden.astype(jnp.float32).reshape(64, 2, 256)))
    rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    scales = np.asarray(producers.swiglu_quantize(hidden, implementation="reference").scales)
    largest = np.abs(exact).reshape(64, 2, GROUP).max(axis=2).T
    np.testing.assert_allclose(scales, largest / 448, rtol=1e-6)
    assert np.abs(scales * 448 - np.abs(rounded).reshape(64, 2, GROUP).max(axis=2).T).max() > 1e-3 * largest.max()


def test_backward_is_the_derivative_of_forward():
    hidden, grad, weight = swiglu_inputs(6, 128, True)

    def product(hidden, weight):
        return jax.nn.silu(hidden[:, :128]) * hidden[:, 128:] * weight[:, None]

    _, transpose = jax.vjp(product, hidden.astype(jnp.float32), weight)
    expected, expected_weight = transpose(grad.astype(jnp.float32))
    rows, columns, activation, grad_weight = producers.swiglu_backward_quantize(
        hidden, grad, weight, implementation="reference"
    )
    close(rows, expected)
    close(columns, np.pad(np.asarray(expected).T, ((0, 0), (0, GROUP - 6))))
    close(activation, np.pad(np.asarray(product(hidden.astype(jnp.float32), weight)).T, ((0, 0), (0, GROUP - 6))))
    np.testing.assert_allclose(grad_weight, expected_weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_is_seen_and_stays_in_its_tile(poison):
    hidden, grad, _ = swiglu_inputs(130, 256, False)
    hidden = hidden.at[2, 5].set(poison)
    rows, columns, activation, _ = producers.swiglu_backward_quantize(hidden, grad, implementation="reference")
    tiles = producers.swiglu_quantize(hidden, implementation="reference")
    for q, tiles_hit in (
        (tiles, [(2, 0)]),
        (rows, [(2, 0), (2, 2)]),
        (columns, [(5, 0), (261, 0)]),
        (activation, [(5, 0)]),
    ):
        nan = np.isnan(dequantize(q))
        for row, group in tiles_hit:
            tile = nan[row, group * GROUP : (group + 1) * GROUP]
            assert tile.all()
            tile[...] = False
        assert not nan.any()


# Rows and columns, most of them with an odd m and rings that wrap. The kernel adds squares in another order than the
# reference, which may round a norm to the other neighbour in BF16, one of 29 x 7168: these have none.
NORMS = {
    "a partial last chunk": (19, 640, stream.TuningConfig(rows=4, warpgroups=2, stages=2, out_slots=1)),
    "chunks beyond the row": (13, 2432, stream.TuningConfig(rows=4, warpgroups=3, stages=1, out_slots=2)),
    "a warpgroup beyond the row": (9, 2432, stream.TuningConfig(rows=4, warpgroups=4, stages=2, out_slots=1)),
    "narrow rows in tall tiles": (50, 256, stream.TuningConfig(rows=16, warpgroups=1, stages=2, out_slots=1)),
    "two blocks": (67, 1536, stream.TuningConfig(blocks=2, rows=8, warpgroups=3, stages=3, out_slots=1)),
    "V3's width": (9, 7168, None),
    "no room for gain and chunks": (6, hopper_norm.WIDEST_ROW - GROUP, None),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm_on_hopper(case, on_hopper):
    m, k, config = NORMS[case]
    x, gain = draw((m, k)), draw(k, seed=1, dtype=jnp.float32)
    same(
        on_hopper(hopper_norm.rms_norm_quantize, x, gain, EPS, "pow2", config),
        reference.rms_norm_quantize(x, gain, EPS, "pow2"),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_on_hopper(weighted, on_hopper):
    hidden, _, weight = swiglu_inputs(35, 640, weighted)
    config = dataclasses.replace(hopper.SWIGLU_QUANTIZE, warpgroups=2, stages=2, out_slots=2)
    same(
        on_hopper(hopper.swiglu_quantize, hidden, weight, "fp32", config),
        reference.swiglu_quantize(hidden, weight, "fp32"),
    )


@pytest.mark.parametrize(("m", "f", "weighted"), [(19, 256, True), (130, 128, True), (130, 128, False)])
def test_swiglu_backward_on_hopper(m, f, weighted, on_hopper):
    hidden, grad, weight = swiglu_inputs(m, f, weighted)
    same_gradients(
        on_hopper(hopper_backward.swiglu_backward_quantize, hidden, grad, weight, "fp32"),
        reference.swiglu_backward_quantize(hidden, grad, weight, "fp32"),
    )


def test_rows_that_hold_nothing_cost_nothing_on_hopper(on_hopper):
    """The first rows are as ever, to the end of their tile; tiles behind them are not written."""
    hidden, grad, weight = swiglu_inputs(140, 128, True)
    of_all, few = reference.swiglu_quantize(hidden, weight, "fp32"), jnp.int32(100)
    got = on_hopper(lambda *o: hopper.swiglu_quantize(*o[:3], num_rows=o[3]), hidden, weight, "fp32", few)
    np.testing.assert_array_equal(bytes_of(got.values)[:100], bytes_of(of_all.values)[:100])
    assert (bytes_of(got.values)[104:] != bytes_of(of_all.values)[104:]).mean() > 0.9
    kernel = on_hopper(
        lambda *o: hopper_backward.swiglu_backward_quantize(*o[:4], num_rows=o[4]), hidden, grad, weight, "fp32", few
    )
    expected = reference.swiglu_backward_quantize(hidden, grad, weight, "fp32")
    for one, other, rows in zip(kernel[:3], expected[:3], (0, 1, 1), strict=True):
        one, other = (np.moveaxis(bytes_of(q.values), rows, 0) for q in (one, other))
        np.testing.assert_array_equal(one[:128], other[:128])
        assert (one[128:140] != other[128:140]).mean() > 0.9
    np.testing.assert_allclose(kernel[3][:128], expected[3][:128], rtol=1e-5, atol=1e-4)


def test_infinity_on_hopper(on_hopper):
    hidden, grad, _ = swiglu_inputs(3, 128, False)
    inputs = hidden.at[2, 9].set(jnp.inf), grad, None, "fp32"
    *kernel, _ = on_hopper(hopper_backward.swiglu_backward_quantize, *inputs)
    *expected, _ = reference.swiglu_backward_quantize(*inputs)
    for one, other, tiles in zip(kernel, expected, (2, 2, 1), strict=True):
        assert np.isnan(dequantize(one)).sum() == tiles * GROUP
        np.testing.assert_array_equal(np.isnan(dequantize(one)), np.isnan(dequantize(other)))


def lower(f, *shapes):
    return (
        jax.jit(f)
        .trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


@pytest.mark.parametrize("k", [128, 512, 1536, 7168, 7680, hopper_norm.WIDEST_ROW])
def test_norm_lowers_for_hopper(k):
    text = lower(
        lambda x, gain: hopper_norm.rms_norm_quantize(x, gain, EPS, "fp32"),
        ((4097, k), jnp.bfloat16),
        ((k,), jnp.float32),
    )
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(("m", "f"), [(1, 128), (4097, 2048), (4096, 18432)])
def test_swiglu_lowers_for_hopper(m, f):
    hidden, grad, weight = ((m, 2 * f), jnp.bfloat16), ((m, f), jnp.bfloat16), ((m,), jnp.float32)
    assert "mosaic_gpu" in lower(lambda h, w: hopper.swiglu_quantize(h, w, "fp32"), hidden, weight)
    assert "mosaic_gpu" in lower(
        lambda h, g, w: hopper_backward.swiglu_backward_quantize(h, g, w, "fp32"), hidden, grad, weight
    )


def test_a_nan_is_not_lost_on_tpu():
    """XLA's maximum along 128 floats may lose one on a CPU; every face takes its maxima among the bits."""
    hidden, grad, weight = swiglu_inputs(3, 128, True)
    poisoned = hidden.at[2, 9].set(jnp.nan)
    inputs = poisoned, grad, weight, "fp32"
    kernel, expected = tpu.swiglu_backward_quantize(*inputs, TPU), reference.swiglu_backward_quantize(*inputs)
    for one, other in zip(kernel[:3], expected[:3], strict=True):
        assert np.isnan(dequantize(other)).any()
        np.testing.assert_array_equal(np.isnan(dequantize(one)), np.isnan(dequantize(other)))
    packed = tpu.e5m6_pack(poisoned, TPU)
    assert np.isnan(producers.e5m6_unpack(*packed, m=3)).sum() == GROUP


def test_norm_on_tpu():
    x, gain = draw((19, 384)), draw(384, seed=1, dtype=jnp.float32)
    same(tpu.rms_norm_quantize(x, gain, EPS, "fp32", TPU), reference.rms_norm_quantize(x, gain, EPS, "fp32"))


@pytest.mark.parametrize(("m", "f", "weighted"), [(130, 128, True), (19, 1024, False)])
def test_swiglu_on_tpu(m, f, weighted):
    hidden, grad, weight = swiglu_inputs(m, f, weighted)
    same(tpu.swiglu_quantize(hidden, weight, "pow2", TPU), reference.swiglu_quantize(hidden, weight, "pow2"))
    same_gradients(
        tpu.swiglu_backward_quantize(hidden, grad, weight, "pow2", TPU),
        reference.swiglu_backward_quantize(hidden, grad, weight, "pow2"),
    )


X, GAIN, HIDDEN, GRAD = draw((3, 128)), jnp.ones(128), draw((3, 256)), draw((3, 128))
MISTAKES = {
    "x has dtype float32": lambda: producers.rms_norm_quantize(X.astype(jnp.float32), GAIN, EPS),
    "multiple of 128; pad": lambda: producers.rms_norm_quantize(X[:, :100], GAIN[:100], EPS),
    r"gain has shape \(64,\)": lambda: producers.rms_norm_quantize(X, GAIN[:64], EPS),
    "scale = 'int8'": lambda: producers.swiglu_quantize(HIDDEN, scale="int8"),
    "multiple of 256; pad": lambda: producers.swiglu_quantize(X),
    r"weight has shape \(2,\)": lambda: producers.swiglu_backward_quantize(HIDDEN, GRAD, jnp.ones(2)),
    r"grad has shape \(3, 256\)": lambda: producers.swiglu_backward_quantize(HIDDEN, HIDDEN),
    "2 dims of at least 1": lambda: producers.swiglu_quantize(HIDDEN[:0]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused_with_their_numbers(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()
