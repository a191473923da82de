"""Two processes of four devices do as one of eight: each trains on its own rows, and together they write one export."""

import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from deepseek_jax.parallel.watchdog import STUCK
from deepseek_jax.training.metrics import KEYS, read_rows
from tests.training.runs import DEADLINE, finish, start, write_corpus

STEPS = 12


def command(corpus, workdir, *options):
    size = f"--config.training.num_tokens={STEPS * 8 * 32}"
    mesh = ["--config.mesh.data=2", "--config.mesh.expert=4"]
    return [
        "-m",
        "experiments.train",
        f"--config=tests/training/nano.py:{corpus}",
        f"--workdir={workdir}",
        size,
        *mesh,
        *options,
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    one, two, logs = tmp_path / "one", tmp_path / "two", [tmp_path / name for name in ("log", "log0", "log1")]
    finish(start(command(corpus, one, "--cpu_devices=8"), logs[0]), logs[0])

    together = ["--cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    processes = [start(command(corpus, two, *together, f"--process_id={i}"), logs[1 + i]) for i in range(2)]
    for process, log in zip(processes, logs[1:], strict=True):
        finish(process, log)

    yardsticks = [(key, 1) for key in KEYS if key.startswith("yardstick/")]
    for key, count in (("train/loss", STEPS), ("optimizer/grad_norm", STEPS), ("eval/bits_per_byte", 2), *yardsticks):
        of_one, of_two = ([row[key] for row in read_rows(workdir) if key in row] for workdir in (one, two))
        assert len(of_one) == count
        # sums over processes add in another order: 4e-7 was seen
        np.testing.assert_allclose(of_two, of_one, rtol=5e-6, err_msg=key)
    assert (two / "checkpoints" / str(STEPS)).is_dir()
    assert "held-out bits per byte, after" in logs[1].read_text()
    assert "held-out bits per byte" not in logs[2].read_text()


@pytest.mark.slow
def test_two_processes_export_what_one_does(tmp_path):
    """FP32 masters that neither process has whole, in more files than processes; one file is already there."""
    corpus = write_corpus(tmp_path / "corpus")
    workdir, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    steps = f"--config.training.num_tokens={2 * 8 * 32}"
    finish(start([*command(corpus, workdir, steps), "--cpu_devices=8"], tmp_path / "log"), tmp_path / "log")
    export = ["-m", "experiments.convert_hf", "export", f"--workdir={workdir}", "--shard_gigabytes=0.00001"]
    finish(start([*export, f"--hf={one}", "--cpu_devices=8"], tmp_path / "log"), tmp_path / "log")
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) > 4

    def export_together() -> list[str]:
        together = [f"--hf={two}", "--cpu_devices=4", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        logs = [tmp_path / f"log{i}" for i in range(2)]
        for process, log in zip(
            [start([*export, *together, f"--process_id={i}"], logs[i]) for i in range(2)], logs, strict=True
        ):
            finish(process, log)
        return [log.read_text() for log in logs]

    said = export_together()
    assert "step 2 of" in said[0] and "step 2 of" not in said[1]
    contents = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {path.name: path.read_bytes() for path in two.iterdir()} == contents
    kept, lost = two / files[0], two / files[2]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    export_together()
    assert {path.name: path.read_bytes() for path in two.iterdir()} == contents
    assert kept.stat().st_mtime_ns == before


def start_peers(tmp_path, *options) -> tuple[list[subprocess.Popen], list]:
    """Start two processes with the smallest loop; return them and their logs once both are in it."""
    port, logs = free_port(), [tmp_path / f"peer{index}" for index in range(2)]
    processes = [
        start(["-m", "tests.training.peers", str(port), "2", str(index), *options], log)
        for index, log in enumerate(logs)
    ]
    deadline = time.monotonic() + DEADLINE
    while not all("at step 10" in log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes, logs


@pytest.mark.slow
@pytest.mark.parametrize(("number", "index"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, number, index):
    processes, logs = start_peers(tmp_path)
    processes[index].send_signal(number)
    assert [process.wait(60) for process in processes] == [128 + number] * 2
    stopped = [log.read_text().rpartition("stopped after step ")[2].strip() for log in logs]
    assert stopped[0] == stopped[1] and int(stopped[0]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, index):
    processes, logs = start_peers(tmp_path)
    processes[index].kill()
    start_of_silence = time.monotonic()
    processes[index].wait()
    assert processes[1 - index].wait(60) == 1
    assert time.monotonic() - start_of_silence < 45.0
    assert "ProcessError: another process of this run is gone" in logs[1 - index].read_text()
    assert "Check failure stack trace" not in logs[1 - index].read_text()


@pytest.mark.slow
def test_the_failure_of_one_process_is_told_by_the_other(tmp_path):
    processes, logs = start_peers(tmp_path, "40")
    processes[1].wait(60)  # this program has no front door, which would exit with 2
    assert processes[0].wait(60) == 2
    assert all("process 1 has a problem" in log.read_text() for log in logs)
    assert "Check failure stack trace" not in logs[0].read_text() + logs[1].read_text()


@pytest.mark.slow
def test_a_process_that_falls_asleep_ends_both_with_its_stack(tmp_path):
    """Bound: 3 s. The whole test took 9 s, both starts included."""
    processes, logs = start_peers(tmp_path, "-1", "40", "3")
    start_of_silence = time.monotonic()
    assert [process.wait(60) for process in processes] == [STUCK] * 2
    assert time.monotonic() - start_of_silence < 30.0
    assert "no step was finished for" in logs[1].read_text() and "in fall_asleep" in logs[1].read_text()
    assert "Check failure stack trace" not in logs[0].read_text() + logs[1].read_text()


@pytest.mark.slow
def test_a_stopped_process_ends_the_other(tmp_path):
    """SIGSTOP: its connections stay. It ends, too, when it goes on."""
    processes, logs = start_peers(tmp_path, "-1", "-1", "3")
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(60) == STUCK
    assert "no step was finished for" in logs[0].read_text()
    processes[1].send_signal(signal.SIGCONT)
    assert processes[1].wait(60) != 0


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_sleeps(tmp_path):
    processes, _ = start_peers(tmp_path, "-1", "40")
    time.sleep(2.0)
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1.0)
    assert processes[1].wait(30) == 128 + signal.SIGTERM
    assert processes[0].wait(60) != 0
