"""Where the time of a compiled step goes: device time by named scope and pass, and by kernel, from a profiler's trace.

A trace names the instruction of each event. The compiled program names the scope of each instruction. XLA launches many
kernels at once as a command buffer; a trace shows the buffer's kernels, but not their instructions. So the traced
program is compiled without command buffers (`WITHOUT_COMMAND_BUFFERS`). Its kernels are the same.
"""

import collections
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

# The named scopes of the model, of the parallelism and of the step. An instruction belongs to its innermost scope.
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
_CONTROL_FLOW = {"while", "call", "conditional"}  # events of their own on a CPU, which contain those of their bodies


class Event(NamedTuple):
    """The events of one kernel in one scope and pass, summed, per step."""

    scope: str
    direction: str  # one of PASSES
    kernel: str  # as the device calls it
    milliseconds: float
    launches: float


def trace_steps(run: Callable[[], Any], num_steps: int, program: str) -> list[Event]:
    """Run a compiled step under the profiler.

    Args:
        run: runs one step and waits for its results.
        num_steps: number of steps.
        program: text of the compiled program (`Compiled.as_text()`).

    Returns:
        the events of one device, per step. On a CPU, times are summed over all threads.
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
    """Sum (instruction, kernel, nanoseconds) by scope, pass and kernel; return the sums per step, the longest first."""
    places, kinds = _instructions(program)
    sums: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for instruction, kernel, nanoseconds in events:
        if kinds.get(instruction) not in _CONTROL_FLOW:
            total = sums[*places.get(instruction, (OTHER, "forward")), kernel]
            total[0] += nanoseconds / 1e6 / num_steps
            total[1] += 1 / num_steps
    return sorted((Event(*key, *total) for key, total in sums.items()), key=lambda event: -event.milliseconds)


def place(op_name: str) -> tuple[str, str]:
    """Return the scope and the pass of an instruction from its `op_name` metadata.

    The last part of an `op_name` is the operation, such as `gather`. It does not count as a scope.
    """
    names = [word for word in re.findall(r"\w+", op_name.rpartition("/")[0]) if word in SCOPES]
    direction = (
        "recomputed" if "rematted_computation" in op_name else "backward" if "transpose(" in op_name else "forward"
    )
    return names[-1] if names else OTHER, direction


def table(events: list[Event]) -> str:
    """Return a table of milliseconds by scope and pass, with the share of each scope."""
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
    """Return a table of the kernels that take longest, over all scopes."""
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


def kernels_of_a_step(program: str) -> int:
    """Return the kernels in the longest loop body of a compiled program: fusions, calls of kernels, and copies."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    found = (re.search(rf"^%?{re.escape(body)} .*?^}}", program, re.MULTILINE | re.DOTALL) for body in bodies)
    return max((_count_kernels(body[0]) for body in found if body), default=0)


def kernels_of_a_run(program: str) -> int:
    """Return the kernels of a compiled program outside its loops."""
    return _count_kernels(program.rpartition("\nENTRY")[2])


def _count_kernels(text: str) -> int:
    return len(re.findall(r" = .*? (?:fusion|custom-call|copy|sort|dot|convolution|scatter)\(", text))


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
    """Return (scope, pass) and opcode of every instruction in the text of a compiled program."""
    places, kinds = {}, {}
    for line in program.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(", line)
        if found:
            name, kinds[found[1]] = re.search(r'op_name="([^"]*)"', line), found[2]
            if name:
                places[found[1]] = place(name[1])
    return places, kinds
