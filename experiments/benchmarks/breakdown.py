"""Where the time of a compiled step goes: device time by named scope and pass, and by kernel, from a profiler's trace.

A trace names the instruction behind each event, the compiled program names the scope behind each instruction. XLA
launches many kernels at once as a command buffer, of which a trace knows the kernels but not the instructions: the
program that is traced is compiled without them (`WITHOUT_COMMAND_BUFFERS`); its kernels are the same.
"""

import collections
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

# The scopes of the model, the layers' parallelism and the step; the innermost one of an instruction counts.
SCOPES = (
    "embedding",
    "attention",
    "attention_core",
    "route",
    "dispatch",
    "experts",
    "combine",
    "ffn",
    "head",
    "quantize_weights",
    "gather",
    "optimizer",
)
OTHER = "other"
PASSES = ("forward", "recomputed", "backward")
WITHOUT_COMMAND_BUFFERS = {"gpu": {"xla_gpu_enable_command_buffer": ""}}  # compiler options by platform
_CONTROL_FLOW = {"while", "call", "conditional"}  # on a CPU they are events, too, and contain those of their bodies


class Event(NamedTuple):
    """All events of one kernel in one scope and pass, per step."""

    scope: str
    direction: str  # one of PASSES
    kernel: str  # as the device calls it
    milliseconds: float
    launches: float


def trace_steps(run: Callable[[], Any], num_steps: int, program: str) -> list[Event]:
    """Run a compiled step some times under the profiler.

    Args:
        run: takes one step, and waits for its results.
        num_steps: how many to take.
        program: the compiled program's text (`Compiled.as_text()`).

    Returns:
        what ran, per step, of one device; on a CPU, seconds of all threads together.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1 if jax.default_backend() == "cpu" else 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(num_steps):
            run()
        jax.profiler.stop_trace()
        (path,) = Path(folder).glob("**/*.xplane.pb")
        return collect(_read(path), program, num_steps)


def collect(events: Iterator[tuple[str, str, float]], program: str, num_steps: int) -> list[Event]:
    """Return the sums of (instruction, kernel, nanoseconds) by scope, pass and kernel, per step, the longest first."""
    places, kinds = _instructions(program)
    sums: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for instruction, kernel, nanoseconds in events:
        if kinds.get(instruction) not in _CONTROL_FLOW:
            total = sums[*places.get(instruction, (OTHER, "forward")), kernel]
            total[0] += nanoseconds / 1e6 / num_steps
            total[1] += 1 / num_steps
    return sorted((Event(*key, *total) for key, total in sums.items()), key=lambda event: -event.milliseconds)


def place(op_name: str) -> tuple[str, str]:
    """Return scope and pass of an instruction from its `op_name` metadata, whose last part is the operation (a
    `gather`, say), no scope.
    """
    names = [word for word in re.findall(r"\w+", op_name.rpartition("/")[0]) if word in SCOPES]
    direction = (
        "recomputed" if "rematted_computation" in op_name else "backward" if "transpose(" in op_name else "forward"
    )
    return names[-1] if names else OTHER, direction


def table(events: list[Event]) -> str:
    """Return milliseconds by scope and pass, with shares of the whole."""
    whole = sum(event.milliseconds for event in events)
    lines = [f"{'scope':<18}" + "".join(f"{name:>12}" for name in (*PASSES, "all")) + "  share"]
    for scope in (*SCOPES, OTHER):
        found = [sum(e.milliseconds for e in events if (e.scope, e.direction) == (scope, name)) for name in PASSES]
        if any(found):
            lines.append(
                f"{scope:<18}" + "".join(f"{ms:>12.2f}" for ms in (*found, sum(found))) + f"{sum(found) / whole:>7.1%}"
            )
    passes = [sum(e.milliseconds for e in events if e.direction == name) for name in PASSES]
    return "\n".join([*lines, f"{'all':<18}" + "".join(f"{ms:>12.2f}" for ms in (*passes, whole)) + "   ms"])


def kernel_table(events: list[Event], count: int = 25) -> str:
    """Return the kernels that take longest, over all scopes."""
    sums: Mapping[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in events:
        sums[event.kernel][0] += event.milliseconds
        sums[event.kernel][1] += event.launches
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:count]
    lines = [
        f"{milliseconds:>10.2f} ms {launches:>8.0f} x  {kernel[:90]}" for kernel, (milliseconds, launches) in longest
    ]
    rest = sum(total[0] for total in sums.values()) - sum(total[0] for _, total in longest)
    return "\n".join([*lines, f"{rest:>10.2f} ms            in {len(sums) - len(longest)} others"])


def _read(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yield (instruction, kernel, nanoseconds) of the first device, or of the CPU where no device has events."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices[:1] or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield str(stats["hlo_op"]), event.name, event.duration_ns


def _instructions(program: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Scope and pass, and opcode, of every instruction of a compiled program's text."""
    places, kinds = {}, {}
    for line in program.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(", line)
        if found:
            name, kinds[found[1]] = re.search(r'op_name="([^"]*)"', line), found[2]
            if name:
                places[found[1]] = place(name[1])
    return places, kinds
