"""Signals that ask a program to stop: Ctrl-C (SIGINT), SIGTERM, and SIGUSR1 and SIGHUP, which schedulers and closed
terminals send.

    in the training loop   `Interruption`: the step is finished and saved; of several processes all stop after the same
                           step (`parallel.watch`)
    before and after it    `Abort`: there is nothing to save, so the program ends

A second signal ends the process at once: a checkpoint that is being written is complete or not there. The exit code is
128 + the number of the signal. SIGHUP stays ignored where it was when the program started, as under nohup.

Python runs a handler between two bytecodes of the main thread. The main thread may be in C++ for minutes, where it
compiles or waits for a device. So a thread is told of each signal through a pipe (`signal.set_wakeup_fd`): it answers,
and obeys the second signal, whatever the main thread does.
"""

import os
import signal
import sys
import threading
from typing import Any, Self

import jax

from deepseek_jax.parallel import watch

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

UNUSABLE, FAILED = 2, 1  # exit codes: input that cannot be used, and a run that failed


class Interrupted(KeyboardInterrupt):
    """A signal came where there is nothing to save."""

    def __init__(self, number: int):
        """Keep the number of the signal."""
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class _Handlers:
    """A context in which the first signal is answered and the second ends the process.

    Python allows handlers in the main thread only; in other threads the context does nothing.
    """

    def __init__(self):
        """Start without a signal."""
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = {
            number: signal.signal(number, self._on_main_thread)
            for number in STOPPING
            if not (number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN)
        }
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> bool | None:
        """Put the former handlers back."""
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        self._before = {}
        os.write(self._writer, b"\0")  # which is no signal
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def _on_main_thread(self, number: int, _) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        answered = False
        while number := os.read(reader, 1)[0]:
            if number not in STOPPING:
                continue
            if answered:
                print(f"\n{signal.Signals(number).name}: stopped at once", file=sys.stderr)
                watch.end(128 + number)
            answered = True
            self._answer(signal.Signals(number))

    def _answer(self, number: signal.Signals) -> None:
        raise NotImplementedError


class Interruption(_Handlers):
    """A context in which a signal asks the training loop to stop."""

    def requested(self, step: int) -> bool:
        """Return whether to stop after `step`; all processes get the same answer."""
        if (others := watch.of_this_process()) is not None:
            self.signal = others.requested(step)
        return self.signal is not None

    def _answer(self, number: signal.Signals) -> None:
        if jax.process_index() == 0:
            print(f"\n{number.name}: finishing the step and saving; a second one stops at once", flush=True)
        if (others := watch.of_this_process()) is not None:
            others.ask_to_stop(number)


class Abort(_Handlers):
    """A context in which a signal ends the program with a line: `Interrupted` is raised in the main thread.

    If the main thread does not come to it in time, because it is in C++ or waits for something, the process is ended.
    An error ends it soon, too, and the other processes of the run: threads of libraries may wait for minutes.
    """

    def __init__(self, consequence: str):
        """Start without a signal; the line says `consequence`."""
        super().__init__()
        self._consequence = consequence

    def __enter__(self) -> Self:
        """Install the handlers."""
        self._unraisablehook = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        return super().__enter__()

    def means(self, consequence: str) -> None:
        """Say this from now on."""
        self._consequence = consequence

    def __exit__(self, kind, error, trace) -> None:
        """Put the former handlers back; end the program if a signal asked for it or an error passes."""
        super().__exit__(kind, error, trace)
        sys.unraisablehook = self._unraisablehook
        if isinstance(error, Interrupted):
            sys.exit(128 + error.signal)
        if isinstance(error, Exception):
            code = UNUSABLE if isinstance(error, ValueError | NotImplementedError) else FAILED
            watch.fail(code, next(iter(str(error).splitlines()), kind.__name__))

    def _on_main_thread(self, number: int, _) -> None:
        raise Interrupted(number)

    def _on_unraisable(self, unraisable: Any) -> None:
        """End the process if the signal came in a callback of the garbage collector, which swallows exceptions."""
        if isinstance(unraisable.exc_value, Interrupted):
            watch.end(128 + unraisable.exc_value.signal)
        self._unraisablehook(unraisable)

    def _answer(self, number: signal.Signals) -> None:
        print(f"\n{number.name}: {self._consequence}", file=sys.stderr, flush=True)
        watch.end_soon(128 + number)
        watch.tell_end(128 + number, f"{number.name}: {self._consequence}")
