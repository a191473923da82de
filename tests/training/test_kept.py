"""Slots of a pipeline: what is written into one comes back, of every dtype, in arrays that int32 can index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.gradient_sums import GradientSum
from deepseek_jax.training import kept
from deepseek_jax.training.stage_work import known_weights

SHAPES = ((3, 5), (7,), (), (40,), (2, 3, 4), (60,))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32, jnp.bool_)


@pytest.mark.parametrize("most", [2**31 - 1, 50])
def test_a_slot_gives_back_what_was_written(most, monkeypatch):
    monkeypatch.setattr(kept, "MOST_NUMBERS", most)
    rng = np.random.default_rng(0)
    written = [
        [jnp.asarray(rng.normal(size=shape) * 3).astype(dtype) for shape in SHAPES for dtype in DTYPES]
        for _ in range(3)
    ]
    packing = kept.Packing(written[0])

    @jax.jit
    def there_and_back(arrays):
        slots = kept.empty([packing], 3, frozenset())
        for index, own in enumerate(arrays):
            slots = packing.write(slots, jnp.int32(2 - index), own)
        return slots, [packing.read(slots, jnp.int32(2 - index))[0] for index in range(3)]

    slots, read = there_and_back(written)
    for got, want in zip(jax.tree.leaves(read), jax.tree.leaves(written), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    alone = max(np.prod(shape, dtype=int) for shape in SHAPES)  # an array is never cut
    assert all(numbers.shape[1] <= max(most, alone) for numbers in slots.values())
    assert (max(number for _, number in slots) > 0) == (most == 50)


def test_a_slot_keeps_no_sum_that_is_lent():
    """A weight that the derivative copied is kept, and costs memory; of a sum, the slot would have the old numbers."""
    weight, total, kept_too = (jnp.full(3, value) for value in (1.0, 2.0, 3.0))
    weights = {"norm_D": weight, "sum": GradientSum(total)}
    assert known_weights([kept_too, total, jnp.array(weight), weight], weights) == [None, 1, None, 0]
    with pytest.raises(AssertionError, match=r"sums of gradients \[\(3,\)\] were lent, and the derivative reads"):
        known_weights([weight, jnp.array(total)], weights)
