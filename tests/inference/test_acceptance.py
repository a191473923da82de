"""Drafts that are accepted or replaced leave the distribution as it is: a vocabulary of six tokens, enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import acceptance
from deepseek_jax.inference.acceptance import Drafts
from deepseek_jax.inference.requests import NOWHERE, row_keys
from deepseek_jax.inference.row_sampling import Choice, RowSampling, choose
from deepseek_jax.inference.sampling import NO_TOKEN, Bias, Sampling, Seen

VOCAB, NUM_TOKENS, NUM_DRAFTS = 6, 3, 2
NUM_ROWS = 40_000  # of one shape, so that one program is compiled
RNG = np.random.default_rng(0)
# Logits by the last two tokens: the model's, and those of a drafter that is often wrong.
MODEL_CCV = jnp.array(RNG.normal(0, 1.5, (VOCAB, VOCAB, VOCAB)), jnp.float32)
DRAFTER_CCV = 0.5 * MODEL_CCV + jnp.array(RNG.normal(0, 1, (VOCAB, VOCAB, VOCAB)), jnp.float32)

WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0)
SETTINGS = {
    "temperature 1": WARM,
    "top-p": Sampling(temperature=1.0, top_k=0, top_p=0.7),
    "penalties": Sampling(temperature=1.3, top_k=4, top_p=0.95, presence_penalty=1.0, repetition_penalty=1.5),
}


def choice_of(sampling, num_rows, seed=0):
    numbers = RowSampling.numbers(sampling)
    columns = RowSampling(*(jnp.full(num_rows, number) for number in numbers))
    keys_B = row_keys([seed] * num_rows, range(num_rows))
    bias = Bias(jnp.full((num_rows, 1), NOWHERE), jnp.zeros((num_rows, 1)))
    nobody_B = jnp.zeros(num_rows, bool)
    return Choice(columns, jax.random.key_data(keys_B), bias, jnp.zeros((num_rows, 1), jnp.int32), nobody_B, nobody_B)


def nothing_seen(num_rows):
    return Seen(jnp.zeros((num_rows, VOCAB), bool), jnp.zeros((num_rows, VOCAB), jnp.int32))


def paths(length):
    return np.stack(np.meshgrid(*[np.arange(VOCAB)] * length, indexing="ij"), -1).reshape(-1, length)


def probabilities(sampling, table_CCV, length):
    """FP64 probabilities [paths, V] of the token behind each path of so many tokens, and their logarithms in FP32."""
    paths_XS = paths(length) if length else np.zeros((1, 0), int)
    seen = nothing_seen(len(paths_XS))
    for token_X in paths_XS.T:
        seen = seen.add(jnp.array(token_X))
    last_X2 = np.pad(paths_XS, ((0, 0), (2, 0)))[:, -2:]
    rows_X = jnp.ones(len(paths_XS), bool)
    logits_XV = table_CCV[last_X2[:, 0], last_X2[:, 1]]
    log_XV = acceptance.distribution(choice_of(sampling, len(paths_XS)), logits_XV, rows_X, seen).log_BV
    exact_XV = np.exp(np.asarray(log_XV, np.float64))
    return exact_XV / exact_XV.sum(-1, keepdims=True), log_XV


@functools.cache
def wanted(name):
    """The probability of each continuation without drafts."""
    product_X = np.ones(1)
    for length in range(NUM_TOKENS):
        product_X = (product_X[:, None] * probabilities(SETTINGS[name], MODEL_CCV, length)[0]).reshape(-1)
    return product_X


@pytest.mark.parametrize("name", SETTINGS)
def test_every_continuation_has_its_probability(name):
    """Of one draft after another in FP64: what accepting and replacing it leads to, summed over all drafts."""
    sampling = SETTINGS[name]
    product_X = np.ones(1)
    for length in range(NUM_TOKENS):
        p_XV, log_p_XV = probabilities(sampling, MODEL_CCV, length)
        q_XV, log_q_XV = probabilities(sampling, DRAFTER_CCV, length)
        share_XV = np.minimum(1, np.divide(p_XV, q_XV, out=np.zeros_like(p_XV), where=q_XV > 0))
        choice, model = choice_of(sampling, len(p_XV)), acceptance.Distribution(jnp.zeros(len(p_XV)), log_p_XV)
        for draft in range(VOCAB):  # the rule of the code has its threshold there
            ids_X = jnp.full(len(p_XV), draft)
            below, above = (jnp.array(share_XV[:, draft] * factor) for factor in (1 - 1e-4, 1 + 1e-4))
            drawn_X = q_XV[:, draft] > 0
            accepts = functools.partial(acceptance.accepts, choice, model, log_q_XV, ids_X)
            some_X = drawn_X & (share_XV[:, draft] > 0)
            assert np.asarray(accepts(below))[some_X].all()
            assert not np.asarray(accepts(above))[drawn_X & (share_XV[:, draft] < 0.999)].any()
        left_XV = np.exp(np.asarray(acceptance.residual(log_p_XV, log_q_XV), np.float64))
        left_XV /= left_XV.sum(-1, keepdims=True)
        accepted_XV = q_XV * share_XV
        output_XV = accepted_XV + (1 - accepted_XV.sum(-1, keepdims=True)) * left_XV
        assert 0.1 < accepted_XV.sum(-1).mean() < 0.9
        product_X = (product_X[:, None] * output_XV).reshape(-1)
    np.testing.assert_allclose(product_X, wanted(name), atol=1e-6)


@jax.jit
def one_step(choice, last_B2, length_B, num_B, seen):
    """Draft, and verify; return the tokens, how many, and what they have seen."""
    ids, logs, context_B2, drafted = [], [], last_B2, seen
    everyone_B = jnp.ones(len(length_B), bool)
    for k in range(NUM_DRAFTS):
        logits_BV = DRAFTER_CCV[context_B2[:, 0], context_B2[:, 1]]
        drafter = acceptance.distribution(choice, logits_BV, everyone_B, drafted)
        ids.append(acceptance.draw_drafts(choice, drafter, length_B + 1 + k))
        logs.append(drafter.log_BV)
        context_B2, drafted = jnp.stack([context_B2[:, 1], ids[-1]], 1), drafted.add(ids[-1])
    drafts = Drafts(jnp.stack(ids, 1), jnp.stack(logs, 1), num_B)
    all_BS = jnp.concatenate([last_B2, drafts.ids_BK], axis=1)
    logits_BSV = jnp.stack([MODEL_CCV[all_BS[:, s], all_BS[:, s + 1]] for s in range(NUM_DRAFTS + 1)], 1)
    return acceptance.verify(choice, logits_BSV, drafts, length_B, everyone_B, seen)


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_of_many_keys_have_the_distribution(name):
    """Chi-square of the 216 continuations of 40,000 rows that draft none, one or two tokens a step."""
    num_rows = NUM_ROWS
    choice, seen = choice_of(SETTINGS[name], num_rows), nothing_seen(num_rows)
    texts, length_B = [[] for _ in range(num_rows)], np.full(num_rows, 7)
    last_B2, accepted = np.zeros((num_rows, 2), int), np.zeros(NUM_DRAFTS + 1)
    limit_B = np.random.default_rng(1).choice([0, 1, 2, 2], num_rows)
    for _ in range(NUM_TOKENS):
        verified = jax.tree.map(np.asarray, one_step(choice, last_B2, length_B, limit_B, seen))
        accepted += np.bincount(verified.accepted_B[limit_B == 2], minlength=NUM_DRAFTS + 1)
        for row, count in enumerate(verified.accepted_B + 1):
            texts[row].extend(verified.tokens_BS[row, :count])
        length_B += verified.accepted_B + 1
        last_B2 = np.array([[0, 0, *text][-2:] for text in texts])
        seen = verified.seen
    index_B = [text[0] * VOCAB**2 + text[1] * VOCAB + text[2] for text in texts]
    expected_X = wanted(name) * num_rows
    found_X = np.bincount(index_B, minlength=VOCAB**NUM_TOKENS)
    possible_X = expected_X > 0
    assert not found_X[~possible_X].any() and accepted.min() > 1000
    large_X = expected_X > 5
    chi_square = ((found_X - expected_X)[large_X] ** 2 / expected_X[large_X]).sum()
    freedom = large_X.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), (chi_square, freedom)


def test_rows_without_drafts_get_the_tokens_of_the_plain_program():
    """As do greedy rows with drafts; rows beside them accept what they accept alone."""
    num_rows = NUM_ROWS
    seen, length_B = nothing_seen(num_rows), np.arange(num_rows) + 3
    warm, greedy = choice_of(WARM, num_rows), choice_of(Sampling(temperature=0.0, top_k=0, top_p=1.0), num_rows)
    mixed = warm._replace(sampling=warm.sampling._replace(temperature=jnp.arange(num_rows) % 2 * 1.0))
    last_B2 = np.random.default_rng(3).integers(0, VOCAB, (num_rows, 2))
    everyone_B = jnp.ones(num_rows, bool)
    plain_B = jax.jit(choose)(mixed, MODEL_CCV[last_B2[:, 0], last_B2[:, 1]], length_B + 1, everyone_B, seen).ids_B
    none = one_step(mixed, last_B2, length_B, np.zeros(num_rows, int), seen)
    assert none.tokens_BS[:, 0].tolist() == plain_B.tolist() and not none.accepted_B.any()
    two = [one_step(choice, last_B2, length_B, np.full(num_rows, 2), seen) for choice in (warm, greedy, mixed)]
    for row, which in ((1, 0), (0, 1)):  # odd rows are warm
        for alone, beside in zip(two[which][:2], two[2][:2], strict=True):
            assert (alone[row::2] == beside[row::2]).all()
    assert two[1].tokens_BS[::2, 0].tolist() == plain_B[::2].tolist()
    assert 0 < two[0].accepted_B.mean() < 2 and 0 < two[1].accepted_B.mean() < 2


def test_logits_that_are_not_numbers_end_a_row():
    """At the second position of rows that accepted the first draft."""
    logits_BSV = jnp.zeros((2, 3, VOCAB)).at[:, :, 4].set(9.0).at[0, 1, 2].set(jnp.nan)
    drafts = Drafts(jnp.full((2, 2), 4), None, jnp.full(2, 2))
    run_B = jnp.ones(2, bool)
    verified = acceptance.verify(None, logits_BSV, drafts, jnp.zeros(2, jnp.int32), run_B, None)
    assert verified.accepted_B.tolist() == [1, 2]
    assert verified.tokens_BS[0, :2].tolist() == [4, NO_TOKEN] and verified.tokens_BS[1].tolist() == [4, 4, 4]
    forced = acceptance.verify(None, logits_BSV, drafts._replace(ids_BK=drafts.ids_BK - 1), run_B + 0, run_B, None, 1.0)
    assert forced.tokens_BS[1].tolist() == [3, 3, 4]
