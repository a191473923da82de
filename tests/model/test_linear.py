"""The FP8 linear layer: its three products are the recipe's to the bit, close to FP32, and say what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.adapters import Adapted
from deepseek_jax.model.layers import swiglu
from deepseek_jax.model.linear import linear, swiglu_linear
from deepseek_jax.model.precision import ATTENTION_OUTPUT, HIDDEN
from deepseek_jax.parameters import CastWeight, Fp8Weight
from pallas_kernels.producers import e5m6_pack, e5m6_unpack, swiglu_backward_quantize, swiglu_quantize
from pallas_kernels.quantize import quantize_blocks, quantize_tiles, quantize_tiles_both, requantize_transposed
from pallas_kernels.quantized import dequantize

T, NUM_IN = 256, 384


def draw(seed, *shape, outliers=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if outliers:
        x[:, rng.integers(0, shape[1], 4)] *= 50.0
    return jnp.asarray(x, jnp.float32)


def fp8(w, input_dims=1):
    """An `Fp8Weight` as the step makes it."""
    matrix = w.reshape(np.prod(w.shape[:input_dims]), -1)
    q = quantize_blocks(matrix)
    return Fp8Weight(jnp.zeros_like(w), q.values.reshape(w.shape), q.scales)


def gradients(x, w, g, **kwargs):
    """y, and the gradients by x and by the weight."""

    def apply(x, carrier):
        weight = Fp8Weight(carrier, w.values, w.scales) if isinstance(w, Fp8Weight) else carrier
        return linear(x, weight, **kwargs)

    y, pull = jax.vjp(apply, x, w.carrier if isinstance(w, Fp8Weight) else w)
    return y, *pull(g.astype(y.dtype))


def cosine(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("shape", "input_dims"), [((NUM_IN, 2, 8), 1), ((2, NUM_IN // 2, 8), 2)])
def test_a_weight_in_bf16_has_its_gradient_in_fp32(shape, input_dims):
    """The outputs and input gradients of a plain array; the weight gradient is not rounded to BF16."""
    x = draw(0, T, *shape[:input_dims]).astype(jnp.bfloat16)
    w = draw(1, *shape).astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: linear(x, w, input_dims), x, w)
    g = draw(2, *y.shape).astype(jnp.bfloat16)
    dx, dw = pull(g)
    carrier = jnp.zeros(shape, jnp.float32)
    also_y, pull = jax.vjp(lambda x, carrier: linear(x, CastWeight(carrier, w), input_dims), x, carrier)
    also_dx, exact = pull(g)
    np.testing.assert_array_equal(also_y, y)
    np.testing.assert_array_equal(also_dx, dx)
    want = np.tensordot(np.float64(x), np.float64(g), ((0,), (0,)))
    assert exact.dtype == jnp.float32
    assert np.linalg.norm(exact - want) <= 1e-6 * np.linalg.norm(want)
    assert np.linalg.norm(np.float64(dw) - want) > 1e-3 * np.linalg.norm(want)  # what a BF16 cotangent costs


@pytest.mark.parametrize("num_out", [256, 144], ids=["whole blocks", "a partial block"])
@pytest.mark.parametrize("recipe", [HIDDEN, ATTENTION_OUTPUT], ids=["hidden", "attention output"])
def test_three_products_of_what_was_quantised(recipe, num_out):
    """Each product, against FP64 products of the operands that the recipe names: only BF16 or FP32 rounding is left."""
    x, w, g = (
        draw(0, T, NUM_IN).astype(jnp.bfloat16),
        fp8(draw(1, NUM_IN, num_out)),
        draw(2, T, num_out).astype(jnp.bfloat16),
    )
    y, dx, dw = gradients(x, w, g, recipe=recipe)
    weight = np.asarray(dequantize(quantize_blocks(draw(1, NUM_IN, num_out))), np.float64)
    g_tiles, g_columns = quantize_tiles_both(jnp.pad(g, ((0, 0), (0, -num_out % 128))))
    tiles = quantize_tiles(x, scale=recipe.scale)
    if recipe is ATTENTION_OUTPUT:
        kept = e5m6_unpack(*e5m6_pack(x), m=T)
        x_columns = quantize_tiles_both(kept, scale="pow2")[1]
    else:
        x_columns = requantize_transposed(tiles)
    numbers = [np.asarray(dequantize(q), np.float64) for q in (tiles, g_tiles, x_columns, g_columns)]
    for got, want, error in (
        (y, numbers[0] @ weight, 2e-3),
        (dx, numbers[1][:, :num_out] @ weight.T, 2e-3),
        (dw, (numbers[2] @ numbers[3].T)[:, :num_out], 3e-7),
    ):
        assert got.shape == want.shape
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= error * np.linalg.norm(want)
    assert dw.dtype == jnp.float32 and y.dtype == dx.dtype == jnp.bfloat16


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outlier channels"])
def test_close_to_fp32_and_without_bias(outliers):
    x, w, g = draw(3, T, NUM_IN, outliers=outliers), draw(4, NUM_IN, 256), draw(5, T, 256, outliers=outliers)
    exact = gradients(x, w, g)
    got = gradients(x.astype(jnp.bfloat16), fp8(w), g.astype(jnp.bfloat16))
    for name, a, b, least in zip(("y", "dx", "dw"), got, exact, (0.999, 0.999, 0.9985), strict=True):
        assert cosine(a, b) >= least, name
        error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        assert abs(error.mean()) <= 4 * error.std() / np.sqrt(error.size), name  # of a mean that is zero


@pytest.mark.parametrize(
    "layer",
    [gradients, lambda x, w, g: ffn(x, fp8(draw(7, NUM_IN, 2, 128)), fp8(draw(8, 128, NUM_IN)), g)],
    ids=["linear", "swiglu"],
)
def test_gradients_of_a_large_batch_lose_nothing(layer):
    """A mean over 2^26 tokens makes them small: by a power of two, so that no bit may change."""
    x, w, g = (
        draw(3, T, NUM_IN).astype(jnp.bfloat16),
        fp8(draw(4, NUM_IN, NUM_IN)),
        draw(5, T, NUM_IN).astype(jnp.bfloat16),
    )
    _, *large = layer(x, w, g)
    _, *small = layer(x, w, g * 2.0**-26)
    for a, b in zip(large, small, strict=True):
        np.testing.assert_array_equal(np.asarray(b, np.float32), np.asarray(a, np.float32) * 2.0**-26)


def test_dims_of_inputs_and_outputs_stay():
    x = draw(6, 2, 128, 4, 32).astype(jnp.bfloat16)
    w = draw(7, 4, 32, 3, 64)
    y = linear(x, fp8(w, input_dims=2), input_dims=2)
    assert y.shape == (2, 128, 3, 64)
    flat = linear(x.reshape(256, 128), fp8(w.reshape(128, 192)))
    np.testing.assert_array_equal(y.reshape(256, 192), flat)


def test_an_array_is_multiplied_as_it_is():
    x, w = draw(8, 6, 4, 32).reshape(6, 4, 32), draw(9, 4, 32, 16)
    # sums of 128 products in another order
    np.testing.assert_allclose(linear(x, w, input_dims=2), jnp.einsum("tnh,nhd->td", x, w), rtol=0, atol=5e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad):
    """In the row where it entered, and in every gradient that read it; nowhere else."""
    x, w, g = draw(10, T, 256).at[5, 7].set(bad), fp8(draw(11, 256, 128)), draw(12, T, 128)
    y, dx, dw = gradients(x.astype(jnp.bfloat16), w, g.astype(jnp.bfloat16))
    assert np.isnan(y[5]).all() and np.isfinite(np.delete(np.asarray(y, np.float32), 5, 0)).all()
    assert np.isfinite(np.asarray(dx, np.float32)).all() and np.isnan(dw[7]).all()


def ffn(x, gate_up, down, g):
    """y, and the gradients by x and both weights of down(swiglu(x gate_up)), in the precision of the weights."""
    in_fp8 = isinstance(down, Fp8Weight)

    def apply(x, *carriers):
        if in_fp8:
            return swiglu_linear(
                x, *(Fp8Weight(c, w.values, w.scales) for c, w in zip(carriers, (gate_up, down), strict=True))
            )
        return linear(swiglu(linear(x, carriers[0])), carriers[1])

    y, pull = jax.vjp(apply, x, *((gate_up.carrier, down.carrier) if in_fp8 else (gate_up, down)))
    return y, *pull(g.astype(y.dtype))


def test_two_layers_with_a_swiglu_are_the_recipe():
    """Each product of what it is said to multiply: only BF16 or FP32 rounding is left."""
    x, g = draw(17, T, 256).astype(jnp.bfloat16), draw(18, T, 256).astype(jnp.bfloat16)
    matrices = draw(19, 256, 256) / 16, draw(20, 128, 256)
    gate_up, down = fp8(matrices[0].reshape(256, 2, 128)), fp8(matrices[1])
    y, dx, dgate_up, ddown = ffn(x, gate_up, down, g)
    wide = [np.asarray(dequantize(quantize_blocks(w)), np.float64) for w in matrices]
    tiles = quantize_tiles(x)
    hidden = (np.asarray(dequantize(tiles), np.float64) @ wide[0]).astype(jnp.bfloat16)
    g_tiles, g_columns = quantize_tiles_both(g)
    dact = (np.asarray(dequantize(g_tiles), np.float64) @ wide[1].T).astype(jnp.bfloat16)
    act = swiglu_quantize(jnp.asarray(hidden))
    dhidden, dhidden_columns, act_columns, _ = swiglu_backward_quantize(jnp.asarray(hidden), jnp.asarray(dact))
    columns = [
        np.asarray(dequantize(q), np.float64)
        for q in (requantize_transposed(tiles), dhidden_columns, act_columns, g_columns)
    ]
    for got, want in (
        (y, np.asarray(dequantize(act), np.float64) @ wide[1]),
        (dx, np.asarray(dequantize(dhidden), np.float64) @ wide[0].T),
        (dgate_up.reshape(256, 256), columns[0] @ columns[1].T),
        (ddown, columns[2] @ columns[3].T),
    ):
        # a BF16 ulp before the SwiGLU
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 3e-3 * np.linalg.norm(want)


def test_an_adapter_adds_its_scaled_product():
    """And its gradients have the scale, too."""
    x, w, g = (np.float32(draw(seed, *shape)) for seed, shape in enumerate(((6, 16), (16, 2, 5), (6, 2, 5))))
    a, b = np.float32(draw(3, 16, 3)), np.float32(draw(4, 3, 10))
    y, pull = jax.vjp(lambda a, b: linear(x, Adapted(w, {"lora_a_IU": a, "lora_b_UO": b}, 0.25)), a, b)
    want = [
        x @ (w.reshape(16, 10) + 0.25 * a @ b),
        0.25 * x.T @ g.reshape(6, 10) @ b.T,
        0.25 * (x @ a).T @ g.reshape(6, 10),
    ]
    for got, value in zip((y, *pull(jnp.asarray(g))), want, strict=True):
        np.testing.assert_allclose(got.reshape(value.shape), value, rtol=0, atol=1e-5 * np.abs(value).max())
