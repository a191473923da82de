"""Weight gradients of groups on Hopper, in Mosaic GPU's interpreter with its race detector.

Two thread blocks and small rings: each block has several tiles, and every slot is used again and again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped
from pallas_kernels.grouped import hopper_bf16_gradient, hopper_gradient, reference
from pallas_kernels.hopper import groups
from pallas_kernels.hopper.main_loop import TuningConfig
from pallas_kernels.quantized import Quantized
from tests.pallas_kernels.products import FP32_ERROR, error, normal, tiles


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    monkeypatch.setattr(groups, "num_multiprocessors", lambda: 2)


@pytest.mark.parametrize(
    "config",
    [TuningConfig(split="n", stages=2, unroll=1), TuningConfig(products=1, stages=3, unroll=2, out_slots=2)],
)
def test_weight_gradients(interpret, config):
    """Odd and even numbers of steps, an empty group, columns of no group. The interpreter cannot add: it stores, to
    zeros.
    """
    sizes, m, n = (128, 0, 384, 256), 136, 72
    a, b = tiles(m, 896), tiles(n, 896, seed=1)
    poison = sum(sizes)
    a = Quantized(a.values.at[:, poison:].set(jnp.nan), a.scales.at[poison // 128 :].set(jnp.nan), "tile")
    c, group_sizes = jnp.zeros((len(sizes), m, n)), jnp.asarray(sizes, jnp.int32)
    actual = interpret(
        lambda *o: hopper_gradient.grouped_matmul_accumulate(*o, config=dataclasses.replace(config, interpreted=True)),
        a,
        b,
        group_sizes,
        c,
    )
    expected = np.asarray(
        grouped.grouped_matmul_accumulate(a, b, group_sizes, c, implementation="reference"), np.float64
    )
    assert error(actual, expected) < FP32_ERROR


def test_weight_gradients_in_bf16(interpret):
    """Groups begin and end within steps of 64 rows; the rows after the last are NaN in both operands."""
    sizes, rows, m, n = (50, 0, 100, 1, 64), 264, 136, 320
    a, b = (
        normal(rows, size, seed=i).astype(jnp.bfloat16).at[sum(sizes) :].set(jnp.nan) for i, size in enumerate((m, n))
    )
    c, group_sizes = jnp.zeros((len(sizes), m, n)), jnp.asarray(sizes, jnp.int32)
    config = hopper_bf16_gradient.TuningConfig(stages=2, interpreted=True)

    def gradient(*operands):
        return hopper_bf16_gradient.grouped_matmul_accumulate_bf16(*operands, config=config)

    actual = interpret(gradient, a, b, group_sizes, c)
    expected = np.asarray(
        grouped.grouped_matmul_accumulate_bf16(a, b, group_sizes, c, implementation="reference"), np.float64
    )
    assert not actual[1].any()
    assert error(actual, expected) < FP32_ERROR


def from_zero_and_zeros(interpret, function, operands, group_sizes, c):
    """Return what `function` makes without a `c`, and of the zeros `c`, in every bit the same."""
    sizes = jnp.asarray(group_sizes, jnp.int32)
    from_zero, of_zeros = interpret(function, *operands, sizes), interpret(function, *operands, sizes, c)
    np.testing.assert_array_equal(from_zero.view(np.uint64), of_zeros.view(np.uint64))
    return from_zero


@pytest.mark.parametrize("sizes", [(128, 0, 256, 128), (0, 128, 0, 0), (0, 640, 0, 0), (0, 0, 0, 0)])
def test_gradients_that_begin_at_zero(interpret, sizes):
    """The interpreter fills a new array with NaN, so an element that nobody writes is seen; so are the columns of no
    group.
    """
    m, n, used = 136, 72, sum(sizes)
    a, b = (tiles(size, 640, seed=i) for i, size in enumerate((m, n)))
    a, b = (
        Quantized(x.values.at[:, used:].set(jnp.nan), x.scales.at[used // 128 :].set(jnp.nan), "tile") for x in (a, b)
    )
    gradient = functools.partial(
        hopper_gradient.grouped_matmul_accumulate, config=TuningConfig(split="n", stages=2, unroll=1, interpreted=True)
    )
    actual = from_zero_and_zeros(interpret, gradient, (a, b), sizes, jnp.zeros((4, m, n)))
    expected = np.asarray(reference.grouped_matmul_accumulate(a, b, jnp.asarray(sizes, jnp.int32)), np.float64)
    for product, exact, size in zip(actual, expected, sizes, strict=True):
        assert error(product, exact) < FP32_ERROR if size else not product.any()


@pytest.mark.parametrize(
    "sizes, m", [((50, 0, 100, 1, 64), 136), ((0, 1, 0, 0, 0), 136), ((50, 0, 150, 0, 64), 16), ((0, 0, 0, 0, 0), 136)]
)
def test_gradients_in_bf16_that_begin_at_zero(interpret, sizes, m):
    """Of 16 columns, too: the rank of an adapter, an eighth of a tile."""
    rows, n = 264, 320
    a, b = (
        normal(rows, size, seed=i).astype(jnp.bfloat16).at[sum(sizes) :].set(jnp.nan) for i, size in enumerate((m, n))
    )
    config = hopper_bf16_gradient.TuningConfig(stages=2, interpreted=True)
    gradient = functools.partial(hopper_bf16_gradient.grouped_matmul_accumulate_bf16, config=config)
    actual = from_zero_and_zeros(interpret, gradient, (a, b), sizes, jnp.zeros((5, m, n)))
    expected = np.asarray(reference.grouped_matmul_accumulate_bf16(a, b, jnp.asarray(sizes, jnp.int32)), np.float64)
    for product, exact, size in zip(actual, expected, sizes, strict=True):
        assert error(product, exact) < FP32_ERROR if size else not product.any()


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_gradient_adds_on_its_way_out(precision):
    """What the interpreter cannot run is at least in the program; and without a `c`, nothing is added, and nothing to
    add to is made.
    """
    x, sizes, c = jnp.ones((256, 128), jnp.bfloat16), jnp.asarray([256], jnp.int32), jnp.ones((1, 128, 128))
    if precision == "fp8":
        gradient, operands = (
            hopper_gradient.grouped_matmul_accumulate,
            (tiles(128, 256), tiles(128, 256, seed=1), sizes),
        )
    else:
        gradient, operands = hopper_bf16_gradient.grouped_matmul_accumulate_bf16, (x, x, sizes)
    onto_c, from_zero = (str(jax.make_jaxpr(gradient)(*operands, *last)) for last in ((c,), ()))
    for word in ("reduction_op=add", "new_ref"):
        assert word in onto_c and word not in from_zero
