"""A sandbox as its owner sees it: code goes in, plain values come out, and nothing is left.

The owner (the judge) keeps the expected answers; the process that runs foreign code gets the code and the arguments.
Every message carries a random token of its call, so text that was printed or written before cannot be an answer. An
answer is bounded in bytes, read with a deadline, and JSON (`values`): no pickle, no object.

What is enforced, and by what:

    processes, threads    none beside its own (RLIMIT_NPROC in a user namespace of its own; execve refused)
    time                  wall clock by the owner, who kills the process namespace; CPU by RLIMIT_CPU
    memory                RLIMIT_AS; kinds that it does not count are refused (`system_calls`)
    files                 one empty folder in memory, of a few MiB; libraries read only; nothing else is there
    network               a network namespace without devices; `socket` refused
    other processes       a process namespace of its own, no ptrace, no privileges, no /proc
    output                /dev/null; answers of at most `answer_bytes`

What is not: the caches of the CPU and the time of a core are shared with the rest of the machine, and a hole in the
kernel is a hole in the sandbox. It needs Linux 5.14 on x86_64 or aarch64, with user namespaces for ordinary users or
CAP_SYS_ADMIN for root. Where these are missing `Sandbox` raises `SandboxError`; there is no weaker mode. macOS has no
equal of them: rewards that run code are refused there, all others work.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deepseek_jax.posttraining.rewards.sandbox.system_calls import ARCHITECTURES

INSIDE = Path(__file__).with_name("inside.py")
LOADER = ("LD_LIBRARY_PATH",)  # all that the process gets of the environment: some Pythons do not start without it
SECONDS_TO_START = 30.0  # of our own code, on a busy machine
SECONDS_TO_END = 10.0  # after SIGKILL
REMEDY = (
    "Code of a model runs only behind Linux namespaces (5.14 or newer, x86_64 or aarch64). As an ordinary user they "
    "need user.max_user_namespaces > 0 (and on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0), as root "
    "CAP_SYS_ADMIN; a container must permit unshare and mount. Without them leave out the rewards that run code."
)


class SandboxError(RuntimeError):
    """This machine cannot run a sandbox: no fault of the code in it."""


class Refused(Exception):
    """The sandbox ended, or had to be ended, and no further call is possible: time, death, too much or false output."""


class Raised(Exception):
    """The code raised, or returned what is no plain value; further calls are possible. The message is a type's name."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the code in a sandbox may use. Bytes of memory are of its address space; Python itself has about 30 MB."""

    seconds: float = 4.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 4 << 20
    answer_bytes: int = 1 << 20
    open_files: int = 32

    def __post_init__(self):
        """Refuse limits under which no code could run."""
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds is {self.seconds}: a time above 0 and at most 3600")
        least = {"memory_bytes": 64 << 20, "disk_bytes": 1 << 16, "answer_bytes": 1 << 10, "open_files": 8}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {value}")

    def resources(self) -> dict[str, int]:
        """Return the limits by their names in `resource`."""
        return {
            "CPU": math.ceil(self.seconds) + 1,
            "AS": self.memory_bytes,
            "FSIZE": self.disk_bytes,
            "NOFILE": self.open_files,
            "NPROC": 1,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
            "SIGPENDING": 64,
        }


