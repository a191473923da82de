"""The kernels of a decoding step's attention on a Hopper GPU, where there is one, against the reference."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.decode_projections import TuningConfig
from tests.pallas_kernels.decode_projections import cases
from tests.pallas_kernels.decode_projections.test_aot import NAMES, operands_of

# A share of the largest number. Sums in another order may round to the number beside it.
TOLERANCES = {"float32": 5e-3, "bfloat16": 2.0**-7, "float8_e4m3fn": 2.0**-3}


@pytest.fixture(autouse=True)
def card():
    """Skip the tests where there is none; asked for here, because a module that is collected must not start JAX."""
    if not dispatch.on_hopper():
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("n", [8, 16, 32, 128])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_reference_and_repeat_bit_for_bit(name, n, early):
    run, operands = operands_of(name, n)
    kernel = jax.jit(functools.partial(run, implementation="hopper", config=TuningConfig(early=early)))
    first = jax.tree.leaves(kernel(*operands))
    want = jax.tree.leaves(jax.jit(functools.partial(run, implementation="reference"))(*operands))
    for found, wanted in zip(first, want, strict=True):
        parted = name.startswith("project")
        found, wanted = (x.astype(jnp.float32).sum(0) if parted else x for x in (found, wanted))
        assert cases.distance(found, wanted) <= TOLERANCES[found.dtype.name]
    for _ in range(3):
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(kernel(*operands)), first, strict=True))
