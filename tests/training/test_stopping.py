"""How the command ends, in processes of its own: an exit code and no traceback of Orbax, whatever happens."""

import signal
import time

import pytest

from tests.training.runs import DEADLINE, finish, start, write_corpus

pytestmark = pytest.mark.xdist_group("stopping")  # what one worker made or compiled, its other tests use

# Runs the command with one change: the folder of a save cannot be made, as on a full disk.
FULL_DISK = """
import errno, os, runpy, sys
original = os.mkdir
def mkdir(path, *arguments, **options):
    if "/5.orbax" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return original(path, *arguments, **options)
os.mkdir = mkdir
sys.argv[0] = "experiments.train"
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The flags of a run of two steps without a workdir."""
    corpus = write_corpus(tmp_path_factory.mktemp("run") / "corpus")
    return [f"--config=tests/training/nano.py:{corpus}", "--cpu_devices=1", "--config.training.num_tokens=512"]


@pytest.mark.slow
def test_a_complete_run_without_a_training_line_is_a_success_and_again(options, tmp_path):
    log, rare = tmp_path / "log", "--config.training.log_every=100"
    for _ in range(2):
        finish(start(["-m", "experiments.train", *options, f"--workdir={tmp_path / 'run'}", rare], log), log)
    said = log.read_text()
    assert said.count("its sheet of curves cannot be made") == 2 and said.count("not measured") == 4
    assert "starts: step 1 of 2" in said and "all 2 steps are done" in said
    kept = (tmp_path / "run" / "log.txt").read_text()
    assert kept.count("its sheet of curves cannot be made") == 2


@pytest.mark.slow
def test_a_full_disk_ends_a_run_within_seconds(options, tmp_path):
    log, longer = tmp_path / "log", "--config.training.num_tokens=5120"
    process = start(["-c", FULL_DISK, *options, longer, f"--workdir={tmp_path / 'run'}"], log)
    deadline = time.monotonic() + DEADLINE
    while "No space left on device" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.wait(120) == 1
    said = log.read_text()
    assert "there is no earlier checkpoint" in said and "make room" in said and "_SignalingThread" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_a_line(options, tmp_path, number):
    log = tmp_path / "log"
    process = start(["-m", "experiments.train", *options, f"--workdir={tmp_path / 'run'}"], log)
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "run").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(120) == 128 + number
    said = log.read_text()
    assert number.name in said and "Traceback" not in said
