"""The step: its gradient is that of a plain objective however it is cut up, padding counts nowhere, no NaN survives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.parallel.host_memory import to_host
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights, partition_specs
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.average import averaged, beside
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import global_norms
from tests.support import small
from tests.support.network import apply

ONE = small.MESHES[0]
pytestmark = pytest.mark.xdist_group(small.GROUP)  # the compiled step of `small.on_mesh`


@functools.cache
def uneven_batch():
    """The second micro-batch of eight rows has a third of the first's weight: averaging micro-batches would show."""
    batch = small.batch()
    weights = batch["loss_weights_BS"].copy()
    weights[8:, 20:] = 0.0
    weights[3] *= 0.5
    return batch | {"loss_weights_BS": weights}


@functools.cache
def run():
    """Take the step from the initial state; return its results on the host."""
    on = small.on_mesh(ONE)
    with jax.set_mesh(on.mesh):
        return jax.device_get(on.step(on.state, small.put(uneven_batch()), small.RATES))


def plain_objective(config, params, router_bias, batch, mtp_weight):
    """The paper's objective on the whole batch: all logits at once, targets shifted by loops, no collectives."""
    output = apply(config, params, router_bias, batch)
    tokens = batch["loss_weights_BS"].sum()

    def cross_entropy(hidden_BSD, targets_BS, weights_BS):
        log_p_BSV = jax.nn.log_softmax(hidden_BSD @ params["head_DV"], axis=-1)
        return -(jnp.take_along_axis(log_p_BSV, targets_BS[..., None], axis=-1)[..., 0] * weights_BS).sum() / tokens

    total = cross_entropy(output.hidden_BSD, batch["targets_BS"], batch["loss_weights_BS"])
    for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1):
        targets, weights = np.zeros_like(batch["targets_BS"]), np.zeros_like(batch["loss_weights_BS"])
        for b, i in np.ndindex(targets.shape):
            if i + depth < targets.shape[1] and batch["segment_ids_BS"][b, i] == batch["segment_ids_BS"][b, i + depth]:
                targets[b, i], weights[b, i] = batch["targets_BS"][b, i + depth], batch["loss_weights_BS"][b, i + depth]
        total += mtp_weight / config.model.num_mtp_layers * cross_entropy(hidden_BSD, targets, weights)
    return total + config.loss.sequence_balance_weight * output.observed.sequence_balance.sum() / len(
        batch["tokens_BS"]
    )


@functools.cache
def plain_gradients():
    """Value and gradients of the plain objective, of the initial state."""
    on = small.on_mesh(ONE)
    params, router_bias = jax.device_get((on.state["params"], on.state["router_bias"]))
    objective = functools.partial(
        plain_objective, on.config, router_bias=router_bias, batch=uneven_batch(), mtp_weight=0.3
    )
    return jax.device_get(jax.jit(jax.value_and_grad(objective))(params))


def assert_gradients_equal(got, want, tolerance):
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        other = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, got)
        assert np.linalg.norm(leaf) > 0, jax.tree_util.keystr(path)
        assert np.linalg.norm(other - leaf) <= tolerance * np.linalg.norm(leaf), jax.tree_util.keystr(path)


def test_gradients_and_losses_are_those_of_the_plain_objective():
    """Two micro-batches, chunked cross entropy, one device of a mesh.

    1e-5: FP32 sums in another order; measured 9e-7.
    """
    grads, _, _, _, metrics = run()
    value, want = plain_gradients()
    assert_gradients_equal(grads, want, 1e-5)
    total = metrics["loss"] + 0.3 * metrics["mtp_loss"].mean() + metrics["balance_loss"]
    np.testing.assert_allclose(total, value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(want), rtol=1e-5)


@pytest.mark.slow
def test_gradients_do_not_depend_on_when_weights_are_gathered():
    """Once a step, on (data 2, expert 2), fully recomputed. Cuts and meshes: `tests.training.test_equal_steps`."""
    sizes = (2, 1, 2)
    config = small.config(sizes).with_(execution={"gather": "step", "remat": "full"})
    mesh = make_mesh(config.mesh, jax.devices()[: np.prod(sizes)])
    recipe = step_lib.recipe_of(config, pretraining(config), mesh)
    params, router_bias = jax.device_get((small.on_mesh(ONE).state["params"], small.on_mesh(ONE).state["router_bias"]))
    with jax.set_mesh(mesh):
        params = jax.tree.map(jax.device_put, params, partition_specs(params))
        weights = Weights(params, jax.tree.map(lambda b: jax.device_put(b, jax.P()), router_bias))
        gradients = jax.jit(functools.partial(step_lib.gradients, recipe))
        grads, sums, _ = jax.device_get(gradients(weights, small.put(uneven_batch()), small.RATES))
    assert_gradients_equal(grads, plain_gradients()[1], 1e-5)
    np.testing.assert_array_equal(sums.router.counts_E, run()[1].router.counts_E)


