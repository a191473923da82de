"""Devices that share rows (`parallel.context`) take the step of one device that has them whole."""

import functools
import math

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import abstract_state
from tests.support import small
from tests.training import test_equal_steps as equal

pytestmark = [pytest.mark.xdist_group("equal_steps"), pytest.mark.slow]

Sizes = tuple[tuple[str, int], ...]  # axes of the mesh that have several devices
ONE: Sizes = (("data", 1),)


@functools.cache
def run(sizes: Sizes, num_cuts: int = 1, remat: str = "none", interleave: int = 1):
    """Take three steps; return (gradients, sums, state, metrics) of the first and of the last.

    The model is that of `test_equal_steps`, with both balance losses. Chunks of queries are shorter than those of rows.
    """
    cfg = equal.config((1, 1, 1), num_cuts, "auto", remat, interleave)
    cfg = cfg.with_(mesh=dict(sizes), loss={"batch_balance_weight": 0.01}, execution={"attention_chunk": 3})
    mesh = make_mesh(cfg.mesh, jax.devices()[: math.prod(dict(sizes).values())])
    recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)

    def step(state, arrays, rates):
        weights = Weights(state["params"], state["router_bias"])
        grads, sums, norms = step_lib.gradients(recipe, weights, arrays, rates)
        return grads, sums, *step_lib.update(recipe, state, grads, sums, norms, rates)

    taken = []
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
        state = jax.device_put(equal.initial_state(), shardings)
        compiled = jax.jit(step).lower(state, small.put(equal.batch(0)), small.RATES).compile()
        for i in range(equal.STEPS):
            taken.append(compiled(state, small.put(equal.batch(i)), small.RATES))
            state = taken[-1][2]
        return jax.device_get((taken[0], taken[-1]))


CELLS = {
    "all eight share": ((("context", 8),), 1),
    "two share, two hops": ((("context", 2), ("node", 2), ("expert", 2)), 2, "full"),
    "four share, side by side": ((("data", 2), ("context", 4)), 1, "selective", 2),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_step_is_that_of_one_device(cell):
    """Packed and padded, with MTP. As near as on other meshes (`test_equal_steps`)."""
    for got, want, tolerance in zip(run(*cell), run(ONE), (5e-6, 5e-5), strict=True):
        equal.assert_equal_steps(got, want, tolerance)
        np.testing.assert_allclose(got[3]["max_vio_sequence_L"], want[3]["max_vio_sequence_L"], rtol=1e-5)
