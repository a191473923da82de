"""Advantages of groups, and the punishment of long outputs."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.posttraining.advantages import advantages, is_flat, punishment
from deepseek_jax.posttraining.choices import DAPO, GRPO


def test_an_advantage_is_the_distance_from_the_groups_mean_in_standard_deviations():
    """Rewards 0, 0, 0, 1: mean 1/4, unbiased variance 1/4."""
    got = advantages(np.array([[0, 0, 0, 1], [3, 1, 1, 3]]), "std")
    half = 3**0.5 / 2
    np.testing.assert_allclose(got, [[-0.5, -0.5, -0.5, 1.5], [half, -half, -half, half]], rtol=1e-5)
    np.testing.assert_allclose(advantages(np.array([[0, 0, 0, 1]]), "none"), [[-0.25, -0.25, -0.25, 0.75]])


def test_a_flat_group_has_advantages_of_exactly_zero():
    rewards = np.full((2, 3), 0.1)  # its mean is not 0.1
    assert (rewards.mean(1) != 0.1).any()
    assert not advantages(rewards, "std").any() and not advantages(rewards, "none").any()
    assert is_flat(np.array([[1, 1], [1, 2]])).tolist() == [True, False]


@pytest.mark.parametrize("dead", [np.nan, np.inf])
def test_a_dead_reward_is_refused(dead):
    with pytest.raises(ValueError, match=f"output 2 of prompt 1 is {dead}"):
        advantages(np.array([[0, 1, 0], [1, 1, dead]]), "std")


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="groups of at least 2"):
        advantages(np.array([[1.0], [0.0]]), "std")


def test_long_outputs_are_punished_before_the_limit():
    choices = dataclasses.replace(DAPO, overlong_buffer=4)
    assert punishment(choices, np.array([1, 6, 7, 9, 10]), 10).tolist() == [0, 0, -0.25, -0.75, -1]
    assert not punishment(GRPO, np.array([10]), 10).any()
    with pytest.raises(ValueError, match="overlong_buffer = 4 is more than the 3 tokens"):
        punishment(choices, np.array([1]), 3)
