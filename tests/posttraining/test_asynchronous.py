"""Rollouts beside training, over an engine without a model: which weights draw what, what is lost, and how it ends."""

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.inference.engine import Engine
from deepseek_jax.posttraining import policy_batches
from deepseek_jax.posttraining.policy_batches import Rollout, _made
from deepseek_jax.posttraining.policy_metrics import POLICY_KEYS
from deepseek_jax.posttraining.reference import Reference
from deepseek_jax.posttraining.rewards.pool import RewardError, RewardPool
from deepseek_jax.posttraining.scoring import Scored
from tests.posttraining.test_policy_batches import (
    GROUP,
    REFERENCE,
    SIZE,
    TOKENIZER,
    TRAIN,
    open_batches,
    score,
)
from tests.support.failing_rewards import hang
from tests.support.fake_batch import FakeBatch, fake_weights
from tests.support.patience import SECONDS

STEPS = 12  # six rollouts of two prompts: two epochs


@pytest.fixture(scope="module")
def engine():
    with Engine(FakeBatch(), TOKENIZER) as engine:
        yield engine


def take(batches, steps=STEPS):
    """Take updates up to number `steps`."""
    return [batches.next_batch(SIZE) for _ in range(batches.step, steps)]


def continued(batches, engine, **options):
    """Another run's batches at the position of `batches`, which went through a checkpoint."""
    after = open_batches(engine, step=batches.step, **options)
    after.restore(json.loads(json.dumps(batches.state())))
    return after


def trained(batches):
    """How often each sample was trained on: a prompt's ids and the output's."""
    rows = [row for b in batches for row in zip(b["tokens_BS"], b["targets_BS"], b["loss_weights_BS"], strict=True)]
    samples = [(ids.tobytes(), targets[weights > 0].tobytes()) for ids, targets, weights in rows]
    return sorted(samples)


def prompts(batches):
    """How often each prompt was trained on."""
    rows = [row for b in batches for row in zip(b["tokens_BS"], b["loss_weights_BS"], strict=True)]
    taken = [ids[: int(np.argmax(weights > 0)) + 1].tolist() for ids, weights in rows]
    return [taken.count(prompt.ids) for prompt in TRAIN]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, array in other.items():
            assert batch[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("staleness", "versions"),
    [(0, [0, 2, 4, 6, 8, 10]), (1, [0, 1, 3, 5, 7, 9]), (2, [0, 0, 2, 4, 6, 8]), (5, [0, 0, 0, 1, 3, 5])],
)
def test_a_rollout_is_drawn_by_the_weights_of_so_many_updates_before(engine, staleness, versions):
    batches = open_batches(engine, staleness=staleness)
    taken = take(batches)
    rows = [batches.rows[step + 1] for step in range(STEPS)]
    assert [row["rollout/version"] for row in rows[::2]] == [row["rollout/version"] for row in rows[1::2]] == versions
    for step, row in enumerate(rows):
        assert row["policy/staleness"] == step - row["rollout/version"] <= staleness + step % 2
        assert row.keys() <= POLICY_KEYS.keys() and row["rollout/waited"] >= 0
    assert prompts(taken) == [2 * GROUP] * len(TRAIN)
    others = take(open_batches(engine, staleness=0))
    assert (trained(taken) == trained(others)) == (staleness == 0)  # other weights draw others, of the same prompts


def test_a_rollout_is_made_while_the_trainer_trains_and_no_sooner_than_it_may(engine):
    """The scores of the second rollout wait until the trainer has its first batch."""
    has_first, scored = threading.Event(), []

    def waits(weights, batch):
        scored.append(weights)
        assert len(scored) <= 2 or has_first.wait(SECONDS)
        return score(weights, batch)

    batches = open_batches(engine, score=waits, staleness=2)
    batches.next_batch(SIZE)
    has_first.set()
    batches.state()
    assert len(scored) == 4 and batches.step == 1
    scored.clear()
    batches = open_batches(engine, score=waits, staleness=0)
    take(batches, 2)
    batches.state()
    assert len(scored) == 2


@pytest.mark.parametrize("staleness", [1, 4])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_killed_run_goes_on_with_the_uninterrupted_ones_numbers(engine, staleness, step):
    whole = take(open_batches(engine, staleness=staleness))
    before = open_batches(engine, staleness=staleness)
    first = take(before, step)
    assert_equal(first + take(continued(before, engine, staleness=staleness)), whole)


@pytest.mark.parametrize("staleness", [0, 1])
def test_errors_in_the_sampler_end_the_run_and_lose_no_prompt(engine, staleness):
    """Five times, in rollouts of its choice: in a score, behind rewards; a run goes on from where it was saved."""
    options = {"staleness": staleness}
    whole, taken = take(open_batches(engine, **options)), []
    batches = open_batches(engine, **options)
    for calls in (1, 3, 2, 4, 1):
        left = iter(range(calls))

        def fails(weights, batch, left=left):
            if next(left, None) is None:
                raise RuntimeError("the device is gone")
            return score(weights, batch)

        batches.score = fails
        with pytest.raises(RuntimeError, match="the device is gone") as caught:
            while batches.step < STEPS:
                taken.append(batches.next_batch(SIZE))
        assert "in the rollout of prompts" in caught.value.__notes__[0]
        batches = continued(batches, engine, **options)
        assert batches.step == len(taken)
    taken += take(batches)
    assert prompts(taken) == prompts(whole)
    rows = [batches.rows[step] for step in batches.rows]
    assert all(row["policy/staleness"] <= staleness + 1 for row in rows)
    if not staleness:
        assert_equal(taken, whole)


