"""A run that is killed with SIGKILL and started again, over and over, ends with the parameters of a run that never was.

The parent only watches the workdir; nothing in the trainer knows of it. Some kills strike at a random moment, some
while a save's temporary folder exists.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.checkpoint import TMP_SUFFIX, Checkpoints
from deepseek_jax.training.state import abstract_state
from tests.training.nano import get_config
from tests.training.runs import DEADLINE, finish, metrics_without_times, start, write_corpus


def saves(workdir: Path) -> set[str]:
    """Names of the complete checkpoints and of unfinished ones."""
    folder = workdir / "checkpoints"
    return {name for name in (os.listdir(folder) if folder.exists() else ()) if name[0].isdigit()}


def kill_in_mid_save(process: subprocess.Popen, workdir: Path) -> bool:
    """Kill as soon as a temporary folder is seen; return whether one was left behind."""
    before, deadline = saves(workdir), time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        if any(TMP_SUFFIX in name for name in saves(workdir) - before):
            break
    process.kill()
    process.wait()
    return any(TMP_SUFFIX in name for name in saves(workdir))


def kill_at_random(process: subprocess.Popen, workdir: Path, rng: random.Random) -> None:
    """Kill up to a second after checkpoints first change: in a step, between two, in a save, in an evaluation."""
    before, deadline = saves(workdir), time.monotonic() + DEADLINE
    while process.poll() is None and saves(workdir) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.random())
    process.kill()
    process.wait()


def kill_after_save(process: subprocess.Popen, workdir: Path) -> None:
    """Kill as soon as there is a complete checkpoint."""
    deadline = time.monotonic() + DEADLINE
    while process.poll() is None and time.monotonic() < deadline:
        if any(TMP_SUFFIX not in name for name in saves(workdir)):
            break
        time.sleep(0.001)
    process.kill()
    process.wait()


def final_state(corpus: Path, workdir: Path, changes: dict) -> dict:
    config = from_config_dict(get_config(str(corpus))).with_(**changes)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, keep=None)
        state, progress, _ = checkpoints.restore(abstract_state(config, mesh), mesh)
        checkpoints.close()
    assert progress.tokens_seen == config.training.num_tokens
    return jax.device_get(state)


def command(corpus: Path, workdir: Path) -> list[str]:
    return [
        "-m",
        "experiments.train",
        f"--config=tests/training/nano.py:{corpus}",
        f"--workdir={workdir}",
        "--cpu_devices=1",
    ]


@pytest.mark.slow
def test_five_kills_leave_no_trace(tmp_path):
    corpus, whole, killed = write_corpus(tmp_path / "corpus"), tmp_path / "whole", tmp_path / "killed"
    log, rng = tmp_path / "log", random.Random(0)
    finish(start(command(corpus, whole), log), log)
    deaths, in_mid_save = 0, 0
    for kind in ("random", "save", "random", "save", "random"):
        process = start(command(corpus, killed), log)
        if kind == "save":
            in_mid_save += kill_in_mid_save(process, killed)
        else:
            kill_at_random(process, killed, rng)
        deaths += process.returncode == -signal.SIGKILL
    finish(start(command(corpus, killed), log), log)
    assert deaths == 5, "the run was over before the last kill; make it longer"
    assert in_mid_save >= 1
    assert not any(TMP_SUFFIX in name for name in saves(killed))
    assert_same_end(corpus, killed, whole, {})


@pytest.mark.slow
def test_a_kill_leaves_no_trace_with_the_compiler_of_users(tmp_path):
    """Other tests compile with `tests.support.compiling`; this one as a user's shell does, and so trains less."""
    changes = {"model": {"num_mtp_layers": 0}, "training": {"num_tokens": 20 * 8 * 32}}
    less = [f"--config.{part}.{key}={value}" for part, keys in changes.items() for key, value in keys.items()]
    corpus, whole, killed = write_corpus(tmp_path / "corpus"), tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "log"
    finish(start(command(corpus, whole) + less, log, XLA_FLAGS=""), log)
    process = start(command(corpus, killed) + less, log, XLA_FLAGS="")
    kill_after_save(process, killed)
    assert process.returncode == -signal.SIGKILL
    resumed = tmp_path / "resumed"
    finish(start(command(corpus, killed) + less, resumed, XLA_FLAGS=""), resumed)
    assert "continues after step" in resumed.read_text()
    assert_same_end(corpus, killed, whole, changes)


def assert_same_end(corpus: Path, killed: Path, whole: Path, changes: dict) -> None:
    """Parameters, moments and metrics of two complete runs are equal, bit for bit."""
    got, want = (final_state(corpus, workdir, changes) for workdir in (killed, whole))
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
    assert metrics_without_times(killed) == metrics_without_times(whole)
