"""GRPO's loss: values and gradients against the papers' formulas in FP64, and what an update must not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.model.balance import RouterStats
from deepseek_jax.model.transformer import Output
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS, P
from deepseek_jax.posttraining import choices as choices_lib
from deepseek_jax.posttraining.choices import CISPO, GRPO, GSPO, VARIANTS, Choices
from deepseek_jax.posttraining.policy_objective import (
    PolicyNormalisers,
    policy,
    policy_loss,
    policy_terms,
    valued,
)
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.state import abstract_state
from tests.support import small
from tests.support.meshes import mesh_of

LENGTHS = (5, 1, 3, 6, 0, 2)  # of the outputs, behind prompts of PROMPT tokens; one output is left out
PROMPT, WIDTH, VOCAB = 2, 8, 5
TERMS = jax.jit(policy_terms, static_argnums=0)

CASES = VARIANTS | {
    "dr_grpo": dataclasses.replace(VARIANTS["dr_grpo"], constant_length=7),
    "dual": dataclasses.replace(GRPO, dual_clip=1.5, kl="k1"),
    "k2 over tokens": dataclasses.replace(GRPO, kl="k2", kl_weight=0.5, aggregation="token"),
    "tis": dataclasses.replace(GRPO, tis_cap=1.1, kl_weight=0.0),
    "tis of gspo": dataclasses.replace(GSPO, tis_cap=1.1, kl_weight=0.1),
    "tis of cispo": dataclasses.replace(CISPO, tis_cap=1.2, clip_low=0.1, clip_high=0.1),
}


def make_batch(lengths=LENGTHS, seed=0):
    """Logits [B, S, V] of a policy in FP64, and a batch of outputs that another policy has drawn."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), WIDTH
    logits = rng.normal(size=(*shape, VOCAB))
    targets = rng.integers(0, VOCAB, shape)
    places = np.arange(WIDTH)
    weights = (places >= PROMPT) & (places < PROMPT + np.array(lengths)[:, None])
    near = np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    near = np.where(weights, near, 1e3 * rng.normal(size=shape))  # what stands elsewhere must not matter
    batch = {
        "targets_BS": targets.astype(np.int32),
        "segment_ids_BS": (places < PROMPT + np.array(lengths)[:, None]).astype(np.int32),
        "loss_weights_BS": weights.astype(np.float32),
        "advantages_B": np.float32(rng.normal(size=len(lengths))),
    }
    for name in ("old", "reference", "sampler"):
        batch[f"{name}_logprobs_BS"] = np.float32(near + 0.3 * rng.normal(size=shape))
    return logits, batch


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def restated(c: Choices, logits, frozen, batch):
    """The loss as the papers have it, output by output; what they do not differentiate is of the `frozen` logits."""
    outputs = []
    for i in range(len(logits)):
        at = np.flatnonzero(batch["loss_weights_BS"][i])
        if len(at):
            ids = batch["targets_BS"][i, at]
            pi, stopped = (log_softmax(x[i, at])[np.arange(len(at)), ids] for x in (logits, frozen))
            rest = (batch[f"{name}_logprobs_BS"][i, at].astype(np.float64) for name in ("old", "reference", "sampler"))
            outputs.append((pi, stopped, *rest, float(batch["advantages_B"][i])))
    total = 0.0
    for pi, stopped, old, ref, sampler, a in outputs:
        size = len(pi)
        if c.ratio == "token":
            rho, rho_stopped = np.exp(pi - old), np.exp(stopped - old)
        elif c.ratio == "output":
            rho = rho_stopped = np.full(size, np.exp(pi.sum() - old.sum()))
        elif c.ratio == "sequence":
            rho = rho_stopped = np.full(size, np.prod(np.exp(pi) / np.exp(old)) ** (1 / size))
        else:
            s = np.prod(np.exp(stopped) / np.exp(old)) ** (1 / size)
            rho, rho_stopped = s * np.exp(pi) / np.exp(stopped), np.full(size, s)
        low, high = 1 - c.clip_low, 1 + c.clip_high
        if c.clip == "weight":
            gain = np.clip(rho_stopped, low, high) * a * pi
        else:
            gain = np.array([min(r * a, min(max(r, low), high) * a) for r in rho])
            if c.dual_clip and a < 0:
                gain = np.maximum(gain, c.dual_clip * a)
        if c.tis_cap:
            gain = gain * np.minimum(np.exp(old) / np.exp(sampler), c.tis_cap)
        x = np.full(size, (pi - ref).sum()) if c.ratio == "output" else pi - ref
        kl = {"k1": x, "k2": x * x / 2, "k3": np.exp(-x) + x - 1}[c.kl]
        value = (gain - c.kl_weight * kl).sum()
        if c.aggregation == "sequence":
            total += value / size / len(outputs)
        elif c.aggregation == "token":
            total += value / sum(len(each[0]) for each in outputs)
        else:
            total += value / c.constant_length / len(outputs)
    return -total


