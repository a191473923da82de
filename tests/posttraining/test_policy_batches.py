"""The batches of GRPO over an engine without a model: each sample once, with its own numbers, killed or not."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.posttraining.accuracy import accuracy_row, wilson
from deepseek_jax.posttraining.advantages import advantages
from deepseek_jax.posttraining.choices import DAPO, GRPO
from deepseek_jax.posttraining.policy_batches import PolicyBatches
from deepseek_jax.posttraining.policy_metrics import POLICY_KEYS
from deepseek_jax.posttraining.problems import Problems, Prompt
from deepseek_jax.posttraining.reference import Reference
from deepseek_jax.posttraining.rewards.pool import RewardError, RewardPool
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.scoring import Scored
from tests.support.fake_batch import FakeBatch, fake_weights

TOKENIZER = byte_tokenizer()
TRAIN = [Prompt(Problem(f"p{i}", (), "x"), [0, 20 + i, *range(30, 30 + i)]) for i in range(6)]
GROUP, SIZE, UPDATES, LIMIT = 4, 4, 2, 12  # two prompts in a rollout, three rollouts in an epoch


def letters(problem, text):
    """Return something that differs between texts and problems."""
    return (sum(text.encode()) + int(problem.name[1:])) % 7 / 4


def fails(problem, text):
    """Return no number for one problem."""
    return float("nan") if problem.name == "p3" else 1.0


def equal(problem, text):
    """Return 1 for all texts of every other problem, and for some of the others."""
    return float(letters(problem, text) > 0.5) if int(problem.name[1:]) % 2 else 1.0


def wrong(problem, text):
    """Return 0."""
    return 0.0


SAMPLER = ThreadPoolExecutor(1)
REFERENCE = fake_weights(-1)


def score(weights, batch):
    return Scored(batch["sampler_logprobs_BS"] + np.float32(-1.0 if weights is REFERENCE else 0.25), None)


def open_batches(engine, choices=GRPO, reward=letters, on_failure="stop", train=TRAIN, staleness=0, **others):
    grpo = SimpleNamespace(
        group_size=GROUP,
        updates=UPDATES,
        max_new_tokens=LIMIT,
        accuracy="text",
        on_failure=on_failure,
        staleness=staleness,
        drawing={},
        replay_routes=False,
    )
    batches = PolicyBatches(
        **{
            "grpo": grpo,
            "choices": choices,
            "problems": Problems(train, []),
            "engine": engine,
            "pool": RewardPool({"text": reward}, num_workers=0, on_failure=on_failure),
            "score": score,
            "whole": lambda weights: weights,
            "sampler": SAMPLER,
            "length": 40,
            "pad": TOKENIZER.pad,
            "seed": 3,
            "last": 100,
            "reference": Reference(weights=REFERENCE, name="r") if choices.kl_weight else None,
        }
        | others
    )
    batches.follow(lambda: fake_weights(batches.step))
    return batches


@pytest.fixture(scope="module")
def engine():
    with Engine(FakeBatch(), TOKENIZER) as engine:
        yield engine


@pytest.fixture(scope="module")
def uninterrupted(engine):
    """(six updates, their rows of the metrics)."""
    batches = open_batches(engine)
    return [batches.next_batch(SIZE) for _ in range(6)], [batches.rows[step] for step in range(1, 7)]


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_killed_run_trains_on_the_samples_of_the_uninterrupted_one(engine, uninterrupted, step):
    """In the middle of a rollout the weights that drew it are gone: the rest of it is in the position."""
    before = open_batches(engine)
    for _ in range(step):
        before.next_batch(SIZE)
    position = json.loads(json.dumps(before.state()))
    assert all(isinstance(value, int | float) for part in position["parts"] for value in part["row"].values())
    after = open_batches(engine)
    after.step = step
    after.restore(position)
    for i in range(step, 6):
        batch, want = after.next_batch(SIZE), uninterrupted[0][i]
        assert batch.keys() == want.keys()
        for name, array in want.items():
            assert batch[name].dtype == array.dtype and batch[name].tobytes() == array.tobytes(), name
        assert after.row_of(i + 1)["rollout/first_prompt"] == uninterrupted[1][i]["rollout/first_prompt"]


def test_an_epoch_takes_each_prompt_once_by_the_weights_of_its_rollout(uninterrupted):
    batches, rows = uninterrupted
    rows_of_ids = [pair for b in batches for pair in zip(b["tokens_BS"], b["loss_weights_BS"], strict=True)]
    taken = [ids[: int(np.argmax(weights > 0)) + 1].tolist() for ids, weights in rows_of_ids]
    assert [taken.count(prompt.ids) for prompt in TRAIN] == [GROUP] * 6
    assert [row["rollout/version"] for row in rows] == [0, 0, 2, 2, 4, 4]
    assert [row["rollout/first_prompt"] for row in rows] == [0, 0, 2, 2, 4, 4]
    assert all(row.keys() <= POLICY_KEYS.keys() for row in rows)


def test_rows_meet_the_advantage_of_their_own_text(uninterrupted):
    """Advantages are made anew from the tokens of each row."""
    for first, second in zip(*[iter(uninterrupted[0])] * 2, strict=True):
        for batch in (first, second):  # a part is one group
            rewards = []
            for ids, weights in zip(batch["targets_BS"], batch["loss_weights_BS"], strict=True):
                drawn = [int(token) for token in ids[weights > 0] if token != TOKENIZER.eos]
                begin = int(np.argmax(weights > 0))
                (number,) = {i for i, p in enumerate(TRAIN) if len(p.ids) - 1 == begin}
                rewards.append(letters(TRAIN[number].problem, TOKENIZER.decode(drawn)))
            np.testing.assert_allclose(batch["advantages_B"], advantages(np.array([rewards]), "std")[0], rtol=1e-6)
            drawn = batch["loss_weights_BS"] > 0
            np.testing.assert_allclose(
                (batch["old_logprobs_BS"] - batch["sampler_logprobs_BS"])[drawn], 0.25, atol=1e-5
            )
            np.testing.assert_allclose(
                (batch["reference_logprobs_BS"] - batch["sampler_logprobs_BS"])[drawn], -1.0, atol=1e-5
            )


def test_a_rollout_tells_how_it_went(uninterrupted):
    row = uninterrupted[1][0]
    lengths = [int((w > 0).sum()) for batch in uninterrupted[0][:2] for w in batch["loss_weights_BS"]]
    assert row["rollout/length"] == np.mean(lengths) and row["rollout/failed"] == 0
    assert row["rollout/reward"] == pytest.approx(row["rollout/reward_text"]) and row["rollout/reward_std"] > 0
    assert row["rollout/sampler_difference"] == pytest.approx(0.25, abs=1e-5)
    assert row["rollout/sampler_difference_max"] == pytest.approx(0.25, abs=1e-5)
    assert json.loads(json.dumps(row)) == row
    assert all(type(value) in (int, float) for value in row.values())


def test_choices_without_a_kl_need_no_reference_and_flat_groups_carry_no_loss(engine):
    batches = open_batches(engine, dataclasses.replace(GRPO, kl_weight=0.0, drop_flat_groups=True), reward=equal)
    first, second = batches.next_batch(SIZE), batches.next_batch(SIZE)
    assert "reference_logprobs_BS" not in first and batches.rows[1]["rollout/flat_groups"] == 0.5
    flat = [not batch["loss_weights_BS"].any() for batch in (first, second)]
    assert sorted(flat) == [False, True] and batches.rows[1]["rollout/sampler_difference"] > 0.2


def test_a_punishment_of_length_or_another_reward_gives_flat_groups_no_loss(engine):
    """DAPO's eq. 11 asks how many outputs are right, and nothing else."""
    punished = dataclasses.replace(DAPO, overlong_buffer=LIMIT)  # every output, by its length
    batches = open_batches(engine, punished, reward=equal)
    flat = [not batches.next_batch(SIZE)["loss_weights_BS"].any() for _ in TRAIN]  # an update is one group
    assert sum(flat) == 3 and batches.rows[3]["rollout/flat_groups"] == 0.0  # all right, of several lengths
    pool = RewardPool({"text": wrong, "letters": letters}, {"text": 1.0, "letters": 0.5}, num_workers=0)
    batches = open_batches(engine, dataclasses.replace(GRPO, kl_weight=0.0, drop_flat_groups=True), pool=pool)
    assert not batches.next_batch(SIZE)["loss_weights_BS"].any() and batches.rows[1]["rollout/flat_groups"] == 0.0


