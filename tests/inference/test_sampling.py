"""Greedy, temperature, top-k and top-p: what each keeps, and that draws follow the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference.sampling import NO_TOKEN, Sampling, keep_top_k, keep_top_p, sample

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS_BV = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]], jnp.float32)) + 3.0
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


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
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | values))