def normalisers(batch):
    weights = batch["loss_weights_BS"]
    return PolicyNormalisers(weights.sum(), (weights > 0).any(-1).sum(), len(weights))


def value_and_gradient(c, logits, batch):
    """Ours, through log_softmax."""

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)
        logprob_BS = jnp.take_along_axis(logprobs, batch["targets_BS"][..., None], -1)[..., 0]
        return policy_loss(c, policy_terms(c, logprob_BS, batch), normalisers(batch))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(logits))
    return float(value), np.array(gradient)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper(name):
    c, (logits, batch) = CASES[name], make_batch()
    choices_lib.check(c)
    value, gradient = value_and_gradient(c, logits, batch)
    np.testing.assert_allclose(value, restated(c, logits, logits, batch), rtol=5e-6, atol=1e-7)
    want = np.zeros_like(logits)
    for at in zip(*np.nonzero(np.broadcast_to(batch["loss_weights_BS"][..., None], logits.shape)), strict=True):
        step = np.zeros_like(logits)
        step[at] = 1e-6
        want[at] = (restated(c, logits + step, logits, batch) - restated(c, logits - step, logits, batch)) / 2e-6
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(gradient, want, atol=3e-6 * np.abs(want).max())


def test_what_is_reported_are_means_over_the_tokens_of_outputs():
    c = dataclasses.replace(GRPO, tis_cap=1.1, clip_low=0.1, clip_high=0.4)
    (logits, batch), config = make_batch(), small.config()
    at = batch["loss_weights_BS"] > 0
    logprob_BS = np.take_along_axis(log_softmax(logits), batch["targets_BS"][..., None], -1)[..., 0]
    pi, old, ref, sampler = (
        np.float64(x[at]) for x in (logprob_BS, *(batch[f"{n}_logprobs_BS"] for n in ("old", "reference", "sampler")))
    )
    ratio, tis, behind = np.exp(pi - old), np.exp(old - sampler), ref - pi
    want = {"loss": restated(c, logits, logits, batch), "kl": (np.exp(behind) - behind - 1).mean()}
    want |= {"entropy": -pi.mean(), "old_kl": (old - pi).mean(), "ratio_mean": ratio.mean(), "ratio_std": ratio.std()}
    want |= {"clip_low": (ratio < 1 - c.clip_low).mean(), "clip_high": (ratio > 1 + c.clip_high).mean()}
    assert want["clip_low"] > want["clip_high"] > 0
    want |= {"tis_mean": tis.mean(), "tis_capped": (tis > 1.1).mean(), "outputs": 5, "tokens": sum(LENGTHS)}
    router = RouterStats(jnp.ones((1, 4), jnp.int32), jnp.zeros(1), jnp.zeros(1))
    objective = policy(c, config.model, config.loss, 16)
    found = objective.metrics(TERMS(c, np.float32(logprob_BS), batch), router, normalisers(batch))
    for name, value in want.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


