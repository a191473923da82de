"""Signals that ask a run to stop: the run finishes its step and saves."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interruption:
    """A context in which the first SIGINT or SIGTERM is noted instead of obeyed; a second one is obeyed."""

    def __init__(self):
        """Start without a signal."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        """Install the handlers, if this is the main thread of a single process.

        Python allows handlers in the main thread only. Several processes use JAX's own notice of preemption instead.
        """
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: finishing the step and saving; a second one stops at once", flush=True)
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Return whether to stop after `step`; all processes get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None
