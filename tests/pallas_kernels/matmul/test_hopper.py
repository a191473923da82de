"""Dense FP8 products on Hopper, in Mosaic GPU's interpreter with its race detector.

Two thread blocks and small rings: each block has several tiles, and every slot is used again and again.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul
from pallas_kernels.hopper import groups
from pallas_kernels.hopper.gradient import ACCUMULATE
from pallas_kernels.hopper.main_loop import TuningConfig
from pallas_kernels.matmul import hopper, hopper_gradient
from tests.pallas_kernels.products import BF16_ERROR, FP32_ERROR, blocks, error, normal, tiles

PRODUCTS = [
    # steps left over by the unrolled ones, edges in m and n
    (200, 264, 640, TuningConfig(products=1, stages=2, out_slots=2), 1),
    (133, 128, 128, TuningConfig(), 1),  # a single step; rows that are no multiple of 8; half of a tile's columns
    (136, 520, 896, TuningConfig(stages=3), 1),  # two products per step; slots go on from tile to tile
    # half a block of columns per warpgroup
    (70, 300, 384, TuningConfig(columns=64, products=1, split="n", stages=2), 1),
    # a warpgroup's products below each other
    (200, 264, 256, TuningConfig(split="n", stages=2, out_slots=2, batch=2), 1),
    # ... of which most pieces lie beyond the last column
    (200, 160, 128, TuningConfig(split="n", stages=2, out_slots=2, batch=1), 1),
    (133, 264, 512, TuningConfig(stages=2), 2),  # two parts of k
    # the last of which ends beyond it
    (70, 136, 640, TuningConfig(columns=64, products=1, split="n", stages=3), 3),
]


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    for module in (hopper, hopper_gradient, groups):
        monkeypatch.setattr(module, "num_multiprocessors", lambda: 2)


@pytest.mark.parametrize(
    ("m", "n", "k", "config", "parts", "out_dtype"),
    # What leaves a tile differs by type, by the way in which warpgroups split it, and with parts.
    [(*product, jnp.bfloat16) for product in PRODUCTS]
    + [pytest.param(*PRODUCTS[i], jnp.float32, marks=pytest.mark.slow) for i in (0, 3, 6)],
)
def test_dense_product(interpret, m, n, k, config, parts, out_dtype):
    a, b = tiles(m, k), blocks(n, k)
    actual = interpret(
        lambda a, b: hopper.matmul(
            a, b, out_dtype=out_dtype, config=dataclasses.replace(config, interpreted=True), parts=parts
        ),
        a,
        b,
    )
    expected = np.asarray(matmul.matmul(a, b, out_dtype=jnp.float32, implementation="reference"), np.float64)
    assert actual.shape == (m, n)
    assert error(actual, expected) < (BF16_ERROR if out_dtype == jnp.bfloat16 else FP32_ERROR)


def test_parts_of_a_dense_gradient(interpret):
    """Seven steps in three parts, of 2, 2 and 3."""
    m, n = 136, 72
    a, b, c = tiles(m, 896), tiles(n, 896, seed=1), normal(m, n, seed=2)
    gradient = functools.partial(
        hopper_gradient.matmul_accumulate, config=TuningConfig(split="n", stages=2, unroll=1, interpreted=True)
    )
    whole = interpret(functools.partial(gradient, parts=1), a, b)
    assert error(whole, np.asarray(matmul.matmul_accumulate(a, b, implementation="reference"), np.float64)) < FP32_ERROR
    from_zero, onto_c = (interpret(functools.partial(gradient, parts=3), *operands) for operands in ((a, b), (a, b, c)))
    assert 0 < error(from_zero, whole) < FP32_ERROR  # other sums
    np.testing.assert_array_equal(onto_c, np.float32(c) + np.float32(from_zero))


def test_parts_fill_the_machine(monkeypatch):
    """The table of `plan_parts`; large gradients, and those of few steps, stay whole."""
    monkeypatch.setattr(hopper_gradient, "num_multiprocessors", lambda: 132)
    plan = functools.partial(hopper_gradient.plan_parts, ACCUMULATE)
    few_tiles = {(2048, 640): 8, (512, 4096): 2, (1024, 2048): 2, (2048, 1536): 4, (2048, 2048): 1, (1536, 3072): 6}
    assert {shape: plan(*shape, 256) for shape in few_tiles} == few_tiles
    assert plan(4096, 7168, 256) == plan(7168, 2048, 32) == plan(128, 256, 1) == 1
    assert 1 < plan(128, 256, 12) <= 12 and 1 < plan(128, 256, 256) <= hopper_gradient.MOST_PARTS


def test_tiles_fit_the_machine(monkeypatch):
    """The choice is the config whose last round of tiles wastes least: at m = 128, 28 tiles of 128 x 256 or 112 of 64 x
    128 on 132.
    """
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 132)
    assert hopper.plan(128, 7168, 16) == (hopper.SMALL, 1)
    assert hopper.plan(4096, 7168, 16) == hopper.plan(8192, 24576, 12) == (hopper.LARGE, 1)
    assert hopper.plan(2048, 1024, 16) == (hopper.MEDIUM, 1)
    assert hopper.plan(128, 512, 56)[1] > 4
