"""A process that stands still ends itself, and with it the others that wait for it.

`watch` sees a process that is gone. One that sleeps still answers there: its threads run, only its loop does not. So a
thread in each process measures the loop. The time since the last finished step may not pass

    max(`FLOOR_SECONDS`, `MULTIPLE` x the median time of the last steps)

The bound holds only between two finished steps. It is off before `MEASURED_STEPS` steps were measured, and from the
start of a named phase (compiling, evaluating, saving) until the next step is finished here: a step has
collectives, so it is finished only when all processes have left the phase. A process that compiles for longer than the
others ends nobody. The price: one that falls asleep within a phase, or in the first step after it, is not found.

A process that was stopped (Ctrl-Z, SIGSTOP) and goes on gets the whole time again: the thread sees that it slept.

A run of one process has no watchdog. Nobody waits for it, and a false alarm (a debugger, a slow disk) would cost it.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from deepseek_jax.parallel import watch

STUCK = 75  # exit code; EX_TEMPFAIL of sysexits.h: the same command may succeed
FLOOR_SECONDS = 300.0  # above every pause of a healthy step that is known: disks, garbage collection, a slow network
MULTIPLE = 20.0
MEASURED_STEPS = 3
WINDOW_STEPS = 100  # of the median


class Watchdog:
    """Measures the steps of a loop; a context in which a thread ends the process when one takes too long.

    Args:
        enabled: whether to start the thread; by default, if there are other processes.
        floor_seconds: the bound is at least this.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        floor_seconds: float = FLOOR_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Know no step yet."""
        self._enabled, self._floor, self._clock = enabled, floor_seconds, clock
        self._lock = threading.Lock()
        self._seconds: collections.deque[float] = collections.deque(maxlen=WINDOW_STEPS)
        self._step, self._since = -1, None
        self._phase = "step"
        self._looked = clock()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        """Start the thread."""
        if self._enabled or (self._enabled is None and watch.of_this_process() is not None):
            threading.Thread(target=self._keep_looking, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        """Stop the thread."""
        self._closed.set()

    def finished(self, step: int) -> None:
        """Note that the loop has finished `step`."""
        with self._lock:
            now = self._clock()
            if self._since is not None:
                self._seconds.append(now - self._since)
            self._step, self._since = step, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Turn the bound off until the first step that is finished after this context."""
        with self._lock:
            before, self._phase, self._since = self._phase, name, None
        try:
            yield
        finally:
            with self._lock:
                self._phase, self._since = before, None

    def look(self) -> str | None:
        """Return the line with which this process should end, or None; called about once a second."""
        with self._lock:
            now = self._clock()
            slept, self._looked = now - self._looked > 10 * watch.LOOK_SECONDS, now
            if self._since is None or len(self._seconds) < MEASURED_STEPS:
                return None
            if slept:
                self._since = now
            median = statistics.median(self._seconds)
            bound = max(self._floor, MULTIPLE * median)
            if now - self._since <= bound:
                return None
            return (
                f"no step was finished for {now - self._since:.0f} s after step {self._step} (phase: {self._phase};"
                f" bound {bound:.0f} s, median step {median:.3g} s)"
            )

    def _keep_looking(self) -> None:
        while not self._closed.wait(watch.LOOK_SECONDS):
            if (why := self.look()) is not None:
                bark(why)


def bark(why: str) -> None:
    """Print `why` and the stacks of all threads, tell the other processes, and end this one with `STUCK`."""
    watch.end_soon(STUCK)  # what follows may wait for a coordinator that is stuck, too
    others = watch.of_this_process()
    index = 0 if others is None else others.index
    print(f"\nprocess {index}: {why}; the stacks of all threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
    watch.tell_end(STUCK, why)
    if others is not None:
        time.sleep(watch.NOTICE_SECONDS)  # for the others to read the notice
    watch.end(STUCK)