def test_cases_clip_on_both_sides():
    """A golden value proves nothing of a clip that no token reaches."""
    logits, batch = make_batch()
    at = batch["loss_weights_BS"] > 0
    pi = np.take_along_axis(log_softmax(logits), batch["targets_BS"][..., None], -1)[..., 0]
    ratio = np.exp((pi - batch["old_logprobs_BS"])[at])
    above = np.broadcast_to(batch["advantages_B"][:, None] > 0, at.shape)[at]
    assert ((ratio > 1.28) & above).any() and ((ratio < 0.8) & ~above).any() and ((ratio > 1.5) & ~above).any()


def test_a_ratio_beyond_all_numbers_has_a_finite_gradient():
    logits, batch = make_batch()
    batch["old_logprobs_BS"] -= np.float32(200.0)
    for c in (GRPO, VARIANTS["v3"]):
        value, gradient = value_and_gradient(c, logits, batch)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("behind", [-30.0, -1.0, 1.0, 19.0, 21.0, 300.0])
@pytest.mark.parametrize("name", ["grpo", "v3"])
def test_the_divergence_pulls_towards_the_reference_however_far_it_is(name, behind):
    """k3 falls where a policy below the reference rises, and the other way round, beyond the largest log ratio too."""
    c = VARIANTS[name]
    batch = {key: jnp.zeros((1, 1)) for key in ("old_logprobs_BS", "sampler_logprobs_BS")}
    batch |= {"loss_weights_BS": jnp.ones((1, 1)), "advantages_B": jnp.zeros(1)}
    batch["reference_logprobs_BS"] = jnp.full((1, 1), behind)
    value, slope = jax.value_and_grad(lambda x: policy_terms(c, x.reshape(1, 1), batch).kl)(jnp.float32(0.0))
    held = min(behind, 20.0)
    assert float(slope) == pytest.approx(1.0 - np.exp(held), rel=1e-5)
    assert float(value) == pytest.approx(np.exp(held) * (1.0 + behind - held) - behind - 1.0, rel=1e-5)


def test_a_bad_output_that_became_far_likelier_is_still_pushed_down():
    batch = {"old_logprobs_BS": jnp.full((1, 1), -25.0), "loss_weights_BS": jnp.ones((1, 1))}
    batch["advantages_B"] = jnp.full(1, -1.0)
    c = dataclasses.replace(GRPO, kl_weight=0.0)
    slope = jax.grad(lambda x: policy_terms(c, x.reshape(1, 1), batch).gain)(jnp.float32(0.0))
    assert float(slope) == pytest.approx(-np.exp(20.0), rel=1e-5)


def test_exact_values_stand_for_the_forward_pass_and_its_derivative_stays():
    own, exact = jnp.float32([-1.0, -2.5]), jnp.float32([-1.0000001, -2.25])
    value, slope = jax.value_and_grad(lambda x: (valued(3.0 * x, exact) * jnp.float32([1.0, 10.0])).sum())(own)
    assert value == exact[0] + 10.0 * exact[1] and slope.tolist() == [3.0, 30.0]


def toy(c, mesh, order, rows):
    """Gradient of a table and a head in the place of the network, on a mesh: rows are taken in `order`."""
    config = small.config()
    objective = policy(c, config.model, config.loss, 16)
    rng = np.random.default_rng(1)
    table, head = np.float32(rng.normal(size=(VOCAB, 4))), np.float32(rng.normal(size=(4, VOCAB)))
    batch = make_batch(rows)[1]
    batch = {name: array[order] for name, array in batch.items()}

    def local(weights, batch):
        norms = jax.lax.psum(objective.normalisers(batch), ROWS)

        def loss(weights):
            hidden_BSD = weights[0][jnp.roll(batch["targets_BS"], 1, axis=1)]
            return objective.total(objective.terms(Output(hidden_BSD, (), None), weights[1], batch), None, norms, None)

        grads = jax.grad(loss)(jax.tree.map(lambda w: jax.lax.pcast(w, ROWS, to="varying"), weights))
        return jax.lax.psum(grads, ROWS)

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(local, in_specs=(P(), {name: P(ROWS) for name in batch}), out_specs=P()))
        placed = {name: jax.device_put(array, P(ROWS)) for name, array in batch.items()}
        return jax.device_get(run((table, head), placed))


