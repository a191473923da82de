"""AdamW with BF16 moments against a hand-written one, the decay mask, and the published schedules where they switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.deepseek_v3 import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.parameters import PARAMETERS
from deepseek_jax.training.optimizer import (
    batch_size,
    decay_mask,
    ema_update,
    make_optimizer,
    rates,
    scale_by_bf16_adam,
)

V3 = from_config_dict(get_config())
TRILLION = 10**12
LATE = 10**6  # a step after the warm-up


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "head_DV": jax.random.normal(keys[0], (8, 16)),
        "moe_layers": {"moe": {"norm_D": jnp.ones((3, 8)), "down_EFD": jax.random.normal(keys[1], (3, 4, 6, 8))}},
    }


def make_gradients(step):
    leaves, tree = jax.tree.flatten(make_params())
    keys = jax.random.split(jax.random.key(step + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def test_direction_equals_adamw_written_out():
    """Four steps in NumPy double precision, with the moments rounded to BF16 between them."""
    optimizer, params = make_optimizer(V3.optimizer), make_params()
    state = optimizer.init(params)
    decay = [0.1 * np.float64(params["head_DV"]), 0.1 * np.float64(params["moe_layers"]["moe"]["down_EFD"]), 0.0]
    mu, nu = [0.0] * 3, [0.0] * 3
    for t in range(1, 5):
        gradients = make_gradients(t)
        direction, state = jax.jit(optimizer.update)(gradients, state, params)
        clip = 1.0 / max(1.0, np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(gradients))))
        for i, (got, g) in enumerate(zip(jax.tree.leaves(direction), jax.tree.leaves(gradients), strict=True)):
            mu[i] = 0.9 * mu[i] + 0.1 * clip * np.float64(g)
            nu[i] = 0.95 * nu[i] + 0.05 * (clip * np.float64(g)) ** 2
            want = mu[i] / (1 - 0.9**t) / (np.sqrt(nu[i] / (1 - 0.95**t)) + 1e-8) + decay[i]
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
            mu[i], nu[i] = (np.float64(moment.astype(jnp.bfloat16)) for moment in (mu[i], nu[i]))


def test_bf16_second_moment_follows_a_falling_gradient():
    """What b2 <= 0.99 buys: after gradients of 1, gradients of 0.1 bring the moment down to 0.01.

    Rounding adds an error of 0.004 / (1 - b2) of it.
    """
    for b2, largest in ((0.95, 0.011), (0.99, 0.017)):
        adam = scale_by_bf16_adam(0.9, b2, 1e-8)
        update, state = jax.jit(adam.update), adam.init(jnp.zeros(()))
        for value in [1.0] * 1000 + [0.1] * 1000:
            _, state = update(jnp.float32(value), state)
        assert 0.009 < float(state.nu) < largest, f"b2 = {b2}: {float(state.nu)}"


def test_refuses_b2_that_bf16_cannot_carry():
    with pytest.raises(ValueError, match=r"b2 = 0.999"):
        make_optimizer(dataclasses.replace(V3.optimizer, b2=0.999))


def test_decay_spares_every_norm_gain_by_name():
    names = sorted(set(PARAMETERS) - {"bias_E"})  # the router bias never reaches the optimizer
    stacked = {name: jnp.zeros((2, 3)) for name in names}  # the shape says nothing: stacked gains are matrices too
    mask = decay_mask({"moe_layers": {"attention": stacked}})["moe_layers"]["attention"]
    assert [name for name in names if not mask[name]] == [name for name in names if "norm_" in name]


@pytest.mark.parametrize(
    ("tokens_seen", "learning_rate"),
    [
        (469 * 10**9, 2.2e-4),
        (10 * TRILLION, 2.2e-4),
        (12_150 * 10**9, 1.21e-4),
        (14_300 * 10**9, 2.2e-5),
        (14_632 * 10**9, 2.2e-5),
        (14_633 * 10**9, 7.3e-6),
        (14_800 * 10**9, 7.3e-6),
        (20 * TRILLION, 7.3e-6),
    ],
)
def test_published_learning_rate(tokens_seen, learning_rate):
    # FP32's own rounding is 6e-8
    assert rates(V3, LATE, tokens_seen).learning_rate == pytest.approx(learning_rate, rel=1e-7)


def test_warmup_is_linear_in_steps_and_scales_nothing_else():
    steps = [0, 1, 999, 1999, 2000]
    got = [rates(V3, step, 0) for step in steps]
    assert [float(r.learning_rate) for r in got] == pytest.approx(
        [2.2e-4 * min(1, (step + 1) / 2000) for step in steps], rel=1e-7
    )
    assert {(float(r.mtp_weight), float(r.bias_update_rate)) for r in got} == {
        (float(np.float32(0.3)), float(np.float32(1e-3)))
    }


def test_the_factor_scales_the_whole_schedule_and_nothing_else():
    config = from_config_dict(get_config())
    doubled = config.with_(optimizer={"learning_rate_factor": 2.0})
    for step, tokens_seen in ((0, 0), (10**6, 0), (10**6, 10**12), (10**6, 14 * 10**12)):
        before, after = rates(config, step, tokens_seen), rates(doubled, step, tokens_seen)
        assert after.learning_rate == pytest.approx(2 * before.learning_rate, rel=1e-6)
        assert after._replace(learning_rate=before.learning_rate) == before


def test_mtp_weight_and_bias_rate_switch_at_their_tokens():
    last = 10 * TRILLION - 62_914_560, 14_300 * 10**9 - 62_914_560  # one step of 15360 sequences earlier
    assert rates(V3, LATE, last[0]).mtp_weight == np.float32(0.3)
    assert rates(V3, LATE, 10 * TRILLION).mtp_weight == np.float32(0.1)
    assert rates(V3, LATE, last[1]).bias_update_rate == np.float32(1e-3)
    assert rates(V3, LATE, 14_300 * 10**9).bias_update_rate == 0.0
    assert rates(V3, LATE, 14_800 * 10**9).bias_update_rate == 0.0


def test_rates_are_fp32_scalars_so_that_no_step_retraces():
    traces = []

    @jax.jit
    def step(rates):
        traces.append(rates)
        return sum(rates)

    for tokens_seen in (0, 5 * TRILLION, 14_400 * 10**9):
        step(rates(V3, LATE, tokens_seen))
    assert len(traces) == 1 and {rate.dtype for rate in rates(V3, 0, 0)} == {np.dtype(np.float32)}


def test_batch_size_ramp():
    assert batch_size(V3, 0) == 3072
    assert batch_size(V3, 469 * 10**9) == 15360
    assert batch_size(V3, 14_800 * 10**9) == 15360
    sizes = [batch_size(V3, tokens) for tokens in range(0, 600 * 10**9, 10**9)]
    assert sizes == sorted(sizes) and set(sizes) == {3072, 6144, 9216, 12288, 15360}


def test_ema_follows_the_weights():
    average = {"w": jnp.array([1.0, 0.0])}
    np.testing.assert_allclose(ema_update(average, {"w": jnp.array([0.0, 1.0])}, 0.9)["w"], [0.9, 0.1], rtol=1e-6)
    constant = {"w": jnp.array([0.3, -7.1])}
    np.testing.assert_array_equal(ema_update(constant, constant, 0.999)["w"], constant["w"])
