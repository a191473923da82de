"""Greedy, temperature, top-k and top-p: what each keeps, and that draws follow the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference.sampling import (
    NO_TOKEN,
    Sampling,
    Seen,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalized,
    sample,
)

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS_BV = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]], jnp.float32)) + 3.0
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = Sampling(**NEUTRAL | {"temperature": 0.0})


def kept(logits_BV):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits_BV)]


def draw(sampling, num_draws):
    keys = jax.random.split(jax.random.key(0), num_draws)
    logits = jnp.broadcast_to(LOGITS_BV[0], (num_draws, 4))
    return np.bincount(jax.jit(sample, static_argnums=0)(sampling, logits, keys), minlength=4) / num_draws


def test_greedy_takes_the_best_and_of_equals_the_lowest_id():
    logits_BV = jnp.array([[0.0, 2.0, 2.0], [-1.0, -2.0, -3.0]])
    assert sample(GREEDY, logits_BV, jax.random.split(jax.random.key(0), 2)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-31, 1e-29, 1e-20])
def test_the_coldest_temperatures_are_greedy(temperature):
    """1e-45 is 0 in FP32, and 20 / 1e-38 is beyond it."""
    logits_BV = jnp.array([[0.0, 20.0, 19.9], [-1.0, -0.9, -3000.0]])
    cold = Sampling(temperature=temperature, top_k=0, top_p=1.0)
    assert sample(cold, logits_BV, jax.random.split(jax.random.key(0), 2)).tolist() == [1, 1]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=2, top_p=0.9)])
def test_no_token_is_chosen_where_logits_are_not_numbers(sampling):
    logits_BV = jnp.array([[0.0, jnp.nan, 2.0], [0.0, 50.0, -jnp.inf], [jnp.inf, 0.0, 1.0]])
    assert sample(sampling, logits_BV, jax.random.split(jax.random.key(0), 3)).tolist() == [NO_TOKEN, 1, NO_TOKEN]


@pytest.mark.parametrize(
    ("top_k", "ids"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_best(top_k, ids):
    assert kept(keep_top_k(LOGITS_BV, top_k)) == [ids, sorted(3 - i for i in ids)]


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert kept(keep_top_k(jnp.zeros((1, 6)), 2)) == [[0, 1]]


@pytest.mark.parametrize(
    ("top_p", "ids"), [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, ids):
    assert kept(keep_top_p(LOGITS_BV, top_p)) == [ids, sorted(3 - i for i in ids)]


def test_top_p_counts_what_top_k_left():
    """After top-k of 2, the best token has 0.5 / 0.8 = 0.625 of what remains: top-p of 0.6 keeps it alone."""
    assert kept(keep_top_p(keep_top_k(LOGITS_BV, 2), 0.6))[0] == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_probabilities(temperature):
    want = PROBABILITIES ** (1 / temperature)
    want /= want.sum()
    # The standard deviation of a frequency over 40,000 draws is at most 0.0025.
    np.testing.assert_allclose(draw(Sampling(temperature=temperature, top_k=0, top_p=1.0), 40_000), want, atol=0.0125)


def test_draws_stay_among_the_kept():
    frequencies = draw(Sampling(temperature=1.0, top_k=2, top_p=1.0), 40_000)
    assert frequencies[0] == frequencies[2] == 0.0
    np.testing.assert_allclose(frequencies[[1, 3]], [0.625, 0.375], atol=0.0125)


def test_rows_draw_with_their_own_keys():
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    logits_BV, keys_B = jnp.zeros((8, 1000)), jax.random.split(jax.random.key(0), 8)
    together = sample(sampling, logits_BV, keys_B).tolist()
    assert together == [int(sample(sampling, logits_BV[:1], keys_B[i : i + 1])[0]) for i in range(8)]
    assert len(set(together)) > 4


@pytest.mark.parametrize(
    ("min_p", "ids"), [(0.0, [0, 1, 2, 3]), (0.09, [0, 1, 2, 3]), (0.11, [0, 1, 3]), (0.31, [1, 3]), (1.0, [1])]
)
def test_min_p_keeps_shares_of_the_largest(min_p, ids):
    """Of the largest, 0.5, the four have 0.3, 1, 0.1 and 0.6."""
    assert kept(keep_min_p(LOGITS_BV, min_p)) == [ids, sorted(3 - i for i in ids)]


def test_penalties_are_those_of_a_loop():
    """Against a loop over tokens: prompt [0, 2, 2] of the first row, [1] of the second; outputs [2, 3, 3] and [0]."""
    logits_BV = np.array([[2.0, -1.0, 1.0, 0.5], [-3.0, 4.0, 0.0, -0.5]], np.float32)
    prompts, outputs = [[0, 2, 2], [1]], [[2, 3, 3], [0]]
    seen = Seen.of_prompts(jnp.array([[0, 2, 2, 1], [1, 3, 3, 3]]), jnp.array([3, 1]), 4)
    for i in range(3):
        seen = seen.add(jnp.array([outputs[0][i], outputs[1][i] if i < 1 else 9]))  # 9: beyond, so nothing
    sampling = Sampling(**NEUTRAL | {"repetition_penalty": 1.5, "frequency_penalty": 0.25, "presence_penalty": -0.5})
    want_BV = logits_BV.copy()
    for row, prompt, output in zip(want_BV, prompts, outputs, strict=True):
        for token in range(4):
            if token in prompt + output:
                row[token] = row[token] / 1.5 if row[token] > 0 else row[token] * 1.5
            row[token] -= 0.25 * output.count(token) - 0.5 * (token in output)
    np.testing.assert_allclose(penalized(sampling, logits_BV, seen), want_BV, rtol=1e-6)


def test_neutral_penalties_are_none():
    assert not Sampling(**NEUTRAL).penalizes
    for changed in ({"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": -0.1}):
        assert Sampling(**NEUTRAL | changed).penalizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": 1.1}, "min_p = 1.1"),
        ({"min_p": float("nan")}, "min_p = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"frequency_penalty": 2e4}, "frequency_penalty = 20000.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty = nan"),
    ],
)
def test_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**NEUTRAL | values)
