"""What the processes of a run tell each other: they stop after the same step, and one's end ends all.

JAX's coordinator, a service beside process 0 (`coordinator`), connects them. What JAX does when something goes wrong is
to wait for minutes and then to abort in C++ with a stack of 90 lines. So beside it a thread in each process, the watch,
looks once a second at a few keys of the coordinator's key-value store:

    notice/stop      a process was asked to stop, by a signal. Each watch then writes down the last step that its loop
                     has asked about; all meet at a barrier; all stop after the largest of these steps, plus one. No
                     process is further than that, because steps have collectives, and none of the watches waits for a
                     loop. (JAX has the same protocol, for SIGTERM only and without a second signal.)
    notice/end       a process ends with an exit code and a line that says why: all others print it and end
    first/0, beat/1  count up, one for each process. Process 0 reads those of the others, and they read that of
                     process 0; one that stands still belongs to a process that was killed

What this cannot do: if the coordinator is killed too, with the machine or the container of process 0, JAX's C++ ends
the others at once, with its stack and exit code 134 (it has a callback for this case, which no function of Python can
be: its argument has no type there). A process that is stopped (SIGSTOP) for `SILENT_SECONDS` counts as killed.
"""

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from absl import logging

SILENT_SECONDS = 30.0
LOOK_SECONDS = 1.0
BEAT_SECONDS = 5.0
GRACE_SECONDS = 5.0  # for a process to end by itself, before a thread ends it
NOTICE_SECONDS = 2.0  # within which every process has read a notice, and ended if it says so
COLLECTIVE_ERRORS = re.compile("Gloo|NCCL|UNAVAILABLE|coordination service", re.IGNORECASE)
KEYS = "deepseek_jax"


class ProcessError(RuntimeError):
    """The processes of a run did not find each other, or lost one."""


def end_soon(code: int) -> None:
    """End this process with `code` in `GRACE_SECONDS` if it still runs then, whatever its other threads wait for.

    Threads of libraries, and the farewell of several processes, may wait for minutes after an error.
    """

    def wait():
        time.sleep(GRACE_SECONDS)
        end(code)

    threading.Thread(target=wait, name="end soon", daemon=True).start()


def end(code: int) -> NoReturn:
    """End this process now, without waiting for its threads or for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its disk is full
            stream.flush()
    os._exit(code)


class Watch:
    """What one process knows of the others; `look` is called by its thread, the rest by the loop.

    Args:
        client: the key-value store: `key_value_set`, `key_value_dir_get`, `wait_at_barrier`, as JAX's client has them.
        index: of this process.
    """

    def __init__(self, client: Any, index: int):
        """Know nothing yet."""
        self._client, self.index = client, index
        self._lock = threading.Lock()  # held while the processes agree: a loop that asks waits for the answer
        self._step = -1  # the last that the loop asked about
        self._last: int | None = None  # the step to stop after
        self._signal: signal.Signals | None = None
        self._ends = False
        self._beats: dict[str, tuple[str, float]] = {}  # what each process wrote, and when it was first seen here
        self._next_beat, self._beat = 0.0, 0

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Ask all processes to stop after the same step."""
        self._client.key_value_set(f"{KEYS}/notice/stop", str(int(number)), allow_overwrite=True)

    def requested(self, step: int) -> signal.Signals | None:
        """Return the signal for which all processes stop after `step`, or None."""
        with self._lock:
            self._step = step
            return self._signal if self._last is not None and step >= self._last else None

    def tell_end(self, code: int, why: str) -> None:
        """Tell the other processes that this one ends."""
        self._ends = True
        self._client.key_value_set(f"{KEYS}/notice/end", f"{code} {why}", allow_overwrite=True)

    def look(self, now: float) -> tuple[int, str] | None:
        """Look at the keys once; return the exit code and the line with which this process should end, or None."""
        notices = dict(self._client.key_value_dir_get(f"{KEYS}/notice/"))
        if (end := notices.get(f"{KEYS}/notice/end")) is not None and not self._ends:
            code, _, why = end.partition(" ")
            return int(code), why
        if (number := notices.get(f"{KEYS}/notice/stop")) is not None and self._last is None:
            self._agree(signal.Signals(int(number)))
        if now >= self._next_beat:
            self._next_beat, self._beat = now + BEAT_SECONDS, self._beat + 1
            own, others = ("beat", "first") if self.index else ("first", "beat")
            self._client.key_value_set(f"{KEYS}/{own}/{self.index}", str(self._beat), allow_overwrite=True)
            if silent := self._silent(others, now):
                why = f"process {', '.join(silent)} has not answered for {SILENT_SECONDS:g} s: killed, or cut off"
                self.tell_end(1, why)
                return 1, why
        return None

    def _agree(self, number: signal.Signals) -> None:
        with self._lock:
            self._client.key_value_set(f"{KEYS}/step/{self.index}", str(self._step), allow_overwrite=True)
            self._client.wait_at_barrier(f"{KEYS}/agree", int(SILENT_SECONDS * 1000))
            steps = [int(step) for _, step in self._client.key_value_dir_get(f"{KEYS}/step/")]
            self._last, self._signal = max(steps) + 1, number

    def _silent(self, folder: str, now: float) -> list[str]:
        """Return the processes whose beat in `folder` stands still."""
        for key, beat in self._client.key_value_dir_get(f"{KEYS}/{folder}/"):
            if self._beats.get(key, ("", 0.0))[0] != beat:
                self._beats[key] = (beat, now)
        return [key.rpartition("/")[2] for key, (_, since) in self._beats.items() if now - since > SILENT_SECONDS]


