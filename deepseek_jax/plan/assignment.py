"""The memory of a step as a TPU's compiler assigns its buffers, known long before the compiler is done.

What a compilation does after the assignment of buffers, a plan does not read. How much that is depends on the program:
a small one had its assignment 0.4 s after its start and its code after 2.1; `tiny` with 2 layers took 43 s of a core to
its assignment and 48 in all; V3's was stopped after 421 s, before its assignment (experiments/log.md). libtpu has no
switch to stop there. So the step is compiled in a process of its own, `python -m deepseek_jax.plan.assignment`, which
writes what XLA calls a dump into a temporary folder. The buffer assignment has one line for each piece of memory:

    allocation 1: size 4194304, page 0, parameter 0, shape |f32[1024,1024]| ..., maybe-live-out:
    allocation 5: size 512, page 0, maybe-live-out:
    allocation 14: size 512, color 6, page 0, preallocated-temp:
    allocation 457: size 1048576, color 5, page 0, preallocated-temp:
    allocation 15: size 4243488, page 0, preallocated-temp:

Pieces without a color lie in the device's main memory: parameters, results and temporaries, each counted once. Color 5
is pinned memory of the host; others are inside the chip. As soon
as XLA begins to write what follows the assignment, the process is ended. A step whose pieces are larger than
the chip gets time to be refused: the compiler counts a little otherwise, and its word is better. If it has not come by
then, the step does not fit by its assignment. The figures are those of the assignment whether the process was ended or
came to its end first. The code of the step, some hundred megabytes of V3's, and some scratch memory are not counted.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan.chips import ENVIRONMENT, Chip, absent_devices, find_chip, prepare
from deepseek_jax.plan.memory import StepMemory, compile_step

ASSIGNED, WHOLE = ".after_optimizations-buffer-assignment.txt", ".after_optimizations.txt"  # of a program
STEP = "jit_run"  # the program's name in the names of its files: the function inside of `parallel.program.jit_on`
PIECES = re.compile(r"^allocation \d+:.*$", re.MULTILINE)
PIECE = re.compile(r"^allocation \d+: size (\d+),(?: color (\d+),)? page \d+,(.*)$")
HOST_COLOR = "5"
SAID, RESULT = "said", "result"  # what the process said, and its own figures
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_REFUSE = 20.0  # that a compiler has to refuse a step whose pieces are larger than the chip's memory


def assign_step(config: Config, chip: Chip, num_devices: int) -> StepMemory:
    """Return the memory of the train step of `config` at its largest batch size, by its buffer assignment.

    Args:
        config: whose mesh has `num_devices` devices.
        chip: a TPU, which need not be there.
        num_devices: of a topology of such chips.

    Raises:
        ValueError: the process fails for another reason than the step's size, and its last words are told; or its
            buffer assignment has a form that is not read here.
    """
    start = time.perf_counter()
    request = {"config": to_dict(config), "chip": chip.name, "devices": num_devices}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = _begin(request | {"folder": name}, folder)
        try:
            found = _watch(process, folder, chip)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # SIGTERM makes libtpu write the report of a crash
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if found is None:
            words = (folder / SAID).read_text(errors="replace")[-2000:].strip() or "it said nothing"
            raise ValueError(
                f"the process that compiles the step of {config.name} for {chip.name} {_end_of(process.returncode)}:"
                f" {words}"
            )
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def read_assignment(path: Path) -> StepMemory:
    """Return the memory that a buffer assignment has in the device's main memory and the host's.

    Raises:
        ValueError: the file has no line of a piece, or one of another form.
    """
    pieces = PIECES.findall(path.read_text())
    if not pieces:
        raise ValueError(
            f"the buffer assignment {path.name} has no line 'allocation N: ...', which libtpu 0.0.48 writes;"
            " use --nocompile, which traces the memory"
        )
    total = arguments = temporaries = on_host = 0
    for line in pieces:
        piece = PIECE.match(line)
        if piece is None:
            raise ValueError(
                f"the buffer assignment {path.name} has {line[:120]!r}, which is not of the form 'allocation N: size S,"
                " page P, ...' that libtpu 0.0.48 writes; use --nocompile, which traces the memory"
            )
        size, color, kind = piece.groups()
        if color == HOST_COLOR:
            on_host += int(size)
        elif not color:
            total += int(size)
            arguments += int(size) if kind.startswith(" parameter ") else 0
            temporaries += int(size) if "preallocated-temp" in kind else 0
    return StepMemory(total, arguments, temporaries, source="assigned", on_host=on_host)


def _end_of(code: int) -> str:
    """Return how a process ended, with what the code means where many will meet it."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (the machine may have run out of memory)" if name == "SIGKILL" else "")


def _begin(request: dict[str, Any], folder: Path) -> subprocess.Popen:
    """Start the process that compiles; it ends when its standard input is closed, so it does not outlive this one."""
    with (folder / SAID).open("w") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "deepseek_jax.plan.assignment"],
            stdin=subprocess.PIPE, stdout=words, stderr=words, text=True, env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return process


def _watch(process: subprocess.Popen, folder: Path, chip: Chip) -> StepMemory | None:
    """Return what the process finds, by its assignment or the compiler's refusal; None: it failed."""
    found, deadline = None, 0.0
    while True:
        is_running = process.poll() is None
        if found is None and (found := _assigned(folder)) is not None:
            deadline = time.monotonic() + SECONDS_TO_REFUSE
        if not is_running:
            break
        if found is not None and found.total <= chip.memory:
            return found
        if found is not None and time.monotonic() >= deadline:
            return dataclasses.replace(found, capacity=chip.memory)  # assigned, not refused yet
        time.sleep(SECONDS_BETWEEN_LOOKS)
    result = folder / RESULT
    if result.exists():
        own = StepMemory(**json.loads(result.read_text()))
        return found if found is not None and own.fits else own
    return found if found is not None and found.total <= chip.memory else None


def _assigned(folder: Path) -> StepMemory | None:
    """Return the memory by the assignment of the step; None: it is not whole.

    The compiler opens all files of a program at once, and writes one after another: the program itself last, so as soon
    as that has begun the assignment is whole. A small program that is compiled before or beside the step has another
    name, and is not taken for it.
    """
    whole = [path for path in folder.glob(f"*.{STEP}.*{WHOLE}") if path.stat().st_size]
    paths = [path.with_name(path.name.removesuffix(WHOLE) + ASSIGNED) for path in whole]
    return max((read_assignment(path) for path in paths if path.exists()), key=lambda step: step.total, default=None)


def end_with(stream: IO[str], end: Callable[[int], Any] = os._exit) -> threading.Thread:
    """Start a thread that calls `end(1)` when a stream that nobody writes to any more is closed."""
    thread = threading.Thread(target=lambda: (stream.read(), end(1)), daemon=True)
    thread.start()
    return thread


def main() -> None:
    """Compile what standard input asks for; write its memory if the compiler comes to an end."""
    request = json.loads(sys.stdin.readline())
    end_with(sys.stdin)
    prepare()
    jax.config.update("jax_platforms", "cpu")
    config, folder = from_config_dict(request["config"]), Path(request["folder"])
    mesh = make_mesh(config.mesh, absent_devices(find_chip(request["chip"]), request["devices"]))
    found = compile_step(config, mesh, {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    (folder / RESULT).write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
