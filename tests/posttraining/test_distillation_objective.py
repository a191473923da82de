"""The exact reverse KL: its value and gradient against FP64, chunks, devices, order, and the step of whole models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model.moe import unobserved
from deepseek_jax.model.transformer import Inputs, Output, apply
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.posttraining.distillation_objective import (
    HEAD,
    HIDDEN,
    DistillationTerms,
    distillation,
    distillation_step,
    reverse_kl,
)
from deepseek_jax.training.state import create_state, weights_of
from deepseek_jax.training.step import recipe_of
from tests.posttraining.test_policy_objective import mesh_of
from tests.support import small
from tests.training import nano

T, D, WIDER, V = 13, 6, 9, 11  # tokens, widths of student and teacher, vocabulary


@functools.partial(jax.jit, static_argnums=6)
def divergence(hidden, head, teacher_hidden, teacher_head, targets, weights, chunk):
    """((three times the divergence, all sums), gradients by the student's two arrays)."""

    def loss(hidden, head):
        sums = reverse_kl(hidden, head, teacher_hidden, teacher_head, targets, weights, chunk)
        return 3.0 * sums.kl, sums

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)


def make_arrays(seed=0, scale=1.0):
    """Student's hidden states and head, teacher's, targets and weights; some tokens carry none."""
    rng = np.random.default_rng(seed)
    hidden, head = scale * rng.normal(size=(T, D)), rng.normal(size=(D, V))
    teacher = rng.normal(size=(T, WIDER)), rng.normal(size=(WIDER, V))
    weights = rng.integers(0, 2, T).astype(np.float32)
    return *(np.float32(x) for x in (hidden, head, *teacher)), rng.integers(0, V, T).astype(np.int32), weights


def restated(hidden, head, teacher_hidden, teacher_head, targets, weights):
    """The sums of the module's formula in FP64, token by token and word by word."""
    kl = drawn = entropy = agreement = 0.0
    for t in np.flatnonzero(weights):
        p, q = (
            np.exp(x - np.log(np.exp(x).sum()))
            for x in (hidden[t].astype(np.float64) @ head, teacher_hidden[t].astype(np.float64) @ teacher_head)
        )
        kl += sum(p[v] * np.log(p[v] / q[v]) for v in range(V))
        drawn += np.log(p[targets[t]] / q[targets[t]])
        entropy -= sum(p[v] * np.log(p[v]) for v in range(V))
        agreement += p.argmax() == q.argmax()
    return kl, drawn, entropy, agreement


@pytest.mark.parametrize("chunk", [4, 100])
def test_sums_and_gradients_are_those_of_the_formula(chunk):
    arrays = make_arrays()
    (_, sums), gradients = divergence(*arrays, chunk)
    np.testing.assert_allclose(sums, restated(*arrays), rtol=2e-6)
    for which, gradient in enumerate(gradients):
        want = np.zeros(arrays[which].shape)
        for at in np.ndindex(*want.shape):
            ends = []
            for side in (1e-6, -1e-6):
                moved = [x.astype(np.float64) if i == which else x for i, x in enumerate(arrays)]
                moved[which][at] += side
                ends.append(3.0 * restated(*moved)[0])
            want[at] = (ends[0] - ends[1]) / 2e-6
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(gradient, want, atol=2e-6 * np.abs(want).max())


def test_a_divergence_stays_finite_where_the_teacher_excludes_a_word():
    arrays = list(make_arrays(scale=3.0))
    arrays[3] = arrays[3] * 40.0  # log q of hundreds below 0
    (_, sums), gradients = divergence(*arrays, 4)
    assert 100.0 < float(sums.kl) < np.inf and all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_loss_is_the_mean_over_the_tokens_of_answers():
    config = small.config()
    objective = distillation(config.model, config.loss, 8)
    weights_BS = np.float32([[0, 1, 1], [0, 1, 0], [0, 0, 0]])
    norms = objective.normalisers({"loss_weights_BS": weights_BS, "segment_ids_BS": np.int32(weights_BS[:, 1:2])})
    assert float(norms.tokens) == 3.0 and int(norms.rows) == 2
    assert float(objective.total(DistillationTerms(6.0, 1.0, 2.0, 4.0), None, norms, None)) == 2.0