_watch: Watch | None = None
_over = threading.Event()  # this process has said farewell to the others


def of_this_process() -> Watch | None:
    """Return this process's watch, or None if it is the only one."""
    return _watch


def start() -> None:
    """Start the watch of this process, if there are others."""
    global _watch
    from jax._src import distributed  # JAX shows its client nowhere else

    state = distributed.global_state  # not `jax.process_count()`, which starts the devices
    if state.client is not None and state.num_processes > 1:
        _watch = Watch(state.client, state.process_id)
        thread = threading.Thread(target=_keep_looking, args=(_watch,), name="watch", daemon=True)
        thread.start()
        atexit.register(_say_farewell, thread)


def _say_farewell(thread: threading.Thread) -> None:
    """Wait for the others, as JAX does at exit, then end the watch: a thread in C++ aborts a Python that ends (134)."""
    try:
        jax.distributed.shutdown()
    finally:
        _over.set()
        thread.join(GRACE_SECONDS)


def _keep_looking(watched: Watch) -> None:
    while not _over.is_set():
        grace = LOOK_SECONDS
        try:
            ending = watched.look(time.monotonic())
        except Exception as error:  # what the client raises when the coordinator is gone, or when the run is over
            ending, grace = (1, f"the coordinator does not answer ({_first_line(error)})"), GRACE_SECONDS
        if ending is not None:
            if _over.wait(grace):  # a process that ends by itself does so now
                return
            print(f"\nthis process ends with the others: {ending[1]}", file=sys.stderr)
            end(ending[0])
        _over.wait(LOOK_SECONDS)


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Say in a line what an error of a collective means. If a process has said why it ends, this one ends with that.

    Raises:
        ProcessError: a collective with other processes failed.
    """
    try:
        yield
    except Exception as error:
        if _watch is None or not COLLECTIVE_ERRORS.search(str(error)):
            raise
        time.sleep(LOOK_SECONDS + NOTICE_SECONDS)  # the watch reads the notice, if there is one
        end_soon(1)  # what is left to close may wait for the lost process
        raise ProcessError(
            f"another process of this run is gone ({_first_line(error)}): look at its log; the same commands continue"
            " from the last checkpoint"
        ) from error


def fail(code: int, why: str) -> None:
    """Prepare the end of this process after an error: soon, with `code`, and known to the others.

    The usual end of JAX waits for the others, who would not know.
    """
    end_soon(code)
    if _watch is not None:
        tell_end(code, why)
        atexit.register(_leave, code)  # before JAX's farewell, which was registered earlier


def _leave(code: int) -> None:
    if _watch is not None and _watch.index == 0:
        time.sleep(NOTICE_SECONDS)  # without a coordinator beside it the notice goes with this process
    end(code)


def tell_end(code: int, why: str) -> None:
    """Tell the other processes, if there are any, that this one ends with `code`; they say which it was."""
    if _watch is not None:
        try:
            _watch.tell_end(code, f"process {_watch.index}: {why}")
        except Exception as error:  # the coordinator may be what failed
            logging.warning("the other processes could not be told: %s", _first_line(error))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
