"""Hold predicted step times against published and measured ones: `python -m experiments.benchmarks.plan_calibration`.

Prints the tables of `docs/planning.md`: training steps, and decoding steps of `v3_5b` on one H200 beside their records.
Nothing runs, and no device is needed.
"""

import functools
import importlib
import json
from pathlib import Path
from typing import NamedTuple

import jax

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inference.generate import BURST
from deepseek_jax.plan import decode
from deepseek_jax.plan.calibration import CLOSE, OWN, RUNS, predict, predict_own
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import state_of
from experiments import command

DECODED = Path(__file__).parents[1] / "results" / "decode" / "v3_5b_h200.json"
WRONG_SCALES = "fp8", "a2a6d5c"  # records of a kernel that was mended (experiments/log.md): they do not count


class Decoded(NamedTuple):
    """A recorded decoding step of `v3_5b` on one H200, and what a plan says of it."""

    precision: str
    batch: int
    context: int
    read: tuple[float, float]  # bytes: of the record's weights and cache, and planned
    seconds: tuple[float, float]  # measured, and expected


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
        layout += f", {own.micro_batches} micro-batches" * (own.micro_batches > 1)
        layout += f", {own.layers} layers" * (own.layers > 0)
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


def decoded() -> list[Decoded]:
    """Return the newest record of every precision, batch and context."""
    newest: dict[tuple[str, int, int], dict[str, float]] = {}
    for record in json.loads(DECODED.read_text()):
        if (record["precision"], record["commit"]) == WRONG_SCALES:
            continue
        key = record["precision"], record["shape"]["batch"], record["shape"]["context"]
        newest.setdefault(key, {})[record["mode"]] = record["value"]
    found = []
    for (precision, batch, context), values in sorted(newest.items()):
        config = load("v3_5b").with_(execution={"precision": precision}, mesh={"data": 1, "node": 1, "expert": 1})
        plan = decode.decoding(config, 1, CHIPS["h200"], state_of(config))
        held = context + BURST // 2  # while a burst is made, on average
        read = decode.READ * CHIPS["h200"].hbm * batch / values["floor"]
        seconds = values["time"] / 1e3, plan.seconds(batch, held)
        found.append(Decoded(precision, batch, context, (read, plan.read(batch, held)), seconds))
    return found


def decoded_table(found: list[Decoded]) -> str:
    """Return the Markdown table of decoding."""
    lines = [
        "| Weights | Sequences | Context | Read, GB | Floor at 4.8 TB/s, ms | Expected, ms | Measured, ms | Off |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        measured, expected = row.seconds
        off = f"{expected / measured - 1:+.0%}".replace("-", "\N{MINUS SIGN}")
        floor = 1e3 * row.read[1] / CHIPS["h200"].hbm
        lines.append(
            f"| {row.precision.upper()} | {row.batch} | {row.context:,} | {row.read[1] / 1e9:.2f} | {floor:.2f} |"
            f" {1e3 * expected:.2f} | {1e3 * measured:.2f} | {off} |"
        )
    return "\n".join(lines)


def main(_) -> None:
    """Print the tables."""
    jax.config.update("jax_platforms", "cpu")
    print(table(rows()))
    print(decoded_table(decoded()))


if __name__ == "__main__":
    command.run(main)
