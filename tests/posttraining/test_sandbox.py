"""What code in a sandbox cannot do, however it tries, and what is left of it: nothing."""

import errno
import os
import platform
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_jax.posttraining.rewards.sandbox import session, values
from deepseek_jax.posttraining.rewards.sandbox.session import Limits, Raised, Refused, Sandbox, SandboxError
from deepseek_jax.posttraining.rewards.sandbox.system_calls import ARCHITECTURES, REFUSED
from tests.support.attacks import ATTACKS, HANGING
from tests.support.patience import SECONDS

pytestmark = pytest.mark.skipif(session.missing() is not None, reason=session.missing() or "")

SECRET = "right-answer"
PATIENT = Limits(SECONDS)  # for code that ends
# One attack on each wall; the others are slow tests, as each starts a process.
OFTEN = {
    "fork bomb",
    "memory",
    "memory that is not address space",
    "disk",
    "huge answer",
    "signal to the parent",
    "TCP",
    "proc of the judge",
    "writing outside",
    "raising limits",
    "answers in frames and objects",
    "os._exit(0)",
    "__eq__ that agrees",
    "writing into the pipes",
    "another program",
    "secrets of the environment",
    "endless loop",
    "ignoring SIGTERM",
}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Processes start and end late on a loaded machine."""
    monkeypatch.setattr(session, "SECONDS_TO_START", SECONDS)
    monkeypatch.setattr(session, "SECONDS_TO_END", SECONDS)


def processes_of(namespace: str) -> list[str]:
    """Return the processes that are in a process namespace."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            found += [link.parts[2]] if os.readlink(link) == namespace else []
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def outcome(source: str, seconds: float) -> object:
    """Run an attack as the judge does, and return the value that it would compare, or what it raised."""
    with Sandbox(Limits(seconds, memory_bytes=1 << 27)) as sandbox:
        pid = re.search(r"Pid:\s*(\d+)", Path(f"/proc/self/fdinfo/{sandbox._pidfd}").read_text())[1]
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
        launcher = sandbox._process
        try:
            sandbox.load(source)
            value = sandbox.call("f", ["question"])
        except (Raised, Refused) as error:
            value = error
    assert namespace != os.readlink("/proc/self/ns/pid")
    assert processes_of(namespace) == []
    assert launcher.poll() is not None
    return value


def attack(name: str, source: str, seconds: float, folder: Path) -> None:
    source = source.replace("OUTSIDE", str(folder)).replace("JUDGE", str(os.getpid()))
    value = outcome(source, seconds)
    assert not str(value).startswith("escaped"), name
    assert not values.same(SECRET, value), name
    assert list(folder.iterdir()) == []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "of the judge")
    return tmp_path


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS]
)
def test_an_attack_is_survived_and_gains_nothing(name, folder):
    attack(name, ATTACKS[name], 5.0, folder)


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in HANGING]
)
def test_code_that_does_not_end_is_ended(name, folder):
    assert isinstance(outcome(HANGING[name], 0.3), Refused)


def test_a_sandbox_computes_and_keeps_state_between_calls():
    with Sandbox(PATIENT) as sandbox:
        sandbox.load(
            "import math, collections, itertools, re, json\nseen = []\n"
            "def f(x): seen.append(x); return seen, {1: (2.5, None)}"
        )
        sandbox.call("f", [1])
        assert values.decode(sandbox.call("f", [values.encode((True, b"x"))])) == ([1, (True, b"x")], {1: (2.5, None)})
        with pytest.raises(Raised, match="no function of that name"):
            sandbox.call("g", [])


def test_the_clock_runs_only_while_the_code_does(monkeypatch):
    """The judge's own work, such as the start of another sandbox, costs right code nothing."""
    late = [0.0]
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    with Sandbox(PATIENT) as sandbox:
        sandbox.load("def f(x): return x + 1")
        late[0] = 10 * SECONDS
        assert sandbox.call("f", [1]) == 2


def test_side_doors_are_shut():
    """System calls beside those that attacks try, and the packages of the system's own Python."""
    source = """
import ctypes, glob, os
def calls(numbers):
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for number in numbers:
        buffer = ctypes.create_string_buffer(64)
        libc.syscall(number, 1, 1, 0, buffer)
        found.append(ctypes.get_errno())
    return found
def packages(x): return [p for f in glob.glob("/usr/lib*/python*/*-packages") for p in os.listdir(f)]
"""
    column = ARCHITECTURES[platform.machine()][0]
    names = ("socketpair", "syslog", "modify_ldt", "open_tree_attr")
    numbers = [REFUSED[name][column] for name in names if REFUSED[name][column] is not None]
    with Sandbox(PATIENT) as sandbox:
        sandbox.load(source)
        assert sandbox.call("calls", [values.encode(numbers)]) == values.encode([errno.EPERM] * len(numbers))
        assert sandbox.call("packages", [0]) == values.encode([])


def test_a_refusal_without_the_token_of_the_call_is_no_answer():
    source = """
import os
def f(x):
    for pipe in range(3, 4096):
        try: os.write(pipe, b'{"refused": "x"}\\n')
        except OSError: pass
"""
    with Sandbox(PATIENT) as sandbox:
        sandbox.load(source)
        with pytest.raises(Refused, match="without the token"):
            sandbox.call("f", [1])


def test_a_machine_that_cannot_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(session.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="no sandbox on darwin.*Linux"):
        Sandbox()


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "disk_bytes", "answer_bytes", "open_files"])
def test_limits_that_no_code_could_meet_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})
