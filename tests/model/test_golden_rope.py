"""Rotary positions and YaRN against published constants and against the half-split form of other implementations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from deepseek_jax import config as config_lib
from deepseek_jax.model import rope

MODEL = config_lib.from_config_dict(deepseek_v3.get_config()).model
EXTENDED = dataclasses.replace(MODEL, yarn=dataclasses.replace(MODEL.yarn, enabled=True))


def test_yarn_frequencies_of_the_released_model():
    """Pairs 10 to 23 are the ramp: below it theta_i, above it theta_i / 40.

    Factor 40, beta 32 and 1, 4096 positions, 64 channels.
    """
    expected = {0: 1.0, 10: 0.0562341, 11: 0.0390069, 16: 0.0055, 22: 1.77828e-4, 23: 3.3338e-5, 31: 3.3338e-6}
    theta = rope.frequencies(EXTENDED)
    assert theta.shape == (32,)
    for pair, value in expected.items():
        assert theta[pair] == pytest.approx(value, rel=1e-5), f"pair {pair}"
    np.testing.assert_allclose(rope.frequencies(MODEL), 10000.0 ** (-np.arange(32) / 32), rtol=1e-12)


def test_softmax_scale_of_the_released_model():
    assert rope.softmax_scale(EXTENDED) == pytest.approx(0.1352338, abs=5e-8)
    assert rope.softmax_scale(MODEL) == pytest.approx(192**-0.5, rel=1e-12)


def test_yarn_scales_the_rotation_by_the_ratio_of_both_mscales():
    """Of the released model 1: mscale belongs to its softmax alone. Of an mscale of 0.5 in place of 1: 0.865."""
    for mscale, ratio in ((1.0, 1.0), (0.5, (0.05 * np.log(40) + 1) / (0.1 * np.log(40) + 1))):
        model = dataclasses.replace(EXTENDED, yarn=dataclasses.replace(EXTENDED.yarn, mscale=mscale))
        cos, sin = rope.rotary_table(model, jnp.arange(5)[None])
        np.testing.assert_allclose(cos**2 + sin**2, ratio**2, rtol=1e-6)


def half_split_scores(q_BSNR, k_BSR, angles_SR2):
    """Scores in the other convention: pair i is (i, i + R / 2); even channels are moved in front of the odd ones."""

    def rotate(x, angles):
        front, back = x[..., 0::2], x[..., 1::2]
        return jnp.concatenate(
            [front * jnp.cos(angles) - back * jnp.sin(angles), back * jnp.cos(angles) + front * jnp.sin(angles)], -1
        )

    return jnp.einsum("bsnr,bmr->bnsm", rotate(q_BSNR, angles_SR2[:, None]), rotate(k_BSR, angles_SR2))


def test_interleaved_pairs_equal_permuted_halves():
    q_key, k_key = jax.random.split(jax.random.key(0))
    q_BSNR, k_BSR = jax.random.normal(q_key, (2, 50, 3, 64)), jax.random.normal(k_key, (2, 50, 64))
    positions_BS = jnp.broadcast_to(jnp.arange(50), (2, 50))
    table = rope.rotary_table(EXTENDED, positions_BS)
    ours = jnp.einsum("bsnr,bmr->bnsm", rope.rotate(q_BSNR, table), rope.rotate(k_BSR, table))
    angles_SR2 = positions_BS[0, :, None] * jnp.asarray(rope.frequencies(EXTENDED), jnp.float32)
    np.testing.assert_allclose(ours, half_split_scores(q_BSNR, k_BSR, angles_SR2), atol=2e-5)


def test_rotation_depends_on_the_distance_only():
    q_BSR = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (64,)), (1, 8, 64))
    k_BSR = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (64,)), (1, 8, 64))

    def scores(first):
        table = rope.rotary_table(MODEL, first + jnp.arange(8)[None])
        return jnp.einsum("bsr,bmr->bsm", rope.rotate(q_BSR, table), rope.rotate(k_BSR, table))

    # FP32 angles near 1000 radians are exact to 6e-5 each
    np.testing.assert_allclose(scores(0), scores(1000), atol=3e-4)
    assert np.abs(np.diff(scores(0)[0, 0])).min() > 0.05
