"""The batch-wise balance loss (section 4.5.3) is that of the whole batch, however the batch is cut up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.model.balance import RouterStats
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.parameters import Weights
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import create_state
from tests.support import small
from tests.support.network import apply

WEIGHT = 0.1
ROUTER = ("moe_layers", "moe", "router_DE")


def config(sizes: small.Sizes, micro_batch_size: int) -> Config:
    """Two MoE layers, eight rows of 32 tokens."""
    return small.config(sizes).with_(
        model={"num_layers": 2, "num_dense_layers": 0, "num_mtp_layers": 0, "vocab_size": 64, "dense_hidden": 64},
        loss={"sequence_balance_weight": 0.0, "batch_balance_weight": WEIGHT},
        training={"batch_size": (("constant", 1.0, 8),), "micro_batch_size": micro_batch_size},
    )


@functools.cache
def batch():
    """Rows that differ in their tokens, so that their micro-batches choose other experts."""
    arrays = small.batch(rows=8, length=32, vocab=64)
    tokens = arrays["tokens_BS"] // 8 + np.arange(8, dtype=np.int32)[:, None] * 8
    return arrays | {"tokens_BS": tokens}


@functools.cache
def gradients(sizes: small.Sizes, micro_batch_size: int):
    """Gradients and balance loss of the initial state."""
    cfg = config(sizes, micro_batch_size)
    mesh = make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)])
    objective = pretraining(cfg)
    with jax.set_mesh(mesh):
        state = create_state(cfg)
        run = jax.jit(
            functools.partial(step_lib.gradients, step_lib.recipe_of(cfg, objective, mesh)),
        )
        weights = Weights(state["params"], state["router_bias"])
        grads, sums, norms = run(weights, small.put(batch()), small.RATES)
        metrics = objective.metrics(sums.terms, sums.router, norms)
        return jax.device_get((grads, metrics["balance_loss"], state["params"], state["router_bias"]))


def leaf(tree, path=ROUTER):
    return functools.reduce(lambda part, name: part[name], path, tree)


def plain(params, router_bias, rows):
    """sum_i f_i P_i over the given rows as if they were one sequence, summed over layers."""
    cfg = resolve_for(config((1, 1, 1), 8), make_mesh(config((1, 1, 1), 8).mesh, jax.devices()[:1]))
    part = {name: array[rows] for name, array in batch().items()}
    router: RouterStats = apply(cfg, params, router_bias, part).observed
    tokens, model = (part["segment_ids_BS"] > 0).sum(), cfg.model
    f_LE = router.chosen_E * model.num_experts / (model.experts_per_token * tokens)
    return (f_LE * router.share_E / tokens).sum()


@pytest.mark.slow
def test_one_micro_batch_is_the_formula():
    _, balance, params, bias = gradients((1, 1, 1), 8)
    whole = WEIGHT * plain(params, bias, np.s_[:])
    halves = WEIGHT * (plain(params, bias, np.s_[:4]) + plain(params, bias, np.s_[4:])) / 2
    np.testing.assert_allclose(balance, whole, rtol=1e-5)
    assert halves > 1.01 * whole  # the loss of each micro-batch for itself is another one


CUTS = [
    pytest.param((1, 1, 1), 4, id="two micro-batches"),
    pytest.param((2, 1, 2), 4, id="two micro-batches, four devices"),
    pytest.param((1, 1, 1), 2, id="four micro-batches"),
    pytest.param((2, 1, 2), 8, id="four devices"),
    pytest.param((2, 2, 2), 8, id="eight devices"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "micro_batch_size"), CUTS)
def test_gradients_do_not_depend_on_how_the_batch_is_cut(sizes, micro_batch_size):
    """1e-5: FP32 sums in another order. With f of a micro-batch the routers' gradients differ by percents."""
    want, want_balance, *_ = gradients((1, 1, 1), 8)
    got, balance, *_ = gradients(sizes, micro_batch_size)
    np.testing.assert_allclose(balance, want_balance, rtol=1e-6)
    for path, one in jax.tree_util.tree_leaves_with_path(want):
        other = leaf(got, [entry.key for entry in path])
        assert np.linalg.norm(other - one) <= 1e-5 * np.linalg.norm(one) > 0, jax.tree_util.keystr(path)


def test_another_objective_pays_nothing_for_it():
    """Without the batch-wise loss no choices are reported, and the step has one forward pass."""
    cfg = config((1, 1, 1), 4).with_(loss={"batch_balance_weight": 0.0})
    assert not pretraining(cfg).batch_wise
    params, bias = gradients((1, 1, 1), 8)[2:]
    observed = jax.eval_shape(
        lambda p: (
            apply(
                resolve_for(cfg, make_mesh(cfg.mesh, jax.devices()[:1])),
                p,
                bias,
                {name: jnp.asarray(a) for name, a in batch().items()},
            ).observed
        ),
        params,
    )
    assert observed.chosen_E is None and observed.share_E is None
