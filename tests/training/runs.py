"""Runs of the command in processes of their own, on a small corpus."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.training.metrics import read_rows
from tests.support import compiling

ROOT = Path(__file__).parents[2]
DEADLINE = 600.0  # seconds for one process, on a loaded machine with nothing compiled


def write_corpus(folder: Path) -> Path:
    """Make a folder of sixty documents of random words."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("etaoinshrdlu"), size=size)) for size in generator.integers(2, 8, size=200)]
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(generator.choice(words, size=300)))
    return folder


def start(command: list[str], log: Path, piped: bool = False, **variables: str) -> subprocess.Popen:
    """Start `python *command` with variables of the environment, its output appended to `log`.

    If `piped`, its input and its output are pipes, and its errors alone are in `log`.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS} | variables
    if jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    with log.open("ab") as output:
        piping = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if piped else {"stdout": output}
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stderr=output, **piping)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for its good end."""
    assert process.wait(DEADLINE) == 0, log.read_text()[-4000:]


def metrics_without_times(workdir: Path) -> list[dict]:
    """Return the rows of a run's metrics without what is time."""
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in read_rows(workdir)]


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_peers(folder: Path, count: int, *options: str) -> tuple[list[subprocess.Popen], list[Path]]:
    """Start `count` processes with the smallest loop; return them and their logs once all are in it.

    With the option "--distributed" they find each other by the variables that SLURM's srun sets.
    """
    port, logs = str(free_port()), [folder / f"peer{index}" for index in range(count)]
    processes = []
    for index, log in enumerate(logs):
        variables, given = {}, [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        if "--distributed" in options:
            names = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": index, "LOCALID": index}
            variables = {f"SLURM_{name}": str(value) for name, value in names.items()} | {"JAX_COORDINATOR_PORT": port}
            given = []
        command = ["-m", "tests.training.peers", "--cpu_devices=1", *given, *options]
        processes.append(start(command, log, **variables))
    for log in logs:
        wait_for("at step 10\n", log, processes)
    return processes, logs


def wait_for(line: str, log: Path, processes: list[subprocess.Popen], seconds: float = DEADLINE) -> None:
    """Wait until `log` has `line`, all processes have ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while line not in log.read_text() and time.monotonic() < deadline:
        if all(process.poll() is not None for process in processes):
            return
        time.sleep(0.02)
