"""Objectives: the index map of multi-token prediction, and one that is not pre-training's through the same step."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.balance import RouterStats, router_stats
from deepseek_jax.model.head import token_logprobs
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS, P
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import Normalisers, Terms, mtp_targets, pretraining, router_metrics
from deepseek_jax.training.state import create_state
from tests.support import small
from tests.support.network import apply


def make_batch(segments):
    length = len(segments)
    ids = np.arange(1, length + 2, dtype=np.int32)[None]
    segment_ids = np.array([segments], np.int32)
    return {
        "tokens_BS": jnp.array(ids[:, :-1]),
        "targets_BS": jnp.array(ids[:, 1:]),
        "segment_ids_BS": jnp.array(segment_ids),
        "loss_weights_BS": jnp.array(segment_ids > 0, jnp.float32),
    }


def test_mtp_index_map_of_five_tokens():
    """Spec section 13, item 8: i = 1..4 uses t_{i+1}, target t_{i+2}."""
    targets_BS, weights_BS = mtp_targets(make_batch([1] * 5), depth=1)
    assert targets_BS[0, :4].tolist() == [3, 4, 5, 6]
    assert weights_BS[0].tolist() == [1, 1, 1, 1, 0]


def test_mtp_index_map_of_depth_two():
    targets_BS, weights_BS = mtp_targets(make_batch([1] * 5), depth=2)
    assert targets_BS[0, :3].tolist() == [4, 5, 6]
    assert weights_BS[0].tolist() == [1, 1, 1, 0, 0]


def test_mtp_shift_stays_inside_documents_and_off_padding():
    batch = make_batch([1, 1, 1, 2, 2, 0, 0])
    assert mtp_targets(batch, depth=1)[1][0].tolist() == [1, 1, 0, 1, 0, 0, 0]
    assert mtp_targets(batch, depth=2)[1][0].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_mtp_keeps_the_weights_of_the_shifted_targets():
    batch = make_batch([1] * 5) | {"loss_weights_BS": jnp.array([[1.0, 0.0, 0.5, 1.0, 1.0]])}
    assert mtp_targets(batch, depth=1)[1][0].tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]


def test_mtp_refuses_a_sequence_without_targets():
    with pytest.raises(ValueError, match="2 tokens has no target at MTP depth 2"):
        mtp_targets(make_batch([1, 1]), depth=2)


def test_the_total_has_the_mean_over_mtp_depths_and_balance_by_sequence():
    """Of two depths, and of the routers of two layers; one token of three carries half of a weight."""
    config = small.config().with_(model={"num_mtp_layers": 2}, loss={"sequence_balance_weight": 0.5})
    counts_LE = np.array([[0, 1, 5, 2], [3, 0, 0, 5]])
    router = RouterStats(counts_LE, np.float32([3.0, 5.0]), np.float32([2.0, 6.0]))
    terms, norms = Terms(np.float32(6.0), np.float32(3.0), np.float32([4.0, 8.0])), Normalisers(2.5, 3, 4)
    objective = pretraining(config)
    total = objective.total(terms, router, norms, small.RATES._replace(mtp_weight=0.25))
    assert total == pytest.approx((6.0 + 3.0 + 0.25 * 6.0) / 2.5 + 0.5 * 8.0 / 4)
    metrics = jax.device_get(objective.metrics(terms, router, norms))
    assert metrics["mtp_loss"].tolist() == pytest.approx([1.6, 3.2]) and metrics["dead_experts"] == 3
    assert metrics["loss"] == pytest.approx(2.4) and metrics["balance_loss"] == pytest.approx(1.0)
    assert metrics["max_vio_sequence_L"].tolist() == [0.5, 1.5]


class ClippedTerms(NamedTuple):
    gain: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Clipped:
    """A policy gradient with clipped ratios, as small as it can be.

    Advantages and old log-probabilities per row and token come with the batch. Every sequence weighs the same. MTP
    layers do not run.
    """

    clip: float
    batch_wise = False

    @property
    def observe(self):
        return functools.partial(router_stats, small.config().with_(loss={"sequence_balance_weight": 0.0}).loss)

    def normalisers(self, batch):
        return (batch["loss_weights_BS"].sum(-1) > 0).sum(dtype=jnp.int32)

    def next_tokens(self, batch):
        return None

    def terms(self, output, head_DV, batch):
        hidden_TD = output.hidden_BSD.reshape(-1, output.hidden_BSD.shape[-1])
        logprob_T, _ = token_logprobs(hidden_TD, head_DV, batch["targets_BS"].reshape(-1), 64)
        return ClippedTerms(
            self.gain(logprob_T.reshape(batch["targets_BS"].shape), batch), batch["loss_weights_BS"].sum()
        )

    def gain(self, logprob_BS, batch):
        ratio_BS = jnp.exp(logprob_BS - batch["old_logprobs_BS"])
        advantage_B1, weights_BS = batch["advantages_B"][:, None], batch["loss_weights_BS"]
        clipped_BS = jnp.clip(ratio_BS, 1.0 - self.clip, 1.0 + self.clip)
        gain_BS = jnp.minimum(ratio_BS * advantage_B1, clipped_BS * advantage_B1) * weights_BS
        return (gain_BS.sum(-1) / jnp.maximum(weights_BS.sum(-1), 1.0)).sum()

    def total(self, terms, router, norms, rates):
        return -terms.gain / norms

    def metrics(self, terms, router, norms):
        return {"loss": -terms.gain / norms, "tokens": terms.tokens} | router_metrics(router, norms)


def policy_batch():
    batch, rng = small.batch(), np.random.default_rng(3)
    weights = batch["loss_weights_BS"] * (np.arange(64) >= 20)  # a prompt of twenty tokens
    old = -np.log(512.0) + 0.3 * rng.normal(size=weights.shape)
    return batch | {
        "loss_weights_BS": np.float32(weights),
        "old_logprobs_BS": np.float32(old),
        "advantages_B": np.float32(rng.normal(size=len(weights))),
    }


def put(batch):
    return {name: jax.device_put(array, P(ROWS)) for name, array in batch.items()}


@pytest.mark.slow
@pytest.mark.xdist_group(small.GROUP)
def test_the_step_minimises_another_objective():
    """Two micro-batches on eight devices: the gradient of the formula on the whole batch, written with log_softmax."""
    config, objective, batch = small.config((2, 2, 2)), Clipped(0.2), policy_batch()
    mesh = make_mesh(config.mesh)
    recipe = step_lib.recipe_of(config, objective, mesh)
    with jax.set_mesh(mesh):
        state = create_state(config)
        run = jax.jit(functools.partial(small.whole_step, recipe))
        grads, sums, norms, after, metrics = jax.device_get(run(state, put(batch), small.RATES))
        before = jax.device_get(state["router_bias"])
        assert jax.tree.map(jnp.shape, after["router_bias"]) == jax.tree.map(jnp.shape, before)
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(after["router_bias"]), before)
        assert moved == {"moe_layers": {"moe": {"bias_E": True}}, "mtp_layers": {"block": {"moe": {"bias_E": False}}}}

    on = small.on_mesh(small.MESHES[0])
    params, router_bias = jax.device_get((on.state["params"], on.state["router_bias"]))

    def plain(params):
        hidden_BSD = apply(on.config, params, router_bias, batch).hidden_BSD
        logprobs_BSV = jax.nn.log_softmax(hidden_BSD @ params["head_DV"], axis=-1)
        logprob_BS = jnp.take_along_axis(logprobs_BSV, batch["targets_BS"][..., None], axis=-1)[..., 0]
        return -objective.gain(logprob_BS, batch) / 16

    value, want = jax.jit(jax.value_and_grad(plain))(params)
    assert norms == 16 and sums.terms.tokens == batch["loss_weights_BS"].sum()
    np.testing.assert_allclose(float(metrics["loss"]), value, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, grads)
        if path[0].key == "mtp_layers":
            assert not np.any(got)
        else:
            assert np.linalg.norm(got - leaf) <= 2e-5 * np.linalg.norm(leaf) > 0, jax.tree_util.keystr(path)


def test_runs_that_differ_in_name_data_or_schedules_share_a_program():
    config = small.config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    other = config.with_(
        name="other",
        seed=7,
        data={"tokenizer": "byte", "sources": (), "fim_rate": 0.5},
        optimizer={"learning_rate": (("constant", 1.0, 1e-5),), "warmup_steps": 3},
        loss={"mtp_weight": (("constant", 1.0, 0.1),)},
        training={"num_tokens": 5.0, "eval_every": 1},
    )
    for make in (step_lib.jit_train_step, step_lib.jit_eval_step):
        program = make(config, pretraining(config), mesh)
        assert program is make(other, pretraining(other), mesh)
        for change in ({"execution": {"remat": "full"}}, {"loss": {"sequence_balance_weight": 0.5}}):
            changed = config.with_(**change)
            assert program is not make(changed, pretraining(changed), mesh)


@pytest.mark.xdist_group(small.GROUP)
def test_an_objective_without_a_loss_is_refused():
    class Silent(Clipped):
        def metrics(self, terms, router, norms):
            return router_metrics(router, norms)

    on, batch = small.on_mesh(small.MESHES[0]), policy_batch()
    recipe = dataclasses.replace(on.recipe, objective=Silent(0.2))
    with jax.set_mesh(on.mesh), pytest.raises(ValueError, match="the metrics of Silent are .* and lack 'loss'"):
        jax.eval_shape(functools.partial(step_lib.train_step, recipe), on.state, put(batch), small.RATES)
