"""SIGKILL of trainer and sampler (one process): the run trains on the samples of one that was never killed, once."""

import json
import os
import random
import signal
import time

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.training.record import read_sealed
from tests.posttraining import test_sft
from tests.support.grpo_runs import STEPS, tiny
from tests.training.runs import DEADLINE, start

KILLS = 5


class Runs:
    """Runs in a folder, each in a process that begins with everything imported."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "log"
        command = ["-m", "tests.support.grpo_runs", str(folder)]
        self.process = start(command, self.log, piped=True)

    def start(self, name, staleness, fails_at=0, most=0):
        self.process.stdin.write(f"{name} {staleness} {fails_at} {most}\n".encode())
        self.process.stdin.flush()
        return int(self.answer("started"))

    def answer(self, word):
        found, value = (self.process.stdout.readline().decode() or f"dead {self.log.read_text()[-4000:]}").split(
            maxsplit=1
        )
        assert found == word, value
        return value

    def finish(self):
        return int(self.answer("ended"))

    def lines(self, name):
        path = self.folder / f"{name}.trained"
        return path.read_text().splitlines() if path.exists() else []

    def trained(self, name):
        """The version of the weights, and the samples, of each update: what was done last."""
        return {step: (version, samples) for step, version, samples in map(json.loads, self.lines(name))}

    def weights(self, name):
        return read_sealed(self.folder / name / "checkpoints" / str(STEPS) / "run")["fingerprints"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tree = test_sft.settings()
    tree.data.sequence_length, tree.training.initial_weights = 48, ""
    del tree["posttraining"]
    test_sft.save_run(from_config_dict(tiny(tree)), folder / "base")
    runs = Runs(folder)
    yield runs
    runs.process.kill()
    runs.process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_five_kills_and_an_error_in_the_sampler_lose_and_repeat_no_prompt(runs, staleness):
    """A killed run ends with the samples and the weights of the uninterrupted one; rollouts beside training too."""
    rng, whole, killed = random.Random(staleness), f"whole{staleness}", f"killed{staleness}"
    runs.start(whole, staleness)
    assert runs.finish() == 0, runs.log.read_text()
    for number in range(KILLS):
        before = len(runs.lines(killed))
        process, deadline = runs.start(killed, staleness, most=2), time.monotonic() + DEADLINE
        while number and len(runs.lines(killed)) == before and time.monotonic() < deadline:
            time.sleep(0.002)  # the first is killed in its start
        time.sleep(rng.random() * 0.3)
        os.kill(process, signal.SIGKILL)
        assert runs.finish() == signal.SIGKILL, runs.log.read_text()
    if not staleness:
        runs.start(killed, staleness, fails_at=2)
        assert os.waitstatus_to_exitcode(runs.finish()) == 1
        assert "RuntimeError: an error in the sampler in the rollout of prompts" in runs.log.read_text()
    runs.start(killed, staleness)
    assert runs.finish() == 0, runs.log.read_text()
    trained = runs.trained(whole)
    assert runs.trained(killed) == trained and runs.weights(killed) == runs.weights(whole)
    assert [*trained] == [*range(1, STEPS + 1)] and len({s for _, samples in trained.values() for s in samples}) > STEPS
    assert {step - 1 - version for step, (version, _) in trained.items()} == {0, staleness}
