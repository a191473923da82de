"""The kernels of a decoding step's attention on a Hopper GPU, where there is one, against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode_projections import TuningConfig
from pallas_kernels.quantized import Quantized, dequantize
from tests.pallas_kernels.decode_projections import cases
from tests.pallas_kernels.decode_projections.test_aot import NAMES, operands_of

pytestmark = pytest.mark.usefixtures("card")

BY_ROW = [name for name in NAMES if name.startswith(("latents", "add_norm"))]  # a block for each row
# A share of the largest number. Sums in another order may round to the number beside it; of tiles, that may double a
# scale that is a power of two, so what counts is the numbers that they stand for.
TOLERANCES = {"float32": 5e-3, "bfloat16": 2.0**-7, "tiles": 2.0**-3, "int32": 0}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("name", "n"), [*itertools.product(NAMES, [8, 16, 32, 128]), *itertools.product(BY_ROW, [256, 512])]
)
def test_the_kernels_equal_the_reference_and_repeat_bit_for_bit(name, n, early):
    run, operands = operands_of(name, n)
    reference = jax.jit(functools.partial(run, implementation="reference"))
    kernel = jax.jit(functools.partial(run, implementation="hopper", config=TuningConfig(early=early)))
    first = kernel(*operands)
    for found, wanted in zip(results(first), results(reference(*operands)), strict=True):
        kind = "tiles" if isinstance(found, Quantized) else found.dtype.name
        found, wanted = (plain(x, name) for x in (found, wanted))
        assert cases.distance(found, wanted) <= TOLERANCES[kind]
    for _ in range(3):
        again = jax.tree.leaves(kernel(*operands))
        assert all((a == b).all() for a, b in zip(again, jax.tree.leaves(first), strict=True))


def results(found):
    """What a kernel returns, tiles as one."""
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Quantized))


def plain(x, name):
    """The numbers that `x` stands for."""
    if isinstance(x, Quantized):
        return dequantize(x)
    return x.astype(jnp.float32).sum(0) if name.startswith("project") else x
