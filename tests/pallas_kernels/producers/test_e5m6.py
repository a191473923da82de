"""E5M6: every code against its definition, rounding against NumPy, and the kernels' bytes against the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import producers
from pallas_kernels.hopper import stream
from pallas_kernels.producers import e5m6, hopper_e5m6, tpu

TPU = pltpu.InterpretParams()


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(stream, "num_multiprocessors", lambda: 1)


def wide(shape, seed=0):
    """BF16 whose magnitudes spread over far more than a tile's range, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(8.0 * rng.standard_normal(shape))
    x[0, :2] = 0.0, -0.0
    return jnp.asarray(x, jnp.bfloat16)


def magnitudes():
    """The value of every code below NaN, from the definition: FP16's bits with four mantissa bits more."""
    codes = np.arange(31 << e5m6.MANTISSA_BITS)
    return codes, (codes << 4).astype(np.uint16).view(np.float16).astype(np.float32)


def test_codes_are_fp16_with_a_shorter_mantissa():
    codes, values = magnitudes()
    np.testing.assert_array_equal(e5m6.decode(jnp.asarray(codes, jnp.int32)), values)
    np.testing.assert_array_equal(e5m6.encode(jnp.asarray(values)), codes)
    np.testing.assert_array_equal(e5m6.encode(jnp.asarray(-values)), codes | e5m6.SIGN)
    assert values[-1] == e5m6.LARGEST


def test_rounding_is_to_the_nearest_with_ties_to_even():
    codes, values = magnitudes()
    middle = (values[:-1] + values[1:]) / 2
    np.testing.assert_array_equal(e5m6.encode(jnp.asarray(middle)), codes[:-1] + codes[:-1] % 2)
    np.testing.assert_array_equal(e5m6.encode(jnp.asarray(np.nextafter(middle, np.float32(0)))), codes[:-1])
    np.testing.assert_array_equal(e5m6.encode(jnp.asarray(np.nextafter(middle, np.float32(np.inf)))), codes[1:])


def test_a_value_comes_back_within_its_rounding():
    x = wide((5, 256))
    packed, scales = producers.e5m6_pack(x, implementation="reference")
    assert packed.shape == (5, 384)
    assert scales.shape == (2, 8)
    assert np.all(np.frexp(np.asarray(scales))[0] == 0.5)
    back = np.asarray(producers.e5m6_unpack(packed, scales, m=5, dtype=jnp.float32, implementation="reference"))
    exact, scale = np.asarray(x, np.float32), np.repeat(np.asarray(scales).T[:5], 128, axis=1)
    assert np.all(np.abs(back - exact) <= np.maximum(np.abs(exact) * 2.0**-7, scale * 2.0**-21))
    np.testing.assert_array_equal(np.signbit(back), np.signbit(exact))
    np.testing.assert_array_equal(
        producers.e5m6_unpack(packed, scales, m=5, implementation="reference").astype(jnp.float32), back
    )


def test_seven_significant_bits_come_back_exactly():
    x = jnp.asarray(
        np.arange(64, 128).repeat(2)[None] * 2.0 ** np.random.default_rng(0).integers(-10, 10, (3, 128)), jnp.bfloat16
    )
    packed, scales = producers.e5m6_pack(x, implementation="reference")
    np.testing.assert_array_equal(producers.e5m6_unpack(packed, scales, m=3, implementation="reference"), x)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_fills_its_tile(poison):
    x = wide((130, 256)).at[2, 5].set(poison)
    nan = np.isnan(
        producers.e5m6_unpack(*producers.e5m6_pack(x, implementation="reference"), m=130, implementation="reference")
    )
    assert nan[2, :128].all()
    assert nan.sum() == 128


def test_a_tile_of_zeros_stays_zero():
    packed, scales = producers.e5m6_pack(jnp.zeros((2, 128), jnp.bfloat16), implementation="reference")
    assert not np.any(packed)
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_hopper(dtype, on_hopper):
    x, config = wide((19, 640)), stream.TuningConfig(rows=8, warpgroups=2, stages=2)
    expected = e5m6.e5m6_pack(x)
    for kernel, other in zip(on_hopper(hopper_e5m6.e5m6_pack, x, config), expected, strict=True):
        np.testing.assert_array_equal(kernel, other)
    kernel = on_hopper(hopper_e5m6.e5m6_unpack, *expected, 19, jnp.dtype(dtype), config)
    np.testing.assert_array_equal(kernel, e5m6.e5m6_unpack(*expected, 19, jnp.dtype(dtype)))


@pytest.mark.parametrize(("m", "k"), [(1, 128), (4097, 16384)])
def test_lowers_for_hopper(m, k):
    packed, scales = jax.eval_shape(e5m6.e5m6_pack, x := jax.ShapeDtypeStruct((m, k), jnp.bfloat16))
    for f, inputs in (
        (hopper_e5m6.e5m6_pack, (x,)),
        (lambda p, s: hopper_e5m6.e5m6_unpack(p, s, m, x.dtype), (packed, scales)),
    ):
        assert "mosaic_gpu" in jax.jit(f).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


def test_tpu():
    x = wide((19, 640))
    expected = e5m6.e5m6_pack(x)
    for kernel, other in zip(tpu.e5m6_pack(x, TPU), expected, strict=True):
        np.testing.assert_array_equal(kernel, other)
    kernel = tpu.e5m6_unpack(*expected, 19, jnp.dtype(jnp.bfloat16), TPU)
    np.testing.assert_array_equal(kernel, e5m6.e5m6_unpack(*expected, 19, jnp.dtype(jnp.bfloat16)))


PACKED, SCALES = np.zeros((3, 192), np.uint8), jnp.ones((1, 4))
MISTAKES = {
    "x has dtype float32": lambda: producers.e5m6_pack(jnp.ones((3, 128))),
    "for m = 4 it must be": lambda: producers.e5m6_unpack(PACKED, SCALES, m=4),
    r"must be float32 \(1, 4\)": lambda: producers.e5m6_unpack(PACKED, SCALES[:, :3], m=3),
    "dtype = float16": lambda: producers.e5m6_unpack(PACKED, SCALES, m=3, dtype=jnp.float16),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused_with_their_numbers(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()
