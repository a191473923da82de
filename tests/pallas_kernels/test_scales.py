"""Scales of tiles, as Hopper kernels store them.

JAX 0.11.2 copies the scales of one tile and group as one piece of memory, and clips it at the end of the array, not of
the group's row. So the rows are whole tiles long. The interpreter clips each row, and does not show what happens else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import GROUP
from pallas_kernels.producers import hopper_backward
from pallas_kernels.quantize import hopper, hopper_transposed
from pallas_kernels.quantized import pad_rows

M, K = 70, 256  # rows are a multiple of neither 64 nor 4


def draw(width):
    return jnp.asarray(np.random.default_rng(0).standard_normal((M, width)), jnp.bfloat16)


# module, rows of a tile, the call, and which of its outputs are scales [groups, m]
CASES = {
    "quantize_tiles": (hopper, 64, lambda: hopper.quantize_tiles(draw(K), "fp32"), [1]),
    "quantize_tiles_both": (
        hopper_transposed,
        128,
        lambda: hopper_transposed.quantize_tiles_both(draw(K), "fp32"),
        [1],
    ),
    "swiglu_backward_quantize": (
        hopper_backward,
        128,
        lambda: hopper_backward.swiglu_backward_quantize(draw(K), draw(K // 2), jnp.ones(M), "fp32"),
        [1, 6],  # the second: sums of the weights' gradients
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_scales_of_a_tile_stay_in_their_group(case, monkeypatch):
    module, rows, call, scales = CASES[case]
    made = []

    def launch(body, config, num_tiles, out_type, *rest, **options):
        made.extend(out_type)
        return lambda *operands: [jnp.zeros(kind.shape, kind.dtype) for kind in out_type]

    monkeypatch.setattr(module, "launch", launch)
    result = jax.tree.leaves(call())
    assert all(made[i].shape[1] == -(-M // rows) * rows for i in scales)
    assert result[1].shape == (K // GROUP, pad_rows(M))