class Sandbox:
    """One process behind walls, as a context; it and all that it started are dead at the end of the context."""

    def __init__(self, limits: Limits | None = None):
        """Start it; foreign code runs from the first call on, within `limits.seconds` for all calls together.

        The clock runs only while a call waits for its answer.

        Raises:
            SandboxError: this machine cannot; the message says what is missing.
        """
        if sys.platform != "linux" or platform.machine() not in ARCHITECTURES or not hasattr(os, "unshare"):
            raise SandboxError(f"no sandbox on {sys.platform}, {platform.machine()}. {REMEDY}")
        self._limits = limits or Limits()
        self._unread = b""
        self._closed = False
        self._pidfd: int | None = None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._answers, self._requests = ours_in, ours_out
        os.set_blocking(ours_out, False)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *("-I", "-S", "-B"),
                    INSIDE,
                    *map(str, (theirs_in, theirs_out, self._limits.disk_bytes)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs_in, theirs_out),
                cwd="/",
                env={name: os.environ[name] for name in LOADER if name in os.environ},
                start_new_session=True,
            )
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._left = SECONDS_TO_START
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self._left = self._limits.seconds

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _start(self) -> None:
        try:
            message = self._receive(time.monotonic() + self._left)
            if "pid" in message:
                # The launcher waits for this process, which waits for our next message: the number is not reused yet.
                self._pidfd = os.pidfd_open(message["pid"])
                message = self._exchange({"limits": self._limits.resources()})
        except (Refused, OSError) as error:
            raise SandboxError(f"a sandbox did not start: {error}. {REMEDY}") from error
        if "refused" in message:
            raise SandboxError(f"a sandbox is not permitted here: {message['refused']}. {REMEDY}")

    def load(self, source: str) -> None:
        """Run a module's source. Raises `Raised` or `Refused`."""
        self._value(self._exchange({"source": source}))

    def call(self, function: str, arguments: list, named: dict[str, Any] | None = None) -> Any:
        """Call a function of the module with encoded arguments (`values`), and return its value encoded.

        Raises:
            Raised: it raised, or returned no plain value.
            Refused: the sandbox is at its end.
        """
        return self._value(self._exchange({"call": [function, arguments, named or {}]}))

    def test(self, script: str, function: str, other: "Sandbox") -> int:
        """Run a script of tests, whose calls of `candidate` or `function` go to `other`; return how many there were.

        Raises:
            Raised: the script did, that is, a test failed.
            Refused: this sandbox, or the other, is at its end.
        """
        message = self._exchange({"script": script, "function": function})
        num_calls = 0
        while "call" in message:
            num_calls += 1
            try:
                called, arguments, named = message["call"]
                reply = {"value": other.call(called, arguments, named)}
            except Raised as error:
                reply = {"error": str(error)}
            message = self._exchange(reply)
        self._value(message)
        return num_calls

    def _value(self, message: dict) -> Any:
        if "error" in message:
            raise Raised(str(message["error"])[:100])
        return message.get("value")

    def _exchange(self, message: dict) -> dict:
        """Send a message with a new token, and return the answer that has the same."""
        token = secrets.token_hex(16)
        deadline = time.monotonic() + self._left
        try:
            self._send(json.dumps({"token": token, **message}).encode() + b"\n", deadline)
            answer = self._receive(deadline)
        finally:
            self._left = deadline - time.monotonic()
        if answer.get("token") != token:
            raise Refused("an answer without the token of its call")
        return answer

    def _send(self, line: bytes, deadline: float) -> None:
        while line:
            self._wait(self._requests, select.POLLOUT, deadline)
            try:
                line = line[os.write(self._requests, line) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Refused("the process ended") from error

    def _receive(self, deadline: float) -> dict:
        """Return the next message. Raises `Refused` for anything that is none."""
        while b"\n" not in self._unread:
            self._wait(self._answers, select.POLLIN, deadline)
            more = os.read(self._answers, 1 << 16)
            self._unread += more
            if not more:
                raise Refused("the process ended")
            if len(self._unread) > self._limits.answer_bytes:
                raise Refused(f"an answer of more than {self._limits.answer_bytes} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            message = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refused("an answer that is not JSON") from error
        if not isinstance(message, dict):
            raise Refused("an answer that is no object")
        return message

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise Refused(f"no answer within {self._limits.seconds} s")

    def close(self) -> None:
        """Kill all processes and wait until they are gone. Raises `SandboxError` if they do not go."""
        if self._closed:
            return
        self._closed = True  # the numbers of its descriptors may be others' from now on
        try:
            if self._pidfd is None:
                self._process.kill()
            else:
                _kill(self._pidfd)  # then the launcher collects it and ends
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise SandboxError("a process of a sandbox does not end after SIGKILL") from error
        finally:
            for descriptor in (self._answers, self._requests, self._pidfd):
                if descriptor is not None:
                    os.close(descriptor)


def _kill(pidfd: int) -> None:
    """Kill process 1 of a namespace, and wait until the kernel has ended all of the namespace."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(SECONDS_TO_END * 1000):
        raise SandboxError("a process namespace does not end after SIGKILL")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


@functools.cache
def missing() -> str | None:
    """Start a sandbox once, and return what this machine lacks for it; None where it works."""
    try:
        with Sandbox() as sandbox:
            sandbox.load("value = 1")
    except SandboxError as error:
        return str(error)
    return None
