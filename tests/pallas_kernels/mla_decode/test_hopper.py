"""The MLA kernels for Hopper in the interpreter of their machine, with its race detector, against FP64.

Products are plain there. Order, masks, fragments, barriers and what lies in a page's tail are those of the kernels.
"""

import functools

import jax
import pytest

from pallas_kernels.mla_decode import hopper
from pallas_kernels.mla_decode.hopper_few import TuningConfig as Few
from pallas_kernels.mla_decode.hopper_many import TuningConfig as Many
from pallas_kernels.mla_decode.schedule import make_schedule
from tests.pallas_kernels.mla_decode import cases


def check(on_hopper, heads, queries, num_parts, lengths):
    operands = cases.make(lengths, queries, heads)
    few, many = Few(interpreted=True), Many(interpreted=True)
    config = few if heads * queries <= 32 else many
    schedule = make_schedule(operands[-1], num_parts, unit=config.unit, overhead=config.overhead)
    run = functools.partial(hopper.mla_decode, scale=cases.SCALE, value_dim=cases.VALUE, few=few, many=many)
    out, lse = cases.errors(on_hopper(jax.jit(run), *operands, schedule), cases.expected(*operands))
    assert out < 4e-3 and lse < 1e-5  # weights and outputs are rounded to BF16


def test_few_rows_with_a_draft_across_the_end_of_a_page(on_hopper):
    """A sequence in several parts, an empty one, one of fewer tokens than queries, a page that only one query sees."""
    check(on_hopper, 8, 2, 3, (129, 0, 1, 64))


@pytest.mark.slow
def test_many_rows_in_two_blocks(on_hopper):
    """80 rows are padded to two blocks; pages come in twos, the last one alone."""
    check(on_hopper, 20, 4, 2, (300, 0, 2, 67))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(200, 3, 64), (0, 1, 2, 63, 64, 65, 130)])
@pytest.mark.parametrize("heads", [32, 64])
def test_other_lengths(on_hopper, heads, lengths):
    check(on_hopper, heads, 1, 3, lengths)
