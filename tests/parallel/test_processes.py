"""What the processes of a run tell each other, over a store in memory: one stop for all, one end for all."""

import signal
import socket
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from deepseek_jax.parallel import processes
from deepseek_jax.parallel.watch import BEAT_SECONDS, SILENT_SECONDS, ProcessError, Watch
from tests.support.patience import SECONDS


class Store:
    """The coordinator's key-value store and barrier, for threads in one process."""

    def __init__(self, count: int):
        self.values: dict[str, str] = {}
        self.barrier = threading.Barrier(count)

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.copy().items() if key.startswith(folder)]

    def wait_at_barrier(self, name, milliseconds):
        self.barrier.wait(milliseconds / 1000)


def steps_of_runs(count: int, ask_at: int, number: signal.Signals) -> list[tuple[int, signal.Signals]]:
    """Run loops that hold each other within a step, as collectives do; process 1 is asked to stop at a step.

    Returns the step after which each stopped, and why.
    """
    store = Store(count)
    watches = [Watch(store, index) for index in range(count)]
    together, done, stopped = threading.Barrier(count), threading.Event(), [None] * count

    def loop(index):
        step = 0
        while (why := watches[index].requested(step)) is None:
            if index == 1 and step == ask_at:
                watches[1].ask_to_stop(number)
            together.wait(SECONDS)  # a collective
            time.sleep(0.002)
            step += 1
        stopped[index] = (step, why)

    def look(index):
        time.sleep(0.003 * index)
        while not done.is_set():
            watches[index].look(0.0)
            time.sleep(0.002)

    loops = [threading.Thread(target=loop, args=(index,)) for index in range(count)]
    lookers = [threading.Thread(target=look, args=(index,)) for index in range(count)]
    for thread in (*lookers, *loops):
        thread.start()
    for thread in loops:
        thread.join(SECONDS)
    done.set()
    for thread in lookers:
        thread.join(SECONDS)
    return stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_all_processes_after_the_same_step(number):
    stopped = steps_of_runs(4, 5, number)
    assert len(set(stopped)) == 1
    step, why = stopped[0]
    assert step > 5 and why is number


def test_the_end_of_one_process_is_the_end_of_all_with_its_reason():
    store = Store(2)
    first, second = Watch(store, 0), Watch(store, 1)
    assert first.look(0.0) is None
    second.tell_end(2, "data.sources = (): name a source")
    assert first.look(1.0) == (2, "data.sources = (): name a source")


def test_a_killed_process_is_named_after_its_silence():
    store = Store(3)
    watches = [Watch(store, index) for index in range(3)]
    for watch in watches:
        assert watch.look(0.0) is None
    now = 0.0
    while now < SILENT_SECONDS:  # process 2 does not look any more
        now += BEAT_SECONDS
        assert watches[1].look(now) is None
        assert watches[0].look(now) is None
    code, why = watches[0].look(now + 2 * BEAT_SECONDS)
    assert code == 1 and why.startswith("process 2 has not answered for 30 s")
    assert watches[1].look(now + 2 * BEAT_SECONDS) == (1, why)


def test_a_killed_process_0_is_named_by_the_others():
    store = Store(2)
    watches = [Watch(store, index) for index in range(2)]
    for watch in watches:
        assert watch.look(0.0) is None
    now = 0.0
    while now < SILENT_SECONDS:
        now += BEAT_SECONDS
        assert watches[1].look(now) is None
    code, why = watches[1].look(now + 2 * BEAT_SECONDS)
    assert code == 1 and why.startswith("process 0 has not answered for 30 s")


def test_jax_gets_the_cluster_that_it_finds_and_an_address_for_its_own_service(monkeypatch):
    for name, value in {"JOB_ID": "7", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    served, joined = [], []
    monkeypatch.setattr(processes.service, "start", lambda *arguments: served.append(arguments) or True)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *arguments, **options: joined.append((arguments, options))
    )
    processes.join(None, None, None, 30)
    ((address, count, _),) = served
    assert (address, count) == ("localhost:61447", 2)
    ((given, options),) = joined
    assert given == (address, 2, 0) and options["coordinator_bind_address"] == "127.0.0.1:0"


def test_a_coordinator_that_nobody_runs_is_named_within_the_time(monkeypatch):
    with socket.socket() as free, monkeypatch.context() as patch:
        free.bind(("localhost", 0))
        port, slept = free.getsockname()[1], []
        clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
        patch.setattr(processes, "time", clock)
        with pytest.raises(ProcessError, match=f"localhost:{port} was not reached within 0.5 s .Connection refused"):
            processes.join(f"localhost:{port}", 2, 1, 0.5)
        assert sum(slept) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ProcessError, match=r"nowhere\.invalid:1234 was not reached"):
        processes.join("nowhere.invalid:1234", 2, 1, 0.2)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        with pytest.raises(ProcessError, match="cannot listen at port .*choose another port"):
            processes.join(f"localhost:{taken.getsockname()[1]}", 2, 0, 0.2)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", "localhost:"), ("127.0.0.1", "127.0.0.1:"), ("[::1]", "[::1]:"), ("10.0.0.1", "[::]:")],
)
def test_a_coordinator_of_this_machine_listens_to_this_machine_only(host, expected):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    try:
        assert processes._bind_address(host, port, 0.0) == f"{expected}{port}"
    except ProcessError as error:
        assert host == "[::1]", error  # a machine without IPv6


def test_without_a_cluster_the_remedy_is_named(monkeypatch):
    def none_found(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", none_found)
    monkeypatch.setattr(processes.watch, "end", lambda code: pytest.fail(f"ended with {code}"))
    with pytest.raises(ValueError, match="no cluster was found .* give --coordinator=host:port, --num_processes"):
        processes.join(None, None, None, 30.0)


def test_processes_that_do_not_meet_are_told_by_the_command(monkeypatch, capsys):
    codes, joined = [], threading.Event()
    monkeypatch.setattr(processes.watch, "end", codes.append)
    monkeypatch.setattr(processes.sys, "argv", ["/somewhere/train.py"])
    monkeypatch.setattr(processes.sys.modules["__main__"], "__spec__", None)
    processes._end_late(joined, "10.0.0.1:1234", 2, 0.0)
    assert codes == [1]
    assert capsys.readouterr().err.startswith("train.py: all 2 processes did not meet at 10.0.0.1:1234 within 0 s: ")
