"""Wrong inputs for the commands: one process that has imported the libraries, and forks for every command line.

An import takes seconds, a refusal a few hundredths. JAX has no backend before the fork, so each command starts its own.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

ROOT = Path(__file__).parents[2]
SECONDS = 10.0  # that a refusal may compute
DEADLINE = 600  # seconds after which a command that waits is ended, on a loaded machine

SERVER = """
import gc, importlib, json, os, pkgutil, runpy, signal, sys, warnings
import jax, absl.app, ml_collections, matplotlib.figure, tqdm
import deepseek_jax, pallas_kernels.bench.records
for package in (deepseek_jax,):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
gc.freeze()

for line in sys.stdin:
    request = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads once it has computed, and here it has not
        pid = os.fork()
    if pid == 0:
        signal.alarm(request["deadline"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        for name, value in request["environment"].items():  # JAX has read the environment already
            if name.startswith("JAX_"):
                jax.config.update(name.lower(), {"1": True}.get(value, value))
        sys.argv = [request["command"], *(os.fsdecode(bytes(word)) for word in request["words"])]
        try:
            runpy.run_module("experiments." + request["command"], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if not jax._src.xla_bridge.backends_are_initialized():  # then nothing else runs
                sys.stderr.flush()
                os._exit(end.code or 0)
            raise
    _, status, usage = os.wait4(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)
"""


class Case(NamedTuple):
    """A wrong input.

    Attributes:
        command: module of `experiments`.
        words: its arguments, as a shell would take them; "{d}" is an empty folder.
        says: what the message must name, the value and the remedy among it.
        files: what lies in the folder: text, bytes, or a function that makes the path.
        environment: variables.
        code: the exit code.
        leaves: what the command may leave in the folder.
    """

    command: str
    words: str
    says: tuple[str, ...]
    files: dict[str, str | bytes | Callable[[Path], None]]
    environment: dict[str, str]
    code: int
    leaves: frozenset[str]


def case(command, words, *says, files=None, environment=None, code=2, leaves=()):
    """Return a wrong input; see `Case`."""
    return Case(command, words, says, files or {}, environment or {}, code, frozenset(leaves))


class Doors:
    """Knocks with wrong inputs."""

    def __init__(self, server: subprocess.Popen):
        self.server = server

    def knock(self, wrong: Case, folder: Path) -> tuple[int, float, str]:
        """Return exit code, CPU seconds and what was printed. The files of the case lie in `folder / "d"`."""
        words = [list(os.fsencode(word)) for word in shlex.split(wrong.words.replace("{d}", str(folder / "d")))]
        request = {"command": wrong.command, "words": words, "environment": wrong.environment}
        request |= {"log": str(folder / "log"), "deadline": DEADLINE}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code, seconds = json.loads(self.server.stdout.readline())
        return code, seconds, (folder / "log").read_text(errors="replace")


@contextmanager
def doors() -> Iterator[Doors]:
    """Start the process that forks."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        yield Doors(server)
        server.stdin.close()


def put(folder: Path, files: dict) -> None:
    """Make the files of a case."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)


def tree(folder: Path) -> dict[str, tuple]:
    """Return what lies in a folder: kind, size and time of change by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (
            status.st_mode,
            0 if path.is_dir() else status.st_size,
            0 if path.is_dir() else status.st_mtime_ns,
        )
    return found
