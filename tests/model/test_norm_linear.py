"""A norm and the layers behind it as one function: the numbers of the norm, then of each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.linear import linear
from deepseek_jax.model.norm_linear import norm_linear
from deepseek_jax.parameters import Fp8Weight
from pallas_kernels.quantize import quantize_blocks

EPS = 1e-6
SHAPES = {"one weight": [(256, 128)], "heads of odd sizes, one after another": [(256, 3, 64), (256, 72), (256, 256)]}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fp8(w):
    q = quantize_blocks(w.reshape(w.shape[0], -1))
    return Fp8Weight(w, q.values.reshape(w.shape), q.scales)


def one_by_one(x, gain, *weights):
    h = rms_norm(x, gain, EPS)
    return tuple(linear(h, w) for w in weights)


def results(f, x, gain, weights, grads):
    """Outputs, and gradients of x, gain and weights."""
    if not isinstance(weights[0], Fp8Weight):
        y, pull = jax.vjp(f, x, gain, *weights)
    else:
        y, pull = jax.vjp(
            lambda x, gain, *c: f(
                x, gain, *(Fp8Weight(c, w.values, w.scales) for c, w in zip(c, weights, strict=True))
            ),
            x,
            gain,
            *(w.carrier for w in weights),
        )
    return y, pull(tuple(g.astype(y[0].dtype) for g in grads))


@pytest.mark.parametrize("case", SHAPES)
def test_in_fp8_the_same_as_norm_then_layers(case):
    x, gain = draw(0, 2, 128, 256).astype(jnp.bfloat16) * 3, 1 + draw(1, 256) / 4
    weights = [fp8(draw(2 + i, *shape)) for i, shape in enumerate(SHAPES[case])]
    grads = [draw(9 + i, 2, 128, *shape[1:]) for i, shape in enumerate(SHAPES[case])]
    y, (dx, dgain, *dw) = results(lambda x, gain, *w: norm_linear(x, gain, EPS, *w), x, gain, weights, grads)
    expected, (expected_dx, expected_dgain, *expected_dw) = results(one_by_one, x, gain, weights, grads)
    for a, b in zip(y, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(dw, expected_dw, strict=True):
        assert a.shape == b.shape and a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
    for a, b in (
        (dx, expected_dx),
        (dgain, expected_dgain),
    ):  # one by one, each layer's share is rounded to BF16 and so is each sum
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)


def test_arrays_are_multiplied_as_they_are():
    x, gain, weights, grads = (
        draw(0, 6, 32),
        draw(1, 32),
        [draw(2, 32, 8), draw(3, 32, 2, 5)],
        [draw(4, 6, 8), draw(5, 6, 2, 5)],
    )
    actual = results(lambda x, gain, *w: norm_linear(x, gain, EPS, *w), x, gain, weights, grads)
    expected = results(one_by_one, x, gain, weights, grads)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_weights_of_two_precisions_are_refused():
    blocks = quantize_blocks(jnp.ones((256, 128), jnp.bfloat16))
    weights = Fp8Weight(None, blocks.values, blocks.scales), jnp.ones((256, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="need one precision"):
        norm_linear(jnp.ones((8, 256), jnp.bfloat16), jnp.ones(256), EPS, *weights)
