"""Print the table of pipelines on two cards: `python -m experiments.benchmarks.pipeline_table`.

Measured figures are those of a file of records: steps of `v3_5b` with few layers on one card, and by each schedule on
two. Beside the measured idle time of the ticks, which is read from profiles, stand that of the table, whose stages are
equal, and that of `experiments.plan`, which knows the stages. Nothing runs, and no device is needed.
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import v3_5b
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.stages import program_of
from deepseek_jax.pipeline.schedules import SCHEDULES
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.meshes import require_fit
from deepseek_jax.plan.stages import Pipeline
from deepseek_jax.plan.ticks import idle_share, of_equal_stages
from experiments import command

RECORDS = Path(__file__).parents[1] / "results" / "pipeline" / "schedules_v3_5b_2xh200.json"
PRECISIONS = "bf16", "fp8"
ALONE = "one card"
SPEED, LOSSES, IDLE = "train step", "losses", "idle share of the ticks"


class Row(NamedTuple):
    """A schedule in one precision; rates in tokens/s, idle shares of 1, losses in nats."""

    schedule: str
    precision: str
    rate: float
    alone: float  # of one card with the same micro-batches
    idle: dict[str, float]  # by "table", "plan", "measured"
    apart: float  # the largest distance of a loss from that of one card


def rows(records: list[dict[str, Any]]) -> list[Row]:
    """Return what was measured, by precision and schedule."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    shapes = {}
    for record in records:
        key = record["precision"], record.get("schedule", ALONE), record["shape"]["layers"]
        found.setdefault(key, {})[record["mode"]] = record["value"]
        shapes[key] = record["shape"]
    made = []
    for precision, name, layers in itertools.product(PRECISIONS, SCHEDULES, sorted({key[2] for key in found})):
        one, here = found.get((precision, ALONE, layers)), found.get((precision, name, layers))
        if one and here:
            apart = float(np.abs(np.subtract(here[LOSSES], one[LOSSES])).max())
            idle = idle_of(config_of(precision, name, shapes[precision, name, layers])) | {"measured": here[IDLE]}
            made.append(Row(name, precision, here[SPEED], one[SPEED], idle, apart))
    return made


def config_of(precision: str, name: str, shape: dict[str, int]) -> Config:
    """Return the configuration of a record on two cards."""
    return from_config_dict(v3_5b.get_config()).with_(
        model={"num_layers": shape["layers"]},
        training={
            "batch_size": (("constant", 1.0, shape["batch"]),),
            "micro_batch_size": shape["micro_batch_size"],
        },
        mesh={"pipe": 2},
        execution={"precision": precision, "schedule": name},
    )


def idle_of(config: Config) -> dict[str, float]:
    """Return the idle share by the table, whose stages are equal, and by the plan."""
    fit = require_fit(config, 2)
    plan = Pipeline(config, fit.mesh, CHIPS["h200"])
    equal = program_of(config.execution.schedule, 2, plan.micro_batches)
    return {
        "table": idle_share(equal, of_equal_stages(equal)),
        "plan": plan.idle_share(),
    }


def table(found: list[Row]) -> str:
    """Return the Markdown table."""
    lines = [
        "| | Schedule | Tokens/s | Times one card | Idle, table | Idle, plan | Idle, measured | Loss apart, nats |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        idle = " | ".join(f"{row.idle[name]:.1%}" for name in ("table", "plan", "measured"))
        lines.append(
            f"| {row.precision.upper()} | {row.schedule} | {row.rate:,.0f} | {row.rate / row.alone:.2f} | {idle} |"
            f" {row.apart:.0e} |"
        )
    return "\n".join(lines)


def main(_) -> None:
    """Print the table."""
    jax.config.update("jax_platforms", "cpu")
    print(table(rows(json.loads(RECORDS.read_text()))))


if __name__ == "__main__":
    command.run(main)
