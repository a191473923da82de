"""Hold predicted step times against published and measured ones: `python -m experiments.benchmarks.plan_calibration`.

Prints the table of `docs/planning.md`. Nothing runs, and no device is needed.
"""

import functools
import importlib
from typing import NamedTuple

import jax

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.plan.calibration import CLOSE, OWN, RUNS, predict, predict_own
from experiments import command


class Row(NamedTuple):
    """One line of the table; seconds of a step."""

    name: str
    layout: str
    known: float
    predicted: float
    source: str
    note: str
    reason: str

    @property
    def off(self) -> float:
        """Return by which share the prediction is off."""
        return self.predicted / self.known - 1


@functools.cache
def load(name: str) -> Config:
    """Return a config of `configs/`."""
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def rows() -> list[Row]:
    """Return all rows: published runs, then our own."""
    found = []
    for run in RUNS:
        parts = [f"PP{run.stages}" * (run.stages > 1), f"TP{run.tensor}" * (run.tensor > 1)]
        parts += [f"EP{run.expert_devices}" if run.expert_devices > 1 else "FSDP", f"{run.batch:,} sequences"]
        layout = f"{run.precision.upper()}, {' '.join(filter(None, parts))}"
        seconds = predict(run, load).total
        found.append(Row(run.name, layout, run.seconds, seconds, run.source, run.note, run.reason))
    for own in OWN:
        layout = f"{own.execution['precision'].upper()}, {own.batch} sequences"
        seconds = predict_own(own, load).total
        found.append(Row(own.name, layout, own.seconds, seconds, f"`{own.record}`", own.note, own.reason))
    return found


def table(found: list[Row]) -> str:
    """Return the Markdown table."""
    lines = [
        "| Run | Layout | Known, s | Predicted, s | Off | Source | What is assumed; why it is off |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in found:
        why = f" **Off because** {row.reason}" if row.reason and abs(row.off) > CLOSE else ""
        figures = f"{row.known:,.3g} | {row.predicted:,.3g} | {row.off:+.0%}".replace("-", "\N{MINUS SIGN}")
        lines.append(
            f"| {row.name} | {row.layout} | {figures} | {row.source} | {f'{row.note}.' * bool(row.note)}{why} |"
        )
    return "\n".join(lines)


def main(_) -> None:
    """Print the table."""
    jax.config.update("jax_platforms", "cpu")
    print(table(rows()))


if __name__ == "__main__":
    command.run(main)