def test_a_reward_that_hangs_ends_the_run_with_its_name_and_what_stays(engine):
    with RewardPool({"text": hang}, num_workers=1, seconds=0.2) as pool:
        batches = open_batches(engine, pool=pool, staleness=1)
        with pytest.raises(RewardError, match="'text' of problem .* took longer than 0.2 s.*") as caught:
            batches.next_batch(SIZE)
    assert "the rollout of prompts 0 to 1 by the weights of 0 updates has ended the run" in str(caught.value)
    assert "the same command continues; with config.posttraining.grpo.on_failure = 'zero'" in str(caught.value)
    assert batches.state()["prompt"] == 0
    parts = Future()
    parts.set_exception(RewardError("a model's program does not come back"))
    with pytest.raises(RewardError, match="the same command continues$"):
        _made(Rollout(0, 2, 0, parts), "zero")


def test_saving_says_for_how_many_rollouts_it_waits_and_which_one_has_failed(engine, caplog):
    """Ctrl-C may fall before the trainer comes to the rollout that failed."""
    goes_on, shown = threading.Event(), []

    def fails(weights, batch):
        assert goes_on.wait(SECONDS)
        raise RuntimeError("the device\nis gone")

    batches = open_batches(engine, staleness=2)
    batches.next_batch(SIZE)
    batches.state()
    batches.score = fails

    def show(text):
        shown.append(text)
        goes_on.set()

    batches.follow(batches.weights, show)
    batches.step = 3
    batches.pending.clear()
    batches._begin(SIZE)
    assert batches.state()["prompt"] == 4
    assert shown == ["waiting for 2 rollouts before saving ..."]
    assert "the rollout of prompts 4 to 5 by the weights of 3 updates has failed" in caplog.text
    assert "RuntimeError: the device is gone" in caplog.text


def test_the_seconds_of_a_rollout_begin_when_its_weights_are_made(monkeypatch):
    """The update before is still on the device when the thread gets its weights."""
    now, asked = [0.0], threading.Event()

    def clock():
        """The weights are ready after a second of the trainer's waiting; each look of the sampler takes a quarter."""
        if threading.current_thread() is threading.main_thread():
            seen = now[0]  # before the other thread goes on
            asked.set()
            return seen
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(policy_batches, "time", SimpleNamespace(perf_counter=clock))

    class Late:
        def block_until_ready(self):
            assert asked.wait(SECONDS)
            if now[0] < 1.0:  # the sampler's wait; the engine's comes later, and must not write over its clock
                now[0] = 1.0

    batch = FakeBatch()
    take_weights = batch.update_weights

    def update_weights(weights):
        weights.params["late"].block_until_ready()
        take_weights(weights)

    batch.update_weights = update_weights
    weights = fake_weights(0)
    weights.params["late"] = Late()
    with Engine(batch, TOKENIZER) as engine:
        batches = open_batches(engine)
        batches.follow(lambda: weights)
        batches.next_batch(SIZE)
    row = batches.rows[1]
    assert row["rollout/seconds"] == 0.5 and row["rollout/waited"] == 1.75


def test_an_engine_that_closes_ends_the_thread():
    """The order in which a run ends: what waits is cancelled, then the engine, then the thread is waited for."""
    with ThreadPoolExecutor(1) as sampler:
        with Engine(FakeBatch(), TOKENIZER) as engine:
            engine.pause()
            batches = open_batches(engine, sampler=sampler, staleness=2)
            batches.weights = lambda: fake_weights(0)
            batches._begin(SIZE)
            sampler.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(RuntimeError, match="clos|finish"):
            batches.ahead[0].parts.result(SECONDS)
    assert batches.ahead[1].parts.cancelled()


def test_no_rollout_is_made_that_no_update_takes(engine):
    batches = open_batches(engine, staleness=4, last=4)
    take(batches, 4)
    position = batches.state()
    assert position["prompt"] == 4 and not position["parts"] and not batches.ahead


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_reference_is_the_policy_of_every_so_many_updates(engine, staleness):
    """Rollouts of 0, 2, 4, .. updates (or one less) have the reference of the last multiple of four."""
    kept = {}

    def against(weights, batch):
        version = -1 if weights is REFERENCE else int(weights.params["version"])
        return Scored(np.full_like(batch["sampler_logprobs_BS"], version), None)

    def options(weights=REFERENCE, name="r", step=0):
        keep = kept.__setitem__
        reference = Reference(
            weights=weights, name=name, step=step, every=4, keep=lambda weights, step: keep(step, weights)
        )
        return {"reference": reference, "score": against, "staleness": staleness}

    def references(taken):
        return [int(batch["reference_logprobs_BS"][0, 0]) for batch in taken[::2]]

    batches = open_batches(engine, **options())
    whole = take(batches)
    assert references(whole) == ([-1, -1, 4, 4, 8, 8] if not staleness else [-1, -1, -1, 4, 4, 8])
    for step in (3, 4, 6, 9):
        before = open_batches(engine, **options())
        first = take(before, step)
        position = json.loads(json.dumps(before.state()))
        assert position["reference_step"] == (step - 1) // 4 * 4
        begun = (
            (REFERENCE, "r") if not position["reference_step"] else (before.reference.weights, before.reference.name)
        )
        after = open_batches(engine, step=step, **options(*begun, position["reference_step"]))
        after.restore(position)
        assert_equal(first + take(after), whole)
        if position["reference_step"]:
            assert int(kept[position["reference_step"]].params["version"]) == position["reference_step"]
            with pytest.raises(ValueError, match="the KL reference in reference is not the policy of step"):
                open_batches(engine, **options(*begun[:1], "other", position["reference_step"])).restore(position)
