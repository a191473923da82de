"""MLA decode on TPUs, in the interpreter of their memory: what no token wrote is NaN, and races are found."""

import functools

import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode import tpu
from tests.pallas_kernels.mla_decode import cases

RAGGED = (0, 1, 0, 65, 2, 300, 128)  # two empty ones, one of them first; blocks of two pages: one to three blocks


def run(*operands, pages=2):
    config, races = tpu.TuningConfig(pages), pltpu.InterpretParams(detect_races=True)
    call = functools.partial(tpu.mla_decode, config=config, interpret=races)
    return call(*operands, scale=cases.SCALE, value_dim=cases.VALUE)


@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (4, 3)])
def test_the_kernel_equals_fp64_and_leaks_no_nan(queries, heads):
    operands = cases.make(RAGGED, queries, heads)
    result = run(*operands)
    out, lse = cases.errors(result, cases.expected(*operands))
    assert result[0].dtype == jnp.bfloat16
    assert out < 4e-3 and lse < 1e-5  # weights and results are rounded to BF16
    assert not interpret_pallas_call.races.races_found


def test_tpu_is_an_implementation_of_the_operation():
    """Through the door that the model uses."""
    operands = cases.make((0, 7), 1, heads=2)
    with pltpu.force_tpu_interpret_mode():
        result = mla_decode.mla_decode(*operands, scale=cases.SCALE, implementation="tpu")
    out, lse = cases.errors(result, cases.expected(*operands))
    assert out < 4e-3 and lse < 1e-5
    operands = cases.make((20,), 1, heads=2, key=40, page=16, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="float32; use 'auto'"):
        mla_decode.mla_decode(*operands, scale=1.0, value_dim=32, implementation="tpu")
