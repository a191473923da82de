"""The memory of a step as a TPU's compiler assigns its buffers, known long before the compiler is done.

XLA's passes and the assignment of buffers take a tenth of a compilation for TPUs; the rest makes machine code, which a
plan does not read (experiments/log.md). libtpu has no switch to stop there. So the step is compiled in a process of its
own, `python -m deepseek_jax.plan.assignment`, which writes what XLA calls a dump into a temporary folder. The buffer
assignment has one line for each piece of memory:

    allocation 1: size 4194304, page 0, parameter 0, shape |f32[1024,1024]| ..., maybe-live-out:
    allocation 5: size 512, page 0, maybe-live-out:
    allocation 14: size 512, color 6, page 0, preallocated-temp:
    allocation 15: size 4243488, page 0, preallocated-temp:

Pieces without a color lie in the device's main memory: parameters, results and temporaries, each counted once. As soon
as the report that XLA writes behind the assignment is there, the process is ended. A step that the compiler refuses for
its size ends on its own. The code of the step, some hundred megabytes of V3's, is not counted.
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
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan.chips import ENVIRONMENT, Chip, absent_devices, find_chip, prepare
from deepseek_jax.plan.memory import StepMemory, compile_step

ASSIGNED, REPORTED = "*buffer-assignment.txt", "*memory-usage-report.txt"  # of a dump; the second is written later
PIECE = re.compile(r"^allocation \d+: size (\d+),( color \d+,)? page \d+,(.*)$", re.MULTILINE)
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
        ValueError: the compiler does not take the step, for another reason than its size; its last words are told.
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
        if found is None:
            words = (folder / SAID).read_text(errors="replace")[-2000:]
            raise ValueError(f"the compiler of {chip.name} does not take the step of {config.name}: {words}")
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def read_assignment(text: str) -> StepMemory:
    """Return the memory that a buffer assignment has in the device's main memory."""
    total = arguments = temporaries = 0
    for size, color, kind in PIECE.findall(text):
        if not color:
            total += int(size)
            arguments += int(size) if kind.startswith(" parameter ") else 0
            temporaries += int(size) if "preallocated-temp" in kind else 0
    return StepMemory(total, arguments, temporaries)


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
    """Return what the process finds, by its assignment or its own report; None: it failed."""
    patience = SECONDS_TO_REFUSE
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        assigned = list(folder.glob(ASSIGNED))
        if not assigned or not any(folder.glob(REPORTED)):
            continue
        found = max((read_assignment(path.read_text()) for path in assigned), key=lambda step: step.total)
        if found.total <= chip.memory or patience <= 0:
            return found
        patience -= SECONDS_BETWEEN_LOOKS  # a compiler counts a little otherwise: its refusal is its own
    result = folder / RESULT
    return StepMemory(**json.loads(result.read_text())) if result.exists() else None


def main() -> None:
    """Compile what standard input asks for; write its memory if the compiler comes to an end."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    prepare()
    jax.config.update("jax_platforms", "cpu")
    config, folder = from_config_dict(request["config"]), Path(request["folder"])
    mesh = make_mesh(config.mesh, absent_devices(find_chip(request["chip"]), request["devices"]))
    found = compile_step(config, mesh, {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})
    (folder / RESULT).write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
