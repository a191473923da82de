"""Rewards in processes: in order, weighted, and no failure hangs or ends what asked for them."""

import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from deepseek_jax.posttraining.rewards import NAMES, pool, rewards_by_name
from deepseek_jax.posttraining.rewards.pool import RewardError, RewardPool, _Worker
from deepseek_jax.posttraining.rewards.problem import Problem
from tests.support.failing_rewards import misbehave, one
from tests.support.patience import SECONDS

PROBLEM = Problem("the seventh", (), answer="7")
FAILURES = {
    "raise": "raised KeyError: 'of the reward'",
    "nan": "returned nan",
    "infinity": "returned inf",
    "words": "raised TypeError",
    "nothing": "raised TypeError",
    "hang": "took longer than 1.0 s",
    "die": "ended its process",
}


STUCK = "x" * (1 << 22)  # for a process that is stopped


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The limit of a second is for what hangs; all else has the time that a loaded machine needs."""
    call = _Worker.call

    def own(self, message, seconds):
        name, _, text = message
        return call(self, message, seconds if name == "bad" and text in ("hang", STUCK) else SECONDS)

    monkeypatch.setattr(_Worker, "call", own)


@pytest.fixture(scope="module")
def lenient():
    with RewardPool({"bad": misbehave, "one": one}, {"bad": 2.0, "one": 0.25}, 1, 1.0, "zero") as pool:
        yield pool


@pytest.fixture(scope="module")
def strict():
    with RewardPool({"bad": misbehave}, seconds=1.0) as pool:
        yield pool


@pytest.mark.parametrize("text", FAILURES)
def test_a_failure_counts_nothing_and_the_pool_goes_on(lenient, caplog, text):
    caplog.set_level(logging.WARNING)
    good, bad, after = lenient.score([PROBLEM] * 3, ["fine", text, "fine"])
    assert good.total == after.total == 1.25 and good.failed == after.failed == ()
    assert bad.total == 0.25 and bad.parts == {"bad": 0.0, "one": 1.0} and bad.failed == ("bad",)
    assert FAILURES[text] in caplog.text and "'the seventh'" in caplog.text and repr(text) in caplog.text


@pytest.mark.parametrize("text", ["nan", "hang"])
def test_a_failure_stops_where_that_is_asked_for(strict, text):
    with pytest.raises(RewardError, match=f"reward 'bad' of problem 'the seventh' {FAILURES[text]}; text: '{text}'"):
        strict.score([PROBLEM, PROBLEM], ["fine", text])
    assert strict.submit(PROBLEM, "fine").result(SECONDS).total == 0.5


def test_scores_come_in_order_and_without_processes():
    texts = [f"<think>t</think><answer>\\boxed{{{number}}}</answer>" for number in range(20)]
    with RewardPool(rewards_by_name(["mathematics", "format"]), num_workers=0) as here:
        totals = [score.total for score in here.score([PROBLEM] * 20, texts)]
    assert totals == [2.0 if number == 7 else 1.0 for number in range(20)]
    with RewardPool(rewards_by_name(["mathematics", "format"]), num_workers=2) as pool:
        assert [score.total for score in pool.score([PROBLEM] * 20, texts)] == totals


def test_a_reward_that_exits_is_a_failure_without_processes_too():
    with RewardPool({"bad": misbehave}, num_workers=0) as pool, pytest.raises(RewardError, match="raised SystemExit"):
        pool.score([PROBLEM], ["exit"])


def test_a_process_that_reads_nothing_is_ended(lenient, caplog):
    """A text longer than the socket's buffer would wait for it for ever."""
    lenient.score([PROBLEM], ["fine"])
    os.kill(lenient._all[0]._process.pid, signal.SIGSTOP)
    (score,) = lenient.score([PROBLEM], [STUCK])
    assert score.failed == ("bad",) and score.parts["one"] == 1.0 and FAILURES["hang"] in caplog.text


def test_a_text_that_is_sent_when_its_time_is_over_took_too_long(strict, monkeypatch):
    """The process is killed at the moment when it has the text: not an end of its own."""

    class Late(threading.Timer):
        def cancel(self):
            self.function()
            super().cancel()

    strict.score([PROBLEM], ["fine"])
    own = SimpleNamespace(Event=threading.Event, Lock=threading.Lock, Timer=Late)
    monkeypatch.setattr(pool, "threading", own)
    with pytest.raises(RewardError, match=FAILURES["hang"]):
        strict.score([PROBLEM], ["hang"])


def test_the_end_of_a_pool_does_not_wait_for_a_reward():
    with RewardPool({"bad": misbehave}, seconds=900.0) as pool:
        future = pool.submit(PROBLEM, "hang")
    assert isinstance(future.exception(SECONDS), RewardError)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"rewards": {}}, "no rewards"),
        ({"weights": {"two": 1.0}}, "weights are for"),
        ({"weights": {"one": float("nan")}}, "finite"),
        ({"on_failure": "ignore"}, "on_failure is 'ignore'"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seconds": 0}, "seconds 0"),
        ({"rewards": {"one": lambda problem, text: 0.0}}, "module's function"),
    ],
)
def test_bad_settings_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        RewardPool(**({"rewards": {"one": one}} | changed))


def test_rewards_have_names():
    names = [name for name in NAMES if name != "code"]
    assert list(rewards_by_name(names)) == names
    for bad in ([], ["mathematics", "mathematics"], ["maths"]):
        with pytest.raises(ValueError, match="each once"):
            rewards_by_name(bad)


def test_as_many_texts_as_problems():
    with RewardPool({"one": one}, num_workers=0) as pool, pytest.raises(ValueError, match="1 problems and 2 texts"):
        pool.score([PROBLEM], ["a", "b"])