def test_counts_are_exact_and_biases_move_once():
    """K assignments per valid token and layer over both micro-batches; one step of the total's sign, for MTP too."""
    on = small.on_mesh(ONE)
    _, sums, _, state, metrics = run()
    counts_LE, valid = metrics["counts_LE"], int((uneven_batch()["segment_ids_BS"] > 0).sum())
    model = on.config.model
    assert counts_LE.dtype == np.int32 and counts_LE.shape == (
        model.num_moe_layers + model.num_mtp_layers,
        model.num_experts,
    )
    np.testing.assert_array_equal(counts_LE.sum(-1), model.experts_per_token * valid)
    assert metrics["tokens"] == valid < uneven_batch()["tokens_BS"].size
    signs = np.sign(counts_LE.sum(-1, keepdims=True) - counts_LE.astype(np.int64) * model.num_experts)
    moe, mtp = (
        state["router_bias"]["moe_layers"]["moe"]["bias_E"],
        state["router_bias"]["mtp_layers"]["block"]["moe"]["bias_E"],
    )
    np.testing.assert_array_equal(np.concatenate([moe, mtp]), np.float32(1e-3) * signs)
    np.testing.assert_array_equal(metrics["bias_max_L"], np.concatenate([moe, mtp]).max(-1))
    np.testing.assert_array_equal(metrics["bias_min_L"], np.concatenate([moe, mtp]).min(-1))
    np.testing.assert_allclose(metrics["max_vio_L"], counts_LE.max(-1) / counts_LE.mean(-1) - 1, rtol=1e-6)
    assert metrics["dead_experts"] == (counts_LE == 0).sum()


def test_padding_changes_nothing():
    """Other tokens, targets and positions on padding, also in a row of only padding: the same step, to the bit."""
    on = small.on_mesh(ONE)
    batch = uneven_batch()
    valid_BS = batch["segment_ids_BS"] > 0
    valid_BS[5] = False
    batch = batch | {
        "segment_ids_BS": batch["segment_ids_BS"] * valid_BS,
        "loss_weights_BS": batch["loss_weights_BS"] * valid_BS,
    }
    noise = small.batch(seed=9)
    other = batch | {
        name: np.where(valid_BS, batch[name], noise[name]) for name in ("tokens_BS", "targets_BS", "positions_BS")
    }
    # The token after a document's end is the target of its last position, whose weight is 0, and enters MTP there.
    with jax.set_mesh(on.mesh):
        first, second = (jax.device_get(on.step(on.state, small.put(b), small.RATES)) for b in (batch, other))
    assert not np.array_equal(batch["tokens_BS"], other["tokens_BS"])
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[-1]["tokens"] == valid_BS.sum()


POISONS = {"a weight of the loss": np.inf, "a parameter": np.nan}


@pytest.mark.parametrize("name", POISONS)
def test_a_step_that_is_not_finite_changes_nothing(name):
    """Parameters, moments and biases keep every bit; `skipped` counts such steps in a row, and a good one resets it."""
    on = small.on_mesh(ONE)
    batch = uneven_batch()
    with jax.set_mesh(on.mesh):
        good, state = small.put(batch), on.state
        if name == "a parameter":
            params = jax.tree.map(np.array, state["params"])
            params["moe_layers"]["moe"]["down_EFD"][0, 0, 0, 0] = POISONS[name]
            params = jax.tree.map(lambda p, like: jax.device_put(p, like.sharding), params, state["params"])
            state, bad = state | {"params": params}, good
        else:
            weights = batch["loss_weights_BS"].copy()
            weights[2, 2] = POISONS[name]
            bad = small.put(batch | {"loss_weights_BS": weights})
        before = jax.device_get(state)
        for skipped in (1, 2):
            _, _, _, state, metrics = on.step(state, bad, small.RATES)
            assert int(metrics["nonfinite"]) > 0 and not np.isfinite(metrics["grad_norm"])
            assert int(metrics["skipped"]) == int(state["skipped"]) == skipped
        after = jax.device_get(state)
        assert after["step"] == before["step"] + 2
        for part in ("params", "optimizer", "router_bias"):
            jax.tree.map(np.testing.assert_array_equal, after[part], before[part])
        state = state | {"params": on.state["params"]}
        _, _, _, state, metrics = on.step(state, good, small.RATES)
    assert int(metrics["nonfinite"]) == int(metrics["skipped"]) == int(state["skipped"]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), run()[3]["params"])


@functools.cache
def update(ema_decay):
    """The update alone, jitted, with an average of the weights."""
    recipe = small.on_mesh(ONE).recipe
    optimizer = dataclasses.replace(recipe.optimizer, ema_decay=ema_decay)
    return jax.jit(functools.partial(step_lib.update, dataclasses.replace(recipe, optimizer=optimizer)))


