"""Greedy, temperature, top-k and top-p: what each keeps, and that draws follow the probabilities."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import sampling as sampling_module
from deepseek_jax.inference.sampling import (
    NO_TOKEN,
    Bias,
    Chosen,
    Rows,
    Sampling,
    Seen,
    choose,
    keep_min_p,
    log_probabilities,
    penalized,
    sample,
)

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS_BV = jnp.log(jnp.array([PROBABILITIES, PROBABILITIES[::-1]], jnp.float32)) + 3.0
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = Sampling(**NEUTRAL | {"temperature": 0.0})


def kept(logits_BV):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits_BV)]


def draw(sampling, num_draws, logits_V=LOGITS_BV[0]):
    keys = jax.random.split(jax.random.key(0), num_draws)
    logits = jnp.broadcast_to(logits_V, (num_draws, len(logits_V)))
    return np.bincount(sample(sampling, logits, keys), minlength=len(logits_V)) / num_draws


def drawn(logits_V=LOGITS_BV[0], **restrictions):
    """The ids that 2,000 draws give: at a high temperature, all that are kept."""
    return np.flatnonzero(draw(Sampling(**NEUTRAL | restrictions), 2000, logits_V)).tolist()


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
    assert drawn(top_k=top_k) == ids
    assert drawn(LOGITS_BV[1], top_k=top_k) == sorted(3 - i for i in ids)


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert drawn(jnp.zeros(6), top_k=2) == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "ids"), [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, ids):
    assert drawn(top_p=top_p) == ids
    assert drawn(LOGITS_BV[1], top_p=top_p) == sorted(3 - i for i in ids)
    assert drawn(jnp.array([0.0, 0.0, -jnp.inf]), top_p=0.5) == [0]  # half is reached by one of two


@pytest.mark.parametrize(("top_p", "ids"), [(0.79, [1, 3]), (0.81, [0, 1, 3])])
def test_top_p_takes_all_tokens_where_the_first_candidates_are_not_enough(top_p, ids, monkeypatch):
    monkeypatch.setattr(sampling_module, "CANDIDATES", 2)  # together they reach 0.8
    assert drawn(top_p=top_p) == ids


def test_top_p_counts_what_top_k_left():
    """After top-k of 2, the best token has 0.5 / 0.8 = 0.625 of what remains: top-p of 0.6 keeps it alone."""
    assert drawn(top_k=2, top_p=0.6) == [1] and drawn(top_k=2, top_p=0.63) == [1, 3]


def test_top_p_counts_what_min_p_left():
    """Without the token of 0.05, the best two have 0.8 / 0.95 = 0.84."""
    assert drawn(min_p=0.2, top_p=0.83) == [1, 3] and drawn(min_p=0.2, top_p=0.85) == [0, 1, 3]


def test_a_row_draws_the_same_whether_its_neighbour_needs_all_tokens(monkeypatch):
    """Flat logits of 500 tokens need more than eight candidates, steep ones do not."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", 8)
    rng, run = np.random.default_rng(0), jax.jit(lambda *operands: sample(*operands), static_argnums=0)
    steep_BV = jnp.asarray(3 * rng.normal(size=(40, 500)) + 20 * (np.arange(500) < 5), jnp.float32)
    keys_B = jax.random.split(jax.random.key(1), 41)
    sampling = Sampling(**NEUTRAL | {"top_p": 0.9})
    alone = run(sampling, steep_BV, keys_B[:40])
    together = run(sampling, jnp.concatenate([steep_BV, jnp.zeros((1, 500))]), keys_B)
    assert alone.tolist() == together[:40].tolist() and len(set(alone.tolist())) > 1
    assert {int(token) for token in alone} <= set(range(5))
    mixed_BV = jnp.concatenate([steep_BV, jnp.zeros((200, 500))])
    flat = run(sampling, mixed_BV, jax.random.split(jax.random.key(2), 240))[40:]
    assert len(set(flat.tolist())) > 100