def toy(devices, order):
    """Gradient of a table and a head in the place of the student, on a mesh: rows are taken in `order`."""
    config, rng = small.config(), np.random.default_rng(3)
    objective = distillation(config.model, config.loss, 8)
    table, head, teacher_head = (np.float32(rng.normal(size=shape)) for shape in ((V, D), (D, V), (WIDER, V)))
    lengths = rng.integers(0, 7, 16)
    batch = {
        "targets_BS": rng.integers(0, V, (16, 6)).astype(np.int32),
        "loss_weights_BS": np.float32(np.arange(6) < lengths[:, None]),
        "segment_ids_BS": np.ones((16, 6), np.int32),
        HIDDEN: np.float32(rng.normal(size=(16, 6, WIDER))),
    }
    batch = {name: array[order] for name, array in batch.items()}
    axes = "data", "node", "expert"

    def local(weights, batch, shared):
        norms = jax.lax.psum(objective.normalisers(batch), axes)

        def loss(weights):
            hidden_BSD = weights[0][jnp.roll(batch["targets_BS"], 1, axis=1)]
            terms = objective.terms(Output(hidden_BSD, (), None), weights[1], batch | shared)
            return objective.total(terms, None, norms, None)

        grads = jax.grad(loss)(jax.tree.map(lambda w: jax.lax.pcast(w, axes, to="varying"), weights))
        return jax.lax.psum(grads, axes)

    with jax.set_mesh(mesh_of(devices)):
        specs = {name: jax.P(axes) for name in batch}
        run = jax.jit(jax.shard_map(local, in_specs=(jax.P(), specs, jax.P()), out_specs=jax.P()))
        placed = {name: jax.device_put(array, jax.P(axes)) for name, array in batch.items()}
        return jax.device_get(run((table, head), placed, {HEAD: teacher_head}))


def test_devices_and_order_change_nothing():
    order = np.random.default_rng(2).permutation(16)
    for got, want in zip(toy(8, order), toy(1, np.arange(16)), strict=True):
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want) > 0


def directly(config, execution, weights, batch):
    """Log-probabilities of all rows at once, [B, S, V], in FP64 behind the network's hidden states."""
    tokens_BS, segment_ids_BS = batch["tokens_BS"], batch["segment_ids_BS"]
    inputs = Inputs(tokens_BS, batch["positions_BS"], segment_ids_BS > 0, segment_ids_BS, (), False, None)
    run = jax.jit(lambda weights, inputs: apply(config.model, execution, weights, inputs, observe=unobserved))
    hidden_BSD = np.float64(run(weights, inputs).hidden_BSD)
    logits_BSV = hidden_BSD @ np.float64(weights.params["head_DV"])
    return logits_BSV - np.log(np.exp(logits_BSV).sum(-1, keepdims=True))


@pytest.mark.slow
def test_the_step_of_whole_models_has_the_divergence_of_their_networks():
    """Two micro-batches of four answers: of a student that is its teacher, and of one that is not."""
    tree = nano.get_config("")
    tree.model.update({"num_mtp_layers": 0, "init_std": 0.1})
    tree.data.update({"mask_documents": True, "reset_positions": True})
    tree.loss.sequence_balance_weight = 0.0
    tree.optimizer.update({"weight_decay": 0.0, "bias_update_rate": (("constant", 1.0, 0.0),)})
    tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 4})
    tree.execution.precision = "fp32"
    config = from_config_dict(tree)
    mesh, objective = make_mesh(config.mesh, jax.devices()[:1]), distillation(config.model, config.loss, 16)
    batch = small.batch(rows=8, length=32, vocab=config.model.vocab_size)
    lengths = np.array([32, 9, 20, 0, 31, 14, 25, 17])[:, None]
    batch["segment_ids_BS"] = np.int32(np.arange(32) < lengths)
    batch["loss_weights_BS"] = np.float32((np.arange(32) >= 5) & (np.arange(32) < lengths))
    with jax.set_mesh(mesh):
        state, another = create_state(config), create_state(config.with_(seed=1))
        student, teacher = weights_of(state), weights_of(another)
        recipe = recipe_of(config, objective, mesh)
        step = jit_on(distillation_step, recipe.execution, mesh, recipe, recipe)
        placed = small.put(batch)
        _, same = step(student, state, placed, small.RATES)
        _, other = step(teacher, state, placed, small.RATES)
    log_p, log_q = (directly(config, recipe.execution, jax.device_get(w), batch) for w in (student, teacher))
    weights_BS = batch["loss_weights_BS"]
    assert float(same["tokens"]) == weights_BS.sum() > 50
    assert abs(float(same["loss"])) < 1e-5 and float(same["grad_norm"]) < 1e-5 < 1e-2 * float(other["grad_norm"])
    assert float(same["agreement"]) == 1.0
    drawn_BS = np.take_along_axis(log_p - log_q, batch["targets_BS"][..., None], -1)[..., 0]
    want = {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
        "sampled_kl": drawn_BS,
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "agreement": log_p.argmax(-1) == log_q.argmax(-1),
    }
    for name, value_BS in want.items():
        mean = (weights_BS * value_BS).sum() / weights_BS.sum()
        assert float(other[name]) == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    assert float(other["loss"]) == float(other["kl"]) > 0.05
