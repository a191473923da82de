"""Rewards in processes of their own, so that one that hangs, dies or raises cannot hang or end the loop.

`multiprocessing` would fork a program full of threads, or run its main module once more. So this file is both sides:
`RewardPool` starts it as a script, which imports neither JAX nor the caller's main module, and talks to it through a
socket. A reward therefore is a function of a module, or an instance of a class of one: something that `pickle` knows by
name. A process ends when its socket closes, and whatever it started in sandboxes ends with it.

A reward fails if it raises, returns NaN, an infinity or no number, kills its process, or takes longer than `seconds`.
What then happens is a setting: "stop" raises `RewardError`, which names the reward, the problem and the beginning of
the text; "zero" logs that and counts 0. A wrong answer is no failure: it is a reward of 0.
"""

import contextlib
import logging
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from deepseek_jax.posttraining.rewards.problem import Problem, Reward, Score

SECONDS_TO_START = 60.0  # to import the rewards, on a busy machine
SHOWN_CHARACTERS = 200  # of a text, in messages
POLICIES = ("stop", "zero")

log = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward failed: raised, was no finite number, died, or took too long."""


class RewardPool(contextlib.AbstractContextManager):
    """Scores of completions by several rewards, in `num_workers` processes; 0 calls them here, without a time limit."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        num_workers: int = 1,
        seconds: float = 30.0,
        on_failure: str = "stop",
    ):
        """Take rewards by name, with weights of 1 if none are given; `seconds` is the limit of one reward of one text.

        Raises:
            ValueError: no reward, weights of other names or that are not finite, an unknown policy, a number below 0,
                or a reward that cannot be sent to a process.
        """
        self._rewards = dict(rewards)
        self._weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if not rewards:
            raise ValueError("no rewards: name at least one")
        if self._weights.keys() != self._rewards.keys():
            raise ValueError(f"weights are for {sorted(self._weights)}, rewards are {sorted(rewards)}: the same names")
        if not all(math.isfinite(weight) for weight in self._weights.values()):
            raise ValueError(f"weights are {self._weights}: finite numbers")
        if on_failure not in POLICIES:
            raise ValueError(f"on_failure is {on_failure!r}: one of {POLICIES}")
        if num_workers < 0 or not 0 < seconds < math.inf:
            raise ValueError(f"num_workers is {num_workers} and seconds {seconds}: at least 0, and above 0")
        try:
            pickled = pickle.dumps(self._rewards)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"a reward cannot be sent to a process: {error}. Make it a module's function") from error
        self._seconds, self._on_failure = seconds, on_failure
        self._workers: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._all = [_Worker(pickled) for _ in range(num_workers)]
        for worker in self._all or [None]:
            self._workers.put(worker)
        self._threads = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="reward")

    def __exit__(self, *error) -> None:
        """End the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown()

    def submit(self, problem: Problem, text: str) -> Future[Score]:
        """Score one completion while the caller goes on."""
        return self._threads.submit(self._score, problem, text)

    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Score]:
        """Return the scores of completions, in their order.

        Raises:
            ValueError: not as many problems as texts.
            RewardError: a reward failed and the policy is "stop".
        """
        if len(problems) != len(texts):
            raise ValueError(f"{len(problems)} problems and {len(texts)} texts: as many of both")
        futures = [self.submit(problem, text) for problem, text in zip(problems, texts, strict=True)]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _score(self, problem: Problem, text: str) -> Score:
        worker = self._workers.get()
        try:
            parts, failed = {}, []
            for name in self._rewards:
                value, failure = self._part(worker, name, problem, text)
                if failure:
                    what = f"reward {name!r} of problem {problem.name!r} {failure}; text: {text[:SHOWN_CHARACTERS]!r}"
                    if self._on_failure == "stop":
                        raise RewardError(what)
                    log.warning("%s; counted as 0", what)
                    failed.append(name)
                parts[name] = value
            total = math.fsum(self._weights[name] * value for name, value in parts.items())
            return Score(total, parts, tuple(failed))
        finally:
            self._workers.put(worker)

    def _part(self, worker: "_Worker | None", name: str, problem: Problem, text: str) -> tuple[float, str | None]:
        """Return a reward, and what failed, if anything did."""
        if worker is None:
            value, failure = call(self._rewards[name], problem, text)
        else:
            value, failure = worker.call((name, problem, text), self._seconds)
        if failure is None and not math.isfinite(value):
            failure = f"returned {value}"
        return (0.0, failure) if failure else (value, None)


def call(reward: Reward, problem: Problem, text: str) -> tuple[float, str | None]:
    """Return the reward as a float, and what it raised, if it did, as words."""
    try:
        value = reward(problem, text)
        if isinstance(value, str | bytes):
            raise TypeError(f"a reward is a number, not {value!r:.50}")
        return float(value), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        return 0.0, f"raised {type(error).__name__}: {str(error)[:SHOWN_CHARACTERS]}"


class _Worker:
    """This side of one process, which is started again after it was killed."""

    def __init__(self, pickled: bytes):
        self._pickled = pickled
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._ended = False
        self._lock = threading.Lock()  # between a start and the end

    def call(self, message: tuple[str, Problem, str], seconds: float) -> tuple[float, str | None]:
        late = threading.Event()
        try:
            connection = self._connection or self._start()
            self._send(connection, pickle.dumps(message), seconds, late)
            if connection.poll(seconds):
                return pickle.loads(connection.recv_bytes())
            late.set()
        except (EOFError, OSError) as error:
            if not late.is_set():
                return 0.0, f"ended its process ({error or 'no answer'}; status {self._kill()})"
        self._kill()
        return 0.0, f"took longer than {seconds} s"

    def _start(self) -> Connection:
        ours: Any
        theirs: Any
        ours, theirs = Pipe()
        with theirs, self._lock:
            if self._ended:
                raise EOFError("the pool is closed")
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the program decides what Ctrl-C means
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            )
        self._connection = ours
        self._send(ours, self._pickled, SECONDS_TO_START, threading.Event())
        if not ours.poll(SECONDS_TO_START):
            raise EOFError("did not start")
        ours.recv_bytes()
        return ours

    def _send(self, connection: Connection, message: bytes, seconds: float, late: threading.Event) -> None:
        """Send what may be more than the socket holds; for a process that does not read it in time `late` is set, and
        it is killed.
        """
        process = self._process
        assert process is not None
        watchdog = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        watchdog.start()
        try:
            connection.send_bytes(message)
        finally:
            watchdog.cancel()

    def _kill(self) -> int | None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        process.kill()
        return process.wait()

    def end(self) -> None:
        """Kill the process for good; a thread that waits for it gets an end of file."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()


def _messages(connection: Connection) -> Iterator[tuple[str, Problem, str]]:
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pickle.loads(connection.recv_bytes())


def main() -> None:
    """Answer the calls of a pool until it closes its end."""
    connection = Connection(int(sys.argv[1]))
    rewards = pickle.loads(connection.recv_bytes())
    connection.send_bytes(b"ready")
    for name, problem, text in _messages(connection):
        connection.send_bytes(pickle.dumps(call(rewards[name], problem, text)))


if __name__ == "__main__":
    main()