def test_candidates_keep_the_share_that_they_have_of_all_tokens(monkeypatch):
    """Eight of 0.115 each: the first seven reach 0.805, of what the eight have 0.875."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", 8)
    logits_V = jnp.log(jnp.where(jnp.arange(500) < 8, 0.115, 0.08 / 492))
    assert drawn(logits_V, top_p=0.82) == list(range(8)) and drawn(logits_V, top_p=0.8) == list(range(7))


@pytest.mark.parametrize(
    ("restrictions", "sorts"),
    [({"temperature": 0.0}, 0), ({}, 0), ({"min_p": 0.1}, 0), ({"top_k": 7, "top_p": 0.9}, 1), ({"top_p": 0.9}, 2)],
)
def test_the_vocabulary_is_sorted_only_where_it_must_be(restrictions, sorts):
    """`top_k` is the one primitive that orders tokens, of bounded size but in the branch that is hardly ever taken."""
    sampling = Sampling(**NEUTRAL | restrictions)
    program = jax.make_jaxpr(sample, static_argnums=0)(
        sampling, jnp.zeros((2, 5000)), jax.random.split(jax.random.key(0), 2)
    )
    text = str(program)
    assert " sort[" not in text
    sizes = sorted(int(size) for size in re.findall(r"top_k\[[^\]]*?k=(\d+)", text))
    assert sizes == {0: [], 1: [7], 2: [1024, 5000]}[sorts]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_probabilities(temperature):
    want = PROBABILITIES ** (1 / temperature)
    want /= want.sum()
    # The standard deviation of a frequency over 40,000 draws is at most 0.0025.
    np.testing.assert_allclose(draw(Sampling(temperature=temperature, top_k=0, top_p=1.0), 40_000), want, atol=0.0125)


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
        ({"num_logprobs": 21}, "num_logprobs = 21 must be from 0 to 20"),
        ({"num_logprobs": -1}, "num_logprobs = -1"),
    ],
)
def test_refuses_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**NEUTRAL | values)


def test_a_bias_is_added_where_it_says():
    """Before the penalties; of other rows and of ids beyond the vocabulary nothing is added."""
    logits_BV = jnp.array([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    bias = Bias(jnp.array([[0, 9], [1, 2], [9, 9]]), jnp.array([[2.5, 50.0], [-100.0, -0.5], [7.0, 7.0]]))
    keys_B = jax.random.split(jax.random.key(0), 3)
    assert sample(GREEDY, logits_BV, keys_B, bias).tolist() == [0, 2, 1]
    seen = Seen.of_prompts(jnp.array([[0], [0], [0]]), jnp.array([1, 1, 1]), 3)
    repeated = Sampling(**NEUTRAL | {"temperature": 0.0, "repetition_penalty": 2.0})
    assert sample(repeated, logits_BV, keys_B, bias, seen).tolist() == [1, 2, 1]  # 2.5 / 2 < 2


def test_log_probabilities_are_the_models_own():
    """Before temperature, bias, penalties and restrictions; against NumPy in FP64."""
    rng = np.random.default_rng(0)
    logits_BV = (5 * rng.normal(size=(3, 50))).astype(np.float32)
    want_BV = logits_BV - np.log(np.exp(np.float64(logits_BV)).sum(-1, keepdims=True))
    sampling = Sampling(temperature=0.3, top_k=4, top_p=0.9, num_logprobs=5)
    rows = Rows(jax.random.split(jax.random.key(0), 3), Bias(jnp.full((3, 1), 7), jnp.full((3, 1), 30.0)))
    ids_B, logprobs = choose(sampling, jnp.asarray(logits_BV), rows, jnp.arange(3))
    assert ids_B.tolist() == [7, 7, 7] and logprobs.chosen_B.dtype == jnp.float32
    np.testing.assert_allclose(logprobs.chosen_B, want_BV[:, 7], rtol=1e-5)
    order_BK = np.argsort(-want_BV, axis=-1)[:, :5]
    np.testing.assert_array_equal(logprobs.top_ids_BK, order_BK)
    np.testing.assert_allclose(logprobs.top_BK, np.take_along_axis(want_BV, order_BK, -1), rtol=1e-5)
    few = log_probabilities(jnp.asarray(logits_BV[:, :2]), jnp.array([0, 1, -1]), 5)
    assert few.top_BK.shape == (3, 5) and np.isneginf(few.top_BK[:, 2:]).all()


@pytest.mark.parametrize("count", [None, 0, 3])
def test_empty_arrays_have_the_form_of_a_choice(count):
    sampling = Sampling(**NEUTRAL | {"num_logprobs": count})
    rows = Rows(jax.random.split(jax.random.key(0), 2))
    chosen = choose(sampling, LOGITS_BV, rows, jnp.zeros(2, jnp.int32))
    filled = Chosen.filled(sampling, (2,), 5)
    assert jax.tree.map(jnp.shape, chosen) == jax.tree.map(jnp.shape, filled)
    assert jax.tree.map(lambda leaf: leaf.dtype, chosen) == jax.tree.map(lambda leaf: leaf.dtype, filled)


def test_a_draw_depends_on_the_rows_key_and_its_position():
    logits_BV, keys_B = jnp.zeros((2, 1000)), jax.random.split(jax.random.key(0), 2)
    at = [choose(Sampling(**NEUTRAL), logits_BV, Rows(keys_B), jnp.array(p)).ids_B.tolist() for p in ([3, 4], [4, 3])]
    other = choose(Sampling(**NEUTRAL), logits_BV, Rows(keys_B[::-1]), jnp.array([4, 3])).ids_B.tolist()
    assert other == at[0][::-1] and not set(at[0]) & set(at[1])