def test_a_reward_that_is_no_number_stops_the_run_or_counts_zero(engine):
    batches = open_batches(engine, reward=fails)
    with pytest.raises(RewardError, match="reward 'text' of problem 'p3' returned nan"):
        for _ in range(6):
            batches.next_batch(SIZE)
    position = batches.state()
    assert position["prompt"] < 6 and not position["parts"]  # the prompt is not counted
    batches = open_batches(engine, reward=fails, on_failure="zero")
    for _ in range(6):
        assert np.isfinite(batches.next_batch(SIZE)["advantages_B"]).all()
    assert sum(row["rollout/failed"] for row in batches.rows.values()) == GROUP * UPDATES


def test_a_position_of_other_problems_or_another_reference_is_refused(engine):
    position = open_batches(engine).state()
    with pytest.raises(ValueError, match="problems, template or tokenizer have changed"):
        open_batches(engine, train=TRAIN[:5]).restore(position)
    with pytest.raises(ValueError, match="the KL reference is those"):
        open_batches(engine, reference=Reference(weights=REFERENCE, name="other")).restore(position)


def test_accuracy_is_greedy_and_has_wilsons_interval(engine):
    low, high = wilson(8, 10)[1:]
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert wilson(0, 4)[1] == 0.0 and wilson(4, 4)[2] == 1.0
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)
    with RewardPool({"r": every_other}, num_workers=0) as pool:
        row = accuracy_row(engine, pool, TRAIN, "r", LIMIT, fake_weights(0))
    assert row["eval/accuracy"] == 0.5 and row["eval/problems"] == 6 and row.keys() <= POLICY_KEYS.keys()
    assert row["eval/accuracy_low"] < 0.5 < row["eval/accuracy_high"] and 0 < row["eval/length"] <= LIMIT


def every_other(problem, text):
    """Return 1 for half of the problems."""
    return float(int(problem.name[1:]) % 2)
