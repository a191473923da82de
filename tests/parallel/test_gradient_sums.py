"""Products that add to sums of gradients give the sum and the gradient, each once, whatever the experts' arithmetic."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.parallel.gradient_sums import GradientSum, added, lend
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.weights import attach
from deepseek_jax.plan.counts import without_pipe
from deepseek_jax.plan.memory import abstract_inputs
from deepseek_jax.plan.sums import gradients_of
from deepseek_jax.plan.traffic import abstract
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import create_state, weights_of
from pallas_kernels.quantize import quantize_blocks
from tests.support import small
from tests.training import test_equal_steps as equal
from tests.training.pipeline_cells import EVERY, config

T, K, E, D, F = 32, 2, 4, 128, 128
# Blocks of an expert are added to its sum one by one: an FP32 rounding each. Kernels add once, as the test does.
EXPERTS = {"grouped": (GroupedExperts(), 0), "fp8": (Fp8Experts(), 0), "blocks": (BlockedExperts(8, 2), 3e-7)}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    weights = {"gate_up_ED2F": rng.normal(size=(E, D, 2, F)) / D**0.5, "down_EFD": rng.normal(size=(E, F, D)) / F**0.5}
    sums = {name: rng.normal(size=w.shape) for name, w in weights.items()}
    weights, sums = jax.tree.map(np.float32, (weights, sums))
    x_TD, g_TD = (jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16) for _ in range(2))
    experts_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    return weights, sums, x_TD, g_TD, experts_TK, rng.random((T, K)).astype(np.float32)


def numbers_of(name, w):
    if name != "fp8":
        return (jnp.asarray(w, jnp.bfloat16),)
    quantized = quantize_blocks(jnp.asarray(w).reshape(E, w.shape[1], -1))
    return quantized.values.reshape(w.shape), quantized.scales


@pytest.mark.parametrize("name", EXPERTS)
def test_the_cotangent_of_a_lent_sum_is_the_new_sum(name):
    weights, sums, x_TD, g_TD, experts_TK, gates_TK = arrays()
    (experts, rounding), numbers = EXPERTS[name], {key: numbers_of(name, w) for key, w in weights.items()}

    @jax.jit
    def gradients(params):
        def apply(params):
            return exchange(
                x_TD, experts_TK, gates_TK, attach(params, numbers), experts, transport="local", num_experts=E, slack=1
            )

        return jax.vjp(apply, params)[1](g_TD)[0]

    apart, lent = gradients(weights), gradients(*lend([weights], [numbers], [sums]))
    for key, total in sums.items():
        assert isinstance(lent[key], GradientSum) and np.abs(apart[key]).max() > 0.1
        want = np.asarray(added(total, apart[key]))
        assert np.abs(added(total, lent[key]) - want).max() <= rounding * np.abs(want).max()


def test_sums_are_lent_to_experts_with_a_carrier_alone():
    """Other products would return their gradient without the sum, and FP32 weights are themselves differentiated.

    Of a stack a product would add to a copy of a slice.
    """
    dense, expert = np.ones((2, 2), np.float32), np.ones((2, 2, 2), np.float32)
    params = {"down_FD": dense, "moe": [{"down_EFD": expert}, {"down_EFD": expert}], "norm_D": dense[0]}
    numbers = {"down_FD": (dense,), "moe": [{"down_EFD": (expert,)}, {"down_EFD": None}], "norm_D": None}
    sums = jax.tree.map(np.zeros_like, params)
    lent = lend(params, numbers, sums)
    assert lent["down_FD"] is dense and lent["moe"][1]["down_EFD"] is expert and lent["norm_D"] is params["norm_D"]
    assert lent["moe"][0]["down_EFD"].total is sums["moe"][0]["down_EFD"]
    stack = {"moe": {"down_EFD": np.ones((3, 2, 2, 2), np.float32)}}
    same = lend(stack, {"moe": {"down_EFD": (expert,)}}, stack)
    assert same["moe"]["down_EFD"] is stack["moe"]["down_EFD"]


@pytest.mark.slow
@pytest.mark.parametrize(("pipe", "changes", "added_apart"), [
    (1, {}, False),
    (2, {}, False),
    (1, {"scan_unroll": 1}, True),  # layers are slices of stacks
    (1, {"gather": "layer"}, True),  # a reduce-scatter lies between
    (2, {"gather": "layer"}, True),
])  # fmt: skip
def test_a_step_adds_no_gradient_of_experts_by_itself(pipe, changes, added_apart):
    """Of four micro-batches, wherever a sum can be lent; other gradients are added as before."""
    execution = {"precision": "bf16", "gather": "step", "scan_unroll": 2} | changes
    model = {"num_layers": 3, "num_dense_layers": 1, "num_mtp_layers": 0}
    cfg = config(pipe, num_cuts=4, model=model, execution=execution)
    mesh = make_mesh(cfg.mesh, jax.devices()[:pipe])
    with jax.set_mesh(mesh):
        recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)
        state, batch, rates = abstract_inputs(cfg, mesh)
        text = str(jax.jit(functools.partial(step_lib.gradients, recipe)).trace(weights_of(state), batch, rates).jaxpr)
    experts = rf"\[(2,)?{cfg.model.num_experts},{cfg.model.width},2,{cfg.model.expert_hidden}\]"
    assert bool(re.search(rf"f32{experts}\S* = add ", text)) == added_apart
    planned = gradients_of(cfg, state, without_pipe(abstract(mesh)), pipe > 1)
    layers = cfg.model.num_layers - cfg.model.num_dense_layers
    of_experts = 4 * 3 * layers * cfg.model.num_experts * cfg.model.width * cfg.model.expert_hidden
    assert sum(of.lent for of in planned.values()) == (0 if added_apart else of_experts)
    assert re.search(rf"f32\[(2,)?{cfg.model.width},{cfg.model.query_latent}\]\S* = add ", text)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "num_layers"), [("bf16", 2), ("fp8", 1)])
def test_a_step_that_lends_its_sums_gives_the_gradients_of_one_that_adds_them(precision, num_layers, monkeypatch):
    """Of four micro-batches, each with other tokens: a sum that is lent without its numbers would show.

    Measured: experts' at most 1e-7 apart, as the blocks of an expert are added to the sum one by one; others equal.
    """
    execution = {"precision": precision, "gather": "step", "scan_unroll": 2}
    model = EVERY | {"num_layers": num_layers, "num_dense_layers": 0, "num_mtp_layers": 0}
    cfg = config(1, num_cuts=4, model=model, execution=execution)
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        recipe, weights = step_lib.recipe_of(cfg, pretraining(cfg), mesh), weights_of(create_state(cfg))
        batch = small.put(small.batch(0, length=128) if precision == "fp8" else equal.batch(0))
        for lends in (step_lib.lends, lambda *_, **__: False):
            monkeypatch.setattr(step_lib, "lends", lends)
            gradients = jax.jit(functools.partial(step_lib.gradients, recipe))
            found.append(jax.device_get(gradients(weights, batch, small.RATES)[0]))
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        assert np.linalg.norm(want) > 0, jax.tree_util.keystr(path)
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want), jax.tree_util.keystr(path)
