"""Settings as arrays: a row gets the token that `sampling.choose` gives for the same settings, key and position."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deepseek_jax.inference import row_sampling
from deepseek_jax.inference import sampling as fixed
from deepseek_jax.inference.requests import NOWHERE, Request, make_rows
from deepseek_jax.inference.row_sampling import Choice, RowSampling
from deepseek_jax.inference.sampling import MOST_LOGPROBS, NO_TOKEN, Bias, Rows, Sampling, Seen

NUM_ROWS, VOCAB, NUM_BIASES = 24, 70, 3
NEUTRAL = Sampling(temperature=0.0, top_k=0, top_p=1.0)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """So that both a part of the vocabulary and all of it are sorted."""
    monkeypatch.setattr(fixed, "CANDIDATES", 16)


def random_sampling(rng):
    def one(neutral, *others):
        return rng.choice([neutral, rng.choice(others)])

    return Sampling(
        temperature=one(0.0, 0.3, 1.0, 3.0, 1e-35),
        top_k=one(0, 1, 5, 16, 40, 70, 99),
        top_p=one(1.0, 0.05, 0.5, 0.9, 0.999),
        min_p=one(0.0, 0.01, 0.2, 1.0),
        repetition_penalty=one(1.0, 0.7, 2.0),
        frequency_penalty=one(0.0, -0.5, 0.7),
        presence_penalty=one(0.0, 1.5),
    )


def choice_of(samplings, rows, mask_BW=None, masked=(), wants=()):
    num_rows = len(samplings)
    columns = RowSampling(*map(jnp.array, zip(*map(RowSampling.numbers, samplings), strict=True)))
    bias = rows.bias or Bias(jnp.full((num_rows, 1), NOWHERE), jnp.zeros((num_rows, 1)))
    flags = (jnp.array([row in which for row in range(num_rows)]) for which in (masked, wants))
    mask_BW = jnp.zeros((num_rows, -(-VOCAB // 32)), jnp.int32) if mask_BW is None else jnp.array(mask_BW)
    return Choice(columns, jax.random.key_data(rows.keys_B), bias, mask_BW, *flags)


def drawn_case(seed):
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    logits_BV = jnp.array(numbers.normal(0, 2, (NUM_ROWS, VOCAB)), jnp.float32)
    biases = [{rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(rng.choice((0, 3)))} for _ in range(NUM_ROWS)]
    rows = make_rows([Request(logit_bias=bias) for bias in biases], seed, NUM_ROWS)
    seen = Seen(jnp.array(numbers.random((NUM_ROWS, VOCAB)) < 0.2), jnp.array(numbers.poisson(0.3, (NUM_ROWS, VOCAB))))
    positions_B = jnp.array(numbers.integers(0, 1000, NUM_ROWS))
    return [random_sampling(rng) for _ in range(NUM_ROWS)], logits_BV, rows, positions_B, seen


choose = functools.partial(jax.jit(row_sampling.choose, static_argnums=0), row_sampling.ANY)
ACTIVE = jnp.ones(NUM_ROWS, bool)
BRANCHES_AND_SORTS = {"cond", "while", "sort", "top_k"}


def primitives(jaxpr, into_conditions=True):
    """The names of all primitives, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if into_conditions or equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from primitives(inner, into_conditions)


