"""Profiles of whole programs, their records, and how both are printed."""

from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.config import Config
from experiments.benchmarks import breakdown

PROFILED_STEPS = 3


def profile(
    lowered: jax.stages.Lowered, step: jax.stages.Compiled, run: Callable[[jax.stages.Compiled], Any]
) -> list[breakdown.Event]:
    """Profile a step. On a GPU it is compiled once more, without command buffers.

    Args:
        lowered: the lowered program of `step`.
        step: the program, compiled without options.
        run: runs one step of the program that it is given, and waits for its results.
    """
    options = breakdown.WITHOUT_COMMAND_BUFFERS.get(jax.default_backend())
    step = lowered.compile(compiler_options=options) if options else step
    run(step)
    return breakdown.trace_steps(lambda: run(step), PROFILED_STEPS, step.as_text())


def record(config: Config, mode: str, shape: dict[str, int], value: float, unit: str) -> dict[str, Any]:
    """Return a record without a yardstick and without its provenance."""
    made = {"config": config.name, "mode": mode, "precision": config.execution.precision, "shape": shape}
    return made | {"value": value, "unit": unit, "yardstick": None}


def scope_times(events: list[breakdown.Event]) -> list[tuple[str, float, str]]:
    """Return (mode, value, unit) for each scope of a profile; the scope of the longest kernel comes first."""
    scopes = dict.fromkeys(event.scope for event in events)
    return [
        (f"time in {scope}", sum(event.milliseconds for event in events if event.scope == scope), "ms")
        for scope in scopes
    ]


def print_records(title: str, records: list[dict[str, Any]]) -> None:
    """Print one line per record, with its yardstick."""
    print(f"\n{title}; {records[0]['device']}, jax {records[0]['jax']}\n")
    print_values(records)


def print_values(records: list[dict[str, Any]]) -> None:
    """Print one line per record, as `print_records`, without a title."""
    for found in records:
        line = f"{found['mode']:<28} {_number(found['value']):>12} {found['unit']}"
        if yardstick := found["yardstick"]:
            line += f"   {found['value'] / yardstick['value']:.2f} x {_number(yardstick['value'])}: {yardstick['name']}"
        print(line)


def print_events(events: list[breakdown.Event]) -> None:
    """Print the tables of a profile, if there are any events."""
    if events:
        print(f"\n{breakdown.table(events)}\n\n{breakdown.kernel_table(events)}")


def warn_if_busy(load: float) -> None:
    """Print a warning if JAX computes on the CPU and `load` of its cores were busy before."""
    if jax.default_backend() == "cpu" and load > 0.5:
        print(f"\nOther programs kept {load:.1f} cores busy when this one started: times are too long, and vary.")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4f}"