def check_host_average(on, start, *states):
    """An average in host memory has the bits of the one that the step makes, and stays as it is when a step skips."""
    config = on.config.with_(optimizer={"ema_decay": 0.9, "ema_memory": "host"})
    for state in states:
        before = {"ema": jax.jit(to_host)(start)}
        assert set(beside(config.optimizer, state)) == set(state) - {"ema"}
        after = averaged(config, on.mesh, before, beside(config.optimizer, state))
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after["ema"])} == {"pinned_host"}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(state))


def test_average_follows_the_new_parameters():
    on = small.on_mesh(ONE)
    with jax.set_mesh(on.mesh):
        grads, sums, norms, want, _ = on.step(on.state, small.put(uneven_batch()), small.RATES)
        start = jax.tree.map(lambda p: p + 1.0, on.state["params"])
        state, _ = update(0.9)(on.state | {"ema": start}, grads, sums, norms, small.RATES)
        broken, _ = update(0.9)(
            on.state | {"ema": start}, jax.tree.map(lambda g: g * jnp.nan, grads), sums, norms, small.RATES
        )
        check_host_average(on, start, state, broken)
    for got, p, p0 in zip(*map(jax.tree.leaves, jax.device_get((state["ema"], want["params"], start))), strict=True):
        np.testing.assert_allclose(got, 0.9 * p0 + 0.1 * p, rtol=0, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(broken["ema"]), jax.device_get(start))


def test_a_norm_that_overflows_or_a_loss_alone_is_not_finite():
    """Elements of 1e30 are finite, their norm is not: clipping would silently make it a step of zero gradient."""
    on = small.on_mesh(ONE)
    with jax.set_mesh(on.mesh):
        grads, sums, norms, _, _ = on.step(on.state, small.put(uneven_batch()), small.RATES)
        huge = jax.tree.map(lambda g: jnp.full_like(g, 1e30), grads)
        lost = sums._replace(terms=sums.terms._replace(loss=sums.terms.loss * jnp.nan))
        for bad in ((huge, sums), (grads, lost)):
            state, metrics = update(0.9)(on.state | {"ema": on.state["params"]}, *bad, norms, small.RATES)
            assert int(metrics["nonfinite"]) > 0 and int(state["skipped"]) == 1
            after, before = jax.device_get((state["params"], on.state["params"]))
            jax.tree.map(np.testing.assert_array_equal, after, before)


def norm(tree):
    """The L2 norm of a tree, in double precision."""
    return np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def test_norms_are_those_of_the_new_parameters_and_of_their_change():
    """1e-6: the change is what FP32 parameters keep of the update; measured 7e-8."""
    before, after, metrics = small.on_mesh(ONE).state["params"], run()[3]["params"], run()[-1]
    np.testing.assert_allclose(metrics["param_norm"], norm(after), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["update_norm"], norm(jax.tree.map(lambda a, b: a - np.float64(b), after, before)), rtol=1e-6
    )
    assert norm(after) != norm(before)


def test_norms_count_every_element_once_however_it_lies():
    """Split along rows, along columns, over some axes and over none."""
    shapes = {"down_EFD": (3, 8, 4, 16), "gate_up_D2F": (16, 2, 4), "o_NHD": (2, 3, 16), "norm_D": (3, 16)}
    first, second = (
        {name: np.random.default_rng(i).normal(size=shape) for name, shape in shapes.items()} for i in range(2)
    )
    mesh = make_mesh(small.config((2, 2, 2)).mesh)
    with jax.set_mesh(mesh):
        trees = [
            jax.tree.map(lambda x, spec: jax.device_put(np.float32(x), spec), t, partition_specs(t))
            for t in (first, second)
        ]
        got = jax.jit(global_norms)(*trees)
    np.testing.assert_allclose(got, [norm(first), norm(second)], rtol=1e-6)


def test_evaluation_sums_what_the_step_averages():
    """And leaves the weights to others: nothing is donated, no bias moves, and a second time gives the same bits."""
    on = small.on_mesh(ONE)
    with jax.set_mesh(on.mesh):
        evaluate = step_lib.jit_eval_step(on.config, pretraining(on.config), on.mesh)
        state = Weights(on.state["params"], on.state["router_bias"])
        weights = jax.tree.map(jnp.copy, state)  # nobody has a view of these, which would forbid to donate them
        sums, again = (jax.device_get(evaluate(weights, small.put(uneven_batch()))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, again, sums)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights), jax.device_get(state))
    metrics = run()[-1]
    np.testing.assert_allclose(sums["weight_sum"], uneven_batch()["loss_weights_BS"].sum())
    np.testing.assert_allclose(sums["loss_sum"] / sums["weight_sum"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(sums["mtp_loss_sum"] / sums["weight_sum"], metrics["mtp_loss"], rtol=1e-6)
    np.testing.assert_array_equal(sums["counts_LE"], metrics["counts_LE"])