def alone(sampling, row, logits_BV, rows, positions_B, seen):
    """The token that the static form gives a row; it runs without jit, which would compile each of the settings."""
    one = jax.tree.map(lambda x: x[row : row + 1], (logits_BV, rows, positions_B, seen))
    return int(fixed.choose(sampling, *one).ids_B[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_row_gets_the_token_of_its_settings_alone(seed):
    samplings, logits_BV, rows, positions_B, seen = drawn_case(seed)
    got = choose(choice_of(samplings, rows), logits_BV, positions_B, ACTIVE, seen).ids_B
    want = [alone(s, i, logits_BV, rows, positions_B, seen) for i, s in enumerate(samplings)]
    assert got.tolist() == want


def test_rows_of_one_kind_choose_as_a_batch_of_the_static_form():
    """Each condition of the program with nothing but its own part: the others are left out."""
    _, logits_BV, rows, positions_B, seen = drawn_case(7)
    warm = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    both = {"temperature": 3.0, "top_k": 5, "top_p": 0.4}  # of what top-k left
    for changes in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_k": 40}, {"top_p": 0.4}, {"min_p": 0.3}, both):
        sampling = Sampling(**warm | changes)
        plain = Rows(rows.keys_B)
        want = fixed.choose(sampling, logits_BV, plain, positions_B).ids_B
        got = choose(choice_of([sampling] * NUM_ROWS, plain), logits_BV, positions_B, ACTIVE, seen).ids_B
        assert got.tolist() == want.tolist(), changes


@pytest.mark.parametrize("kind", [row_sampling.DRAWN, row_sampling.BY_ID, row_sampling.GREEDY])
def test_without_ranks_nothing_branches_and_the_tokens_are_the_same(kind):
    """For rows without top-k and top-p: bias, penalties, masks and all; or with none of these; or with nothing."""
    samplings, logits_BV, rows, positions_B, seen = drawn_case(6)
    neutral = {"top_k": 0, "top_p": 1.0}
    words_BW = np.random.default_rng(2).integers(-(2**31), 2**31, (NUM_ROWS, 3)).astype(np.int32)
    masked = {1, 4, 5} if kind == row_sampling.BY_ID else ()
    if kind != row_sampling.BY_ID:
        neutral |= {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
        rows = Rows(rows.keys_B)
    if kind == row_sampling.GREEDY:
        neutral |= {"temperature": 0.0}
    samplings = [dataclasses.replace(sampling, **neutral) for sampling in samplings]
    choice = choice_of(samplings, rows, words_BW, masked, wants=range(NUM_ROWS))
    logits_BV = logits_BV.at[7, 5].set(jnp.nan)
    want = choose(choice, logits_BV, positions_B, ACTIVE, seen)
    alone = functools.partial(row_sampling.choose, kind)
    given = choice, logits_BV, positions_B, ACTIVE, seen if row_sampling.reads_seen(kind) else None
    assert not set(primitives(jax.make_jaxpr(alone)(*given).jaxpr)) & BRANCHES_AND_SORTS
    got = jax.jit(alone)(*given)
    assert got.ids_B.tolist() == want.ids_B.tolist() and got.ids_B[7] == NO_TOKEN
    sound = np.arange(NUM_ROWS) != 7
    if kind == row_sampling.GREEDY:
        assert got.logprobs is None
    else:
        np.testing.assert_allclose(got.logprobs.chosen_B[sound], want.logprobs.chosen_B[sound], atol=1e-6)


def test_a_mask_rules_tokens_out_before_the_draw():
    """Of the masked rows only; a mask that lets nothing come gives no token. Log-probabilities stay the model's."""
    _, logits_BV, rows, positions_B, seen = drawn_case(8)
    keep_BV = np.random.default_rng(1).random((NUM_ROWS, VOCAB)) < 0.3
    keep_BV[2] = False
    bits = np.zeros((NUM_ROWS, 96), bool)
    bits[:, :VOCAB] = keep_BV
    words_BW = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    samplings = [NEUTRAL, Sampling(temperature=1.0, top_k=0, top_p=0.8)] * (NUM_ROWS // 2)
    masked, plain = set(range(NUM_ROWS)) - {5, 6}, Rows(rows.keys_B)
    choice = choice_of(samplings, plain, words_BW, masked, wants={0, 3})
    chosen = choose(choice, logits_BV, positions_B, ACTIVE, seen)
    rows_of_mask = np.array([row in masked for row in range(NUM_ROWS)])[:, None]
    ruled_BV = jnp.where(jnp.array(keep_BV | ~rows_of_mask), logits_BV, -1e30)
    want = [alone(s, i, ruled_BV, plain, positions_B, seen) for i, s in enumerate(samplings)]
    want[2] = NO_TOKEN
    assert chosen.ids_B.tolist() == want
    log_BV = jax.nn.log_softmax(logits_BV)
    np.testing.assert_allclose(chosen.logprobs.chosen_B[3], log_BV[3, want[3]], atol=1e-5)
    np.testing.assert_allclose(chosen.logprobs.top_BK[0], jax.lax.top_k(log_BV[0], MOST_LOGPROBS)[0], atol=1e-5)


def test_of_equal_logits_at_the_cut_the_lowest_ids_are_kept():
    _, _, rows, positions_B, seen = drawn_case(5)
    logits_BV = jnp.zeros((NUM_ROWS, VOCAB)).at[:, jnp.array([4, 9, 33, 40, 60])].set(3.0)
    choice = choice_of([Sampling(temperature=1.0, top_k=3, top_p=1.0)] * NUM_ROWS, Rows(rows.keys_B))
    choice = choice._replace(wants_B=jnp.full(NUM_ROWS, 2))
    chosen = choose(choice, logits_BV, positions_B, ACTIVE, seen)
    words_BW, logprobs_B = chosen.logprobs.kept
    assert set(chosen.ids_B.tolist()) == {4, 9, 33}
    assert np.asarray(words_BW).tolist() == [[1 << 4 | 1 << 9, 1 << 1, 0]] * NUM_ROWS
    np.testing.assert_allclose(logprobs_B, -np.log(3.0), rtol=1e-6)


def test_rows_whose_logits_are_not_numbers_get_no_token():
    samplings, logits_BV, rows, positions_B, seen = drawn_case(9)
    logits_BV = logits_BV.at[3, 5].set(jnp.nan).at[4, 6].set(jnp.inf)
    got = choose(choice_of(samplings, rows), logits_BV, positions_B, ACTIVE, seen).ids_B
    assert np.flatnonzero(np.asarray(got) == NO_TOKEN).tolist() == [3, 4]


def test_what_no_row_needs_is_not_computed():
    """Nothing is sorted but inside conditions."""
    samplings, logits_BV, rows, positions_B, seen = drawn_case(0)
    jaxpr = jax.make_jaxpr(functools.partial(row_sampling.choose, row_sampling.ANY))(
        choice_of(samplings, rows), logits_BV, positions_B, ACTIVE, seen
    )
    outside = set(primitives(jaxpr.jaxpr, into_conditions=False))
    assert "cond" in outside and not outside & {"sort", "top_k"}
