"""The kernels for Hopper on a Hopper GPU, where there is one: ragged, poisoned cases against FP64."""

import functools

import jax
import pytest

from pallas_kernels import mla_decode
from tests.pallas_kernels.mla_decode import cases

pytestmark = pytest.mark.usefixtures("card")


LENGTHS = {
    "edges": (0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 191, 192, 193),
    "one": (3000,),
    "long among short": (1, 9000, 0, 64, 700, 5),
    "many": tuple(97 * i % 1000 for i in range(150)),
    "nothing": (0, 0),
}
ROWS = [(16, 1), (16, 2), (5, 1), (8, 4), (20, 3), (64, 1), (33, 1), (128, 1), (128, 2), (16, 4)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "queries"), ROWS)
def test_the_kernels_equal_fp64(heads, queries, lengths):
    operands = cases.make(lengths, queries, heads)
    run = jax.jit(functools.partial(mla_decode.mla_decode, scale=cases.SCALE, implementation="hopper"))
    want = cases.expected(*operands)
    first = jax.block_until_ready(run(*operands))
    if max(lengths):
        out, lse = cases.errors(first, want)
        assert out < 4e-3 and lse < 1e-4, (out, lse)
    for _ in range(3):
        again = run(*operands)
        assert all((a == b).all() for a, b in zip(first, again, strict=True)), "another result of the same operands"
