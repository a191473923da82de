"""Drafts change no text, drawn or not, and texts have their distribution: a vocabulary of six tokens, enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import acceptance
from deepseek_jax.inference.acceptance import Drafts, Progress, Verified
from deepseek_jax.inference.requests import NOWHERE, row_keys
from deepseek_jax.inference.row_sampling import ANY, DRAWN, GREEDY, Choice, RowSampling, choose, choose_ids, noise_at
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


def probabilities(sampling, table_CCV, path):
    """Return FP64 probabilities [V] of the token behind a path, by the definition of each setting."""
    first, second = [0, 0, *path][-2:]
    logits_V, seen = np.asarray(table_CCV[first, second], np.float64), np.isin(np.arange(VOCAB), path)
    factor = sampling.repetition_penalty
    logits_V = np.where(seen, np.where(logits_V > 0, logits_V / factor, logits_V * factor), logits_V)
    logits_V = (logits_V - sampling.presence_penalty * seen) / sampling.temperature
    order = np.argsort(-logits_V)[: sampling.top_k or VOCAB]
    p = np.exp(logits_V[order]) / np.exp(logits_V[order]).sum()
    p = np.where(np.cumsum(p) - p < sampling.top_p, p, 0)
    whole_V = np.zeros(VOCAB)
    whole_V[order] = p / p.sum()
    return whole_V


def wanted(name):
    """The probability of each continuation without drafts."""
    found = {(): 1.0}
    for _ in range(NUM_TOKENS):
        found = {
            (*path, token): share * p
            for path, share in found.items()
            for token, p in enumerate(probabilities(SETTINGS[name], MODEL_CCV, path))
        }
    return np.array(list(found.values()))


@functools.partial(jax.jit, static_argnums=0)
def one_step(kind, choice, last_B2, length_B, num_B, seen):
    """Draft, and verify; return the tokens, how many, and what they have seen."""
    ids, context_B2, drafted = [], last_B2, seen
    everyone_B = jnp.ones(len(length_B), bool)
    noise_BSV = noise_at(choice, length_B[:, None] + 1 + jnp.arange(NUM_DRAFTS + 1), VOCAB)
    for k in range(NUM_DRAFTS):
        logits_BV = DRAFTER_CCV[context_B2[:, 0], context_B2[:, 1]]
        ids.append(choose_ids(kind, choice, logits_BV, noise_BSV[:, k], everyone_B, drafted))
        context_B2, drafted = jnp.stack([context_B2[:, 1], ids[-1]], 1), drafted.add(ids[-1])
    drafts = Drafts(jnp.stack(ids, 1), num_B)
    all_BS = jnp.concatenate([last_B2, drafts.ids_BK], axis=1)
    logits_BSV = jnp.stack([MODEL_CCV[all_BS[:, s], all_BS[:, s + 1]] for s in range(NUM_DRAFTS + 1)], 1)
    return acceptance.verify(kind, choice, logits_BSV, noise_BSV, drafts, length_B, everyone_B, seen)


def texts_of_rows(choice, limit_B, kind=ANY):
    """The first `NUM_TOKENS` tokens of each row, and how often so many drafts stood in rows that had two."""
    num_rows = len(limit_B)
    seen, texts, length_B = nothing_seen(num_rows), [[] for _ in range(num_rows)], np.full(num_rows, 7)
    last_B2, accepted = np.zeros((num_rows, 2), int), np.zeros((NUM_TOKENS, NUM_DRAFTS + 1))
    for step in range(NUM_TOKENS):
        verified = jax.tree.map(np.asarray, one_step(kind, choice, last_B2, length_B, limit_B, seen))
        accepted[step] = np.bincount(verified.accepted_B[limit_B == 2], minlength=NUM_DRAFTS + 1)
        for row, count in enumerate(verified.accepted_B + 1):
            texts[row].extend(verified.tokens_BS[row, :count])
        length_B += verified.accepted_B + 1
        last_B2 = np.array([[0, 0, *text][-2:] for text in texts])
        seen = verified.seen
    return np.array([text[:NUM_TOKENS] for text in texts]), accepted


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_of_many_keys_are_those_without_drafts_and_have_the_distribution(name):
    """40,000 rows that draft none, one or two tokens a step; chi-square of the 216 continuations."""
    choice, limit_B = choice_of(SETTINGS[name], NUM_ROWS), np.random.default_rng(1).choice([0, 1, 2, 2], NUM_ROWS)
    texts_BX, accepted = texts_of_rows(choice, limit_B)
    plain_BX, _ = texts_of_rows(choice, np.zeros(NUM_ROWS, int))
    assert (texts_BX == plain_BX).all() and accepted.sum(0).min() > 1000
    if SETTINGS[name] is WARM:  # by the program of such rows, which has no condition
        drawn_BX, stood = texts_of_rows(choice, limit_B, DRAWN)
        assert (drawn_BX == texts_BX).all() and (stood == accepted).all()
    expected_X = wanted(name) * NUM_ROWS
    found_X = np.bincount(texts_BX @ VOCAB ** np.arange(NUM_TOKENS)[::-1], minlength=VOCAB**NUM_TOKENS)
    possible_X = expected_X > 0
    assert not found_X[~possible_X].any()
    large_X = expected_X > 5
    chi_square = ((found_X - expected_X)[large_X] ** 2 / expected_X[large_X]).sum()
    freedom = large_X.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), (chi_square, freedom)
    p, q = (probabilities(SETTINGS[name], table_CCV, ()) for table_CCV in (MODEL_CCV, DRAFTER_CCV))
    distance, share = abs(p - q).sum() / 2, 1 - accepted[0, 0] / accepted[0].sum()  # of the first draft
    assert (1 - distance) / (1 + distance) - 0.01 < share < 1 - distance + 0.01


def test_rows_without_drafts_get_the_tokens_of_the_plain_program():
    """As do greedy rows with drafts; rows beside them accept what they accept alone."""
    num_rows = NUM_ROWS
    seen, length_B = nothing_seen(num_rows), np.arange(num_rows) + 3
    warm, greedy = choice_of(WARM, num_rows), choice_of(Sampling(temperature=0.0, top_k=0, top_p=1.0), num_rows)
    mixed = warm._replace(sampling=warm.sampling._replace(temperature=jnp.arange(num_rows) % 2 * 1.0))
    last_B2 = np.random.default_rng(3).integers(0, VOCAB, (num_rows, 2))
    everyone_B = jnp.ones(num_rows, bool)
    plain_B = jax.jit(choose, static_argnums=0)(
        ANY, mixed, MODEL_CCV[last_B2[:, 0], last_B2[:, 1]], length_B + 1, everyone_B, seen
    ).ids_B
    none = one_step(ANY, mixed, last_B2, length_B, np.zeros(num_rows, int), seen)
    assert none.tokens_BS[:, 0].tolist() == plain_B.tolist() and not none.accepted_B.any()
    two = [one_step(ANY, choice, last_B2, length_B, np.full(num_rows, 2), seen) for choice in (warm, greedy, mixed)]
    for row, which in ((1, 0), (0, 1)):  # odd rows are warm
        for alone, beside in zip(two[which][:2], two[2][:2], strict=True):
            assert (alone[row::2] == beside[row::2]).all()
    assert two[1].tokens_BS[::2, 0].tolist() == plain_B[::2].tolist()
    assert 0 < two[0].accepted_B.mean() < 2 and 0 < two[1].accepted_B.mean() < 2


def test_logits_that_are_not_numbers_end_a_row():
    """At the second position of rows that accepted the first draft."""
    logits_BSV = jnp.zeros((2, 3, VOCAB)).at[:, :, 4].set(9.0).at[0, 1, 2].set(jnp.nan)
    drafts = Drafts(jnp.full((2, 2), 4), jnp.full(2, 2))
    run_B = jnp.ones(2, bool)
    choice = choice_of(Sampling(temperature=0.0, top_k=0, top_p=1.0), 2)
    greedy = GREEDY, choice, logits_BSV, None
    verified = acceptance.verify(*greedy, drafts, jnp.zeros(2, jnp.int32), run_B, None)
    assert verified.accepted_B.tolist() == [1, 2]
    assert verified.tokens_BS[0, :2].tolist() == [4, NO_TOKEN] and verified.tokens_BS[1].tolist() == [4, 4, 4]
    drafts = drafts._replace(ids_BK=drafts.ids_BK - 1)
    forced = acceptance.verify(*greedy, drafts, run_B + 0, run_B, None, forced=1.0)
    assert forced.tokens_BS[1].tolist() == [3, 3, 4]


def test_a_row_gets_no_token_behind_its_last_or_behind_one_that_ends_it():
    """It may have two; it ends at 6; it ends at 7; 7 is not its own, as only one draft stood; it does not run."""
    tokens_BS, accepted_B = jnp.tile(jnp.array([5, 6, 7]), (5, 1)), jnp.array([2, 2, 2, 1, 2])
    progress = Progress(jnp.full(5, 10), jnp.full(5, 4), jnp.array([2, 9, 9, 9, 9]), jnp.zeros(5, bool))
    ends_BE, run_B = jnp.array([[1], [6], [7], [7], [5]]), jnp.arange(5) < 4
    counts_B, after = acceptance.advance(progress, ends_BE, Verified(tokens_BS, accepted_B, None, None), run_B)
    assert counts_B.tolist() == [2, 2, 3, 2, 0]
    assert jax.tree.map(lambda leaf: leaf.tolist(), after) == Progress(
        [12, 12, 13, 12, 10], [6, 6, 7, 6, 4], [0, 7, 6, 7, 9], [True, True, True, False, False]
    )
