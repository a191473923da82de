"""The exact reverse KL: its value and gradient against FP64, chunks, devices, order, and the step of a whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.transformer import Output
from deepseek_jax.posttraining.distillation_objective import HEAD, HIDDEN, DistillationTerms, distillation, reverse_kl
from tests.posttraining.test_policy_objective import mesh_of
from tests.support import small

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


def test_equal_models_have_no_divergence_and_no_gradient():
    """The teacher is the student, with three more columns that its head does not read."""
    hidden, head, *_, targets, weights = make_arrays()
    more = WIDER - D
    teacher = np.pad(hidden, ((0, 0), (0, more)), constant_values=7.0), np.pad(head, ((0, more), (0, 0)))
    (_, sums), gradients = divergence(hidden, head, *teacher, targets, weights, 4)
    assert abs(float(sums.kl)) < 1e-5 and float(sums.agreement) == weights.sum() and float(sums.entropy) > 1.0
    assert max(np.abs(gradient).max() for gradient in gradients) < 1e-5


def test_a_divergence_stays_finite_where_the_teacher_excludes_a_word():
    arrays = list(make_arrays(scale=3.0))
    arrays[3] = arrays[3] * 40.0  # log q of hundreds below 0
    (_, sums), gradients = divergence(*arrays, 4)
    assert 100.0 < float(sums.kl) < np.inf and all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_estimate_by_drawn_tokens_has_the_exact_mean():
    """Over draws from the student, log p - log q of the drawn token averages to the divergence."""
    *arrays, _, _ = make_arrays()
    rng, rounds, ones = np.random.default_rng(1), 300, np.ones(T, np.float32)
    logits = arrays[0].astype(np.float64) @ arrays[1]
    p_TV = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    drawn = [np.array([rng.choice(V, p=p) for p in p_TV], np.int32) for _ in range(rounds)]
    found = [divergence(*arrays, targets, ones, 4)[0][1] for targets in drawn]
    estimates, exact = np.array([float(sums.sampled_kl) for sums in found]), float(found[0].kl)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(rounds) < 0.2 * exact


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
