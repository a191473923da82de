"""Rollouts over an engine without a model, whose tokens tell what it has read (`tests/support/fake_batch.py`)."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import LENGTH, STOP
from deepseek_jax.posttraining.choices import DAPO, GRPO
from deepseek_jax.posttraining.rollouts import (
    Sample,
    carries_loss,
    draw_seed,
    make_batch,
    prompt_at,
    routes_of,
    sample_groups,
    whole_routes,
)
from tests.support.fake_batch import VERSION, FakeBatch, fake_weights, logprob, text_ids

TOKENIZER = byte_tokenizer()
PROMPTS = [(7 + i, [0, 20 + i, *range(30, 30 + 3 * i)]) for i in range(12)]


@pytest.fixture(scope="module")
def samples():
    """Twelve groups of four, by weights of version 1."""
    with Engine(FakeBatch(), TOKENIZER) as engine:
        engine.update_weights(fake_weights(1))
        return sample_groups(engine, PROMPTS, 4, 60, seed=5)


def test_a_sample_has_the_ids_that_were_drawn_with_eos_and_their_probabilities(samples):
    assert [(s.number, s.place) for s in samples] == [(n, g) for n, _ in PROMPTS for g in range(4)]
    assert {s.finish_reason for s in samples} == {STOP, LENGTH} and {s.version for s in samples} == {1}
    for s in samples:
        salt = draw_seed(5, s.number, s.place)
        want = text_ids(s.prompt, 60, 262, {TOKENIZER.eos}, version=1, salt=salt)
        ends = [TOKENIZER.eos] if s.finish_reason == STOP else []
        assert s.ids == want + ends and (len(want) < 60) == bool(ends)
        assert s.text == TOKENIZER.decode(want)
        entries = [token + VERSION for token in [*s.prompt, *s.ids]]
        begin = len(s.prompt)
        want = [logprob(entries[: begin + i], token) for i, token in enumerate(s.ids)]
        np.testing.assert_allclose(s.logprobs, want, rtol=1e-6)


def test_rows_hold_each_token_with_its_own_probability_and_advantage(samples):
    numbers = np.arange(len(samples))
    batch = make_batch(samples, numbers, numbers % 3 > 0, 120, TOKENIZER.pad)
    for i, s in enumerate(samples):
        n, places = len(s.prompt) - 1, slice(len(s.prompt) - 1, len(s.prompt) - 1 + len(s.ids))
        assert batch["targets_BS"][i, places].tolist() == s.ids
        assert batch["tokens_BS"][i, : n + 1].tolist() == list(s.prompt)
        assert batch["tokens_BS"][i, n + 1 : n + len(s.ids)].tolist() == s.ids[:-1]
        np.testing.assert_allclose(batch["sampler_logprobs_BS"][i, places], s.logprobs, rtol=1e-6)
        assert batch["loss_weights_BS"][i].sum() == (len(s.ids) if i % 3 else 0)
        assert batch["loss_weights_BS"][i, places].all() == bool(i % 3)
        assert batch["segment_ids_BS"][i].sum() == n + len(s.ids) and batch["advantages_B"][i] == i
    with pytest.raises(ValueError, match="and a row takes 31; raise data.sequence_length"):
        make_batch(samples, numbers, numbers > 0, 30, TOKENIZER.pad)


def test_routes_of_cached_tokens_are_those_of_the_sample_that_cached_them():
    plain = Sample(0, 0, [1, 2, 3], [4, 5], [], "", STOP, 0, None, 0)
    one = plain._replace(routes_TLK=np.arange(8, dtype=np.uint8).reshape(4, 1, 2))
    two = plain._replace(ids=[9, 9], routes_TLK=np.uint8([[[70, 71]]]), routes_begin=3)  # of the prompt all are cached
    more = two._replace(ids=[4, 5, 6], routes_TLK=np.uint8([[[80, 81]]]), routes_begin=4)  # of an output, too
    lost = two._replace(prompt=[1, 2, 8])
    found = whole_routes([more, two, lost, one])
    assert [x[:, 0].tolist() for x in found] == [
        [[0, 1], [2, 3], [4, 5], [6, 7], [80, 81]],
        [[0, 1], [2, 3], [4, 5], [70, 71]],
        [[-1, -1]] * 3 + [[70, 71]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ]
    rows = routes_of([more, one], 6)
    assert rows.shape == (2, 6, 1, 2) and rows[1, :, 0, 0].tolist() == [0, 2, 4, 6, -1, -1]
    assert routes_of([plain], 6) is None


def test_overlong_outputs_and_flat_groups_can_be_left_out(samples):
    right = np.arange(48).reshape(12, 4) % 4 > 1
    right[3], right[5] = True, False
    flat = np.repeat(np.isin(np.arange(12), [3, 5]), 4)
    cut = np.array([s.finish_reason == LENGTH for s in samples])
    assert carries_loss(GRPO, samples, right).all()
    assert (carries_loss(DAPO, samples, right) == ~flat).all()
    assert (carries_loss(dataclasses.replace(GRPO, overlong="mask"), samples, right) == ~cut).all()


def test_every_epoch_has_every_prompt_once_in_another_order():
    epochs = [[prompt_at(10 * epoch + i, 10, seed=3) for i in range(10)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and len({draw_seed(1, n, g) for n in range(9) for g in range(9)}) == 81


def test_what_cannot_be_compared_is_refused():
    with Engine(FakeBatch(), TOKENIZER) as engine:
        with pytest.raises(ValueError, match="group_size = 1"):
            sample_groups(engine, PROMPTS, 1, 5, seed=0)
        with pytest.raises(ValueError, match="temperature = 0.0: greedy outputs"):
            sample_groups(engine, PROMPTS, 2, 5, seed=0, temperature=0.0)


def test_a_sample_that_is_not_finished_stops_the_run():
    batch = FakeBatch()
    batch.fail_at(1)
    with Engine(batch, TOKENIZER) as engine, pytest.raises(RuntimeError, match="was not finished: .*device is gone"):
        sample_groups(engine, PROMPTS[:1], 2, 5, seed=0)
