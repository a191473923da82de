"""The kernels of experts at decode on a Hopper GPU, where there is one, against the reference."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.experts_decode import experts_decode
from pallas_kernels.quantize import quantize_tiles
from tests.pallas_kernels.experts_decode import cases

pytestmark = pytest.mark.usefixtures("card")


@pytest.mark.parametrize("routing", ["spread", "one", "nobody"])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 32, 33, 128, 512])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_kernels_equal_fp64(num_tokens, fp8, routing):
    operands = cases.make(num_tokens, 4, 64, 512, 256, routing=routing)
    want = cases.expected(*operands)
    if fp8:
        rows, *rest = cases.in_fp8(*operands)
        want = cases.expected(rows, *rest)
        operands = quantize_tiles(operands[0], scale="pow2"), *rest
    run = jax.jit(functools.partial(experts_decode, implementation="hopper"))
    first = jax.block_until_ready(run(*operands))
    assert cases.error(first, want) < (0.03 if fp8 else 5e-3)
    for _ in range(3):
        assert (run(*operands) == first).all(), "another result of the same operands"


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 63, 65, 200])
def test_scales_of_rows_that_are_no_whole_tile(num_tokens):
    x = jax.random.normal(jax.random.key(0), (num_tokens, 2048), jnp.bfloat16)
    kernel, reference = (quantize_tiles(x, implementation=face) for face in ("hopper", "reference"))
    assert (kernel.scales == reference.scales).all()
