"""Devices that share sequences (`parallel.context`) take the step of one device, and send latents alone."""

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

pytestmark = pytest.mark.xdist_group("equal_steps")


def config(sizes: dict[str, int], num_cuts: int, **execution):
    """The model of `test_equal_steps` with two MTP layers, so that shifts cross chunks."""
    cfg = equal.config((1, 1, 1), num_cuts, "auto", "none", 1)
    return cfg.with_(mesh=sizes, model={"num_mtp_layers": 1}, execution={"attention_chunk": 8} | execution)


@functools.cache
def run(sizes: tuple[tuple[str, int], ...], num_cuts: int, remat: str = "none", batch_wise: bool = False):
    """Take three steps; return (gradients, sums, state, metrics) of the first and of the last."""
    cfg = config(dict(sizes), num_cuts, remat=remat)
    if batch_wise:
        cfg = cfg.with_(loss={"batch_balance_weight": 0.01})
    mesh = make_mesh(cfg.mesh, jax.devices()[: math.prod(dict(sizes).values())])
    recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)

    def step(state, arrays, rates):
        weights = Weights(state["params"], state["router_bias"])
        grads, sums, _ = step_lib.gradients(recipe, weights, arrays, rates)
        return grads, sums, *step_lib.update(recipe, state, grads, sums, _, rates)

    taken = []
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
        state = jax.device_put(equal.initial_state(), shardings)
        lowered = jax.jit(step).lower(state, small.put(equal.batch(0)), small.RATES)
        compiled = lowered.compile(equal.UNOPTIMISED)
        for i in range(equal.STEPS):
            taken.append(compiled(state, small.put(equal.batch(i)), small.RATES))
            state = taken[-1][2]
        return jax.device_get((taken[0], taken[-1]))


ONE = (("data", 1),)
CELLS = [((("context", 4), ("expert", 2)), 2)]


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_that_of_one_device(cell):
    for got, want, tolerance in zip(run(*cell), run(ONE, 1), (5e-6, 5e-5), strict=True):
        equal.assert_equal_steps(got, want, tolerance)
        np.testing.assert_allclose(got[3]["max_vio_sequence_L"], want[3]["max_vio_sequence_L"], rtol=1e-5)