@functools.cache
def unsplit(name):
    return toy(VARIANTS[name], mesh_of(), np.arange(16), ROWS_OF_16)


ROWS_OF_16 = (5, 1, 3, 6, 0, 2, 6, 4, 1, 1, 2, 0, 5, 3, 2, 6)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_devices_and_order_change_nothing(name):
    """Eight devices with rows in random order: every advantage meets its own tokens, and divisors are global."""
    order = np.random.default_rng(2).permutation(16)
    for got, want in zip(toy(VARIANTS[name], mesh_of(data=8), order, ROWS_OF_16), unsplit(name), strict=True):
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want) > 0


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_micro_batches_and_padding_change_nothing(name):
    """Terms of parts add up to the whole's, whatever the split; rows of padding and wider rows add nothing."""
    c, (logits, batch) = VARIANTS[name], make_batch()
    logprob_BS = np.float32(np.take_along_axis(log_softmax(logits), batch["targets_BS"][..., None], -1)[..., 0])
    whole, norms = TERMS(c, logprob_BS, batch), normalisers(batch)
    parts = [
        TERMS(c, logprob_BS[rows], {k: v[rows] for k, v in batch.items()})
        for rows in np.split(np.random.default_rng(3).permutation(len(logprob_BS)), 3)
    ]

    def wider(x):
        return np.pad(x, ((0, 2),) + ((0, 3),) * (x.ndim - 1))

    padded = {name: wider(array) for name, array in batch.items()}
    assert normalisers(padded)[:2] == norms[:2]
    for terms in (jax.tree.map(lambda *x: np.sum(x), *parts), TERMS(c, wider(logprob_BS), padded)):
        np.testing.assert_allclose(policy_loss(c, terms, norms), policy_loss(c, whole, norms), rtol=2e-6)
        for got, want in zip(terms, whole, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "tokens"}, "ratio = 'tokens' is unknown; use one of token, sequence"),
        ({"clip_low": 1.5}, "clip_low = 1.5 must be above 0"),
        ({"dual_clip": 0.5}, "dual_clip = 0.5 must be above 1"),
        ({"clip": "weight", "dual_clip": 3.0}, "dual_clip = 3.0 has no meaning"),
        ({"tis_cap": 0.5}, "tis_cap = 0.5 must be at least 1"),
        ({"kl_weight": float("nan")}, "kl_weight = nan"),
        ({"aggregation": "constant"}, "constant_length = 0 must be positive"),
        ({"overlong_buffer": 4}, "overlong_buffer = 4 must be positive for .*'punish', and 0 for the others"),
    ],
)
def test_choices_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        choices_lib.check(dataclasses.replace(GRPO, **change))


@pytest.mark.slow
def test_the_step_takes_the_objective_where_devices_share_experts_and_rows():
    """Traced with its checks of what varies over which axis, for an objective that sums over whole outputs."""
    config = small.config((1, 1, 2)).with_(mesh={"context": 4})
    mesh = make_mesh(config.mesh)
    c = dataclasses.replace(GSPO, kl_weight=0.1, tis_cap=2.0)
    recipe = step_lib.recipe_of(config, policy(c, config.model, config.loss, 64), mesh)
    batch = {k: np.zeros((16, 64), np.int32) for k in ("tokens_BS", "targets_BS", "positions_BS", "segment_ids_BS")}
    names = ("loss_weights_BS", *(f"{name}_logprobs_BS" for name in ("old", "reference", "sampler")))
    batch |= {name: np.zeros((16, 64), np.float32) for name in names} | {"advantages_B": np.zeros(16, np.float32)}
    with jax.set_mesh(mesh):
        placed = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P(ROWS))) for k, v in batch.items()
        }
        state = abstract_state(config, mesh)
        after, metrics = jax.eval_shape(functools.partial(step_lib.train_step, recipe), state, placed, small.RATES)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert {"loss", "kl", "entropy", "clip_low", "ratio_std", "tis_capped", "counts_LE"} <= metrics.keys()
