"""One process of several is lost: the others end, with a message and an exit code. Real processes, one loop.

With `-s` each case prints its row of the table in docs/stopping.md.
"""

import signal
import time

import pytest

from deepseek_jax.parallel.watchdog import STUCK
from tests.support.patience import SECONDS
from tests.training.runs import (
    DEADLINE,
    finish,
    free_port,
    metrics_without_times,
    start,
    start_peers,
    wait_for,
    write_corpus,
)

BOUND = 3.0  # seconds, of the watchdog
KILLED, STOPPED = -signal.SIGKILL, None  # None: it stays until the test lets it go on

# (what happens, number of processes, to which of them, its exit code, that of the others, what the others say).
# How long they take was seen on two cores: docs/stopping.md.
CASES = [
    ("killed", 2, 1, KILLED, 1, "another process of this run is gone"),
    ("killed", 2, 0, KILLED, 1, "another process of this run is gone"),
    ("stopped", 2, 1, STOPPED, STUCK, "no step was finished for"),
    ("asleep", 2, 1, STUCK, STUCK, "no step was finished for"),
    ("asleep", 4, 3, STUCK, STUCK, "no step was finished for"),
    ("error", 2, 1, 2, 2, "process 1: one process has a problem"),
    ("broken disk", 2, 1, 1, 1, "process 1: [Errno 5] Input/output error"),
    ("out of memory", 2, 1, 1, 1, "process 1: RESOURCE_EXHAUSTED"),
]


@pytest.fixture
def peers(tmp_path):
    """Start processes of `tests.training.peers`; none is left after the test."""
    started = []

    def start(count, *options):
        processes, logs = start_peers(tmp_path, count, *options)
        started.extend(processes)
        return processes, logs

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count", "index", "own", "code", "said"), CASES)
def test_the_others_end(peers, kind, count, index, own, code, said):
    from_outside = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
    happens = [] if kind in from_outside else [f"--happens={kind}"]
    processes, logs = peers(count, f"--bound={BOUND}", *happens)
    if kind in from_outside:
        processes[index].send_signal(from_outside[kind])
    else:
        wait_for("now\n", logs[index], processes)
    start = time.monotonic()
    others = [process for process in processes if process is not processes[index]]
    assert [process.wait(SECONDS) for process in others] == [code] * (count - 1)
    took = time.monotonic() - start
    message = next(line for line in logs[index == 0].read_text().splitlines() if said in line)
    print(f"\n| {kind}, process {index} of {count} | {took:.1f} s | {code} | {message} |")
    if own is STOPPED:
        processes[index].send_signal(signal.SIGCONT)
        assert processes[index].wait(SECONDS) != 0
    else:
        assert processes[index].wait(SECONDS) == own
    for position, log in enumerate(logs):
        assert position == index or said in log.read_text()
        assert "Check failure stack trace" not in log.read_text()
    assert kind != "asleep" or "in fall_asleep" in logs[index].read_text()


@pytest.mark.slow
def test_a_process_that_compiles_longer_than_the_bound_ends_nobody(peers):
    processes, logs = peers(2, f"--bound={BOUND}", "--happens=compiles longer")
    start = time.monotonic()
    wait_for("at step 80\n", logs[1], processes)
    assert time.monotonic() - start > 2 * BOUND
    assert_a_signal_stops_all_after_the_same_step(processes, logs, signal.SIGINT, 1)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(peers):
    assert_a_signal_stops_all_after_the_same_step(*peers(2), signal.SIGTERM, 0)


@pytest.mark.slow
def test_processes_of_slurm_find_each_other_and_stop_before_the_time_limit(peers):
    """SLURM sends the signal to all processes: each has its first, and only a second would stop at once."""
    processes, logs = peers(2, "--distributed")
    assert_a_signal_stops_all_after_the_same_step(processes, logs, signal.SIGUSR1, 0, 1)


def assert_a_signal_stops_all_after_the_same_step(processes, logs, number, *indices):
    for index in indices:
        processes[index].send_signal(number)
    assert [process.wait(SECONDS) for process in processes] == [128 + number] * len(processes)
    first, *rest = [log.read_text().rpartition("stopped after step ")[2].strip() for log in logs]
    assert rest == [first] * len(rest) and int(first) > 10


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_sleeps(peers):
    processes, logs = peers(2, "--happens=asleep")
    wait_for("now\n", logs[1], processes)
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1.0)
    assert processes[1].wait(SECONDS) == 128 + signal.SIGTERM
    assert processes[0].wait(SECONDS) != 0


@pytest.mark.slow
def test_a_run_that_lost_a_process_continues_as_if_nothing_had_happened(tmp_path):
    """Process 0 is killed, which has the coordinator, the workdir's lock and the log; the same commands again."""
    corpus, logs = write_corpus(tmp_path / "corpus"), [tmp_path / "log0", tmp_path / "log1"]
    # process 1 compiles each time (`parallel.mesh.connect`): one layer of experts, no MTP
    model = ["--config.model.num_layers=1", "--config.model.num_dense_layers=0", "--config.model.num_mtp_layers=0"]
    training = ["--config.training.eval_every=0", f"--config.training.num_tokens={30 * 8 * 32}"]

    def start_two(workdir, port):
        options = [f"--config=tests/training/nano.py:{corpus}", f"--workdir={workdir}", "--config.mesh.data=2"]
        together = ["--cpu_devices=1", f"--coordinator=localhost:{port}", "--num_processes=2"]
        return [
            start(["-m", "experiments.train", *options, *model, *training, *together, f"--process_id={index}"], log)
            for index, log in enumerate(logs)
        ]

    whole, cut, port = tmp_path / "whole", tmp_path / "cut", free_port()
    for process, log in zip(start_two(whole, free_port()), logs, strict=True):
        finish(process, log)
    first, second = start_two(cut, port)
    deadline = time.monotonic() + DEADLINE
    while not (cut / "checkpoints" / "5").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.kill()
    assert first.wait(SECONDS) == KILLED and second.wait(SECONDS) == 1
    for process, log in zip(start_two(cut, port), logs, strict=True):
        finish(process, log)
    assert "continues after step" in logs[0].read_text()
    assert metrics_without_times(cut) == metrics_without_times(whole)
