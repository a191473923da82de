"""GRPO whose rollouts are made after, or beside, its updates: seconds of an update, and held-out accuracy.

    python -m experiments.studies.asynchronous --runs=runs/asynchronous

Makes the cold start of `configs/tiny_r1.py` in RUNS, unless RUNS has it, and its stage `reasoning` from there in
RUNS/staleness_0 and RUNS/staleness_1, a few updates of each in turn, so that what else the machine does meets both.
What is done is read. A turn's first update waits for its samples in every mode, and is left out of the medians. CPU
seconds are those of a whole turn: its start, its evaluation and its rewards too.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from absl import flags

from configs import tiny_r1
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import new_folder
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.r1_settings import Plan
from deepseek_jax.training.metrics import read_rows
from experiments import command, session
from experiments.studies import output
from experiments.studies.runs import RUNS
from experiments.studies.stages import config_name, run_stages, stop_if
from pallas_kernels.bench import records

SEED = flags.DEFINE_integer("seed", 0, "Of the weights, the problems and the draws.")
STALENESS = flags.DEFINE_list("staleness", ["0", "1"], "Updates that rollouts may be behind, one run for each.")
STEPS = flags.DEFINE_integer("steps", 30, "Updates of each run.", lower_bound=2)
TURN = flags.DEFINE_integer("turn", 10, "Updates of one run before the next has its turn.", lower_bound=2)

TIMES = "speed/step_seconds", "rollout/seconds", "rollout/waited"


def main(_) -> None:
    """Run what is not done, and write."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("asynchronous")
    session.start()
    tree: dict[str, Any] = tiny_r1.get_config().to_dict() | {"seed": SEED.value}
    tree["r1"]["num_stages"] = 1
    plan = run_stages(tree, workdir)
    runs = {int(text): workdir / f"staleness_{text}" for text in STALENESS.value}
    for steps in range(TURN.value, STEPS.value + TURN.value, TURN.value):
        for staleness, run in runs.items():
            take_turn(plan, workdir, run, staleness, min(steps, STEPS.value))
    mesh = make_mesh(plan.settings(plan.measure, workdir)[0].mesh)
    common = records.provenance("experiments.studies.asynchronous", session.describe_device(mesh))
    common |= {"config": f"{config_name(plan)}, {plan.measure.name}", "precision": "fp32"}
    found = [record for staleness, run in runs.items() for record in records_of(staleness, run)]
    records.write(folder / f"asynchronous_{SEED.value}.json", [record | common for record in found])
    for record in found:
        print(f"{record['mode']:<14}{record['op']:<34}{record['value']:>10.3f} {record['unit']}")


def take_turn(plan: Plan, workdir: Path, run: Path, staleness: int, steps: int) -> None:
    """Train one run up to `steps`; note its CPU seconds."""
    config, posttraining = plan.settings(plan.measure, workdir)
    assert posttraining.grpo is not None
    own = dataclasses.replace(posttraining.grpo, staleness=staleness, steps=steps)
    note, before = run.with_name(f"{run.name}_{steps}.json"), os.times()
    if note.exists():
        return
    start = time.monotonic()
    stop_if(train_grpo(config, dataclasses.replace(posttraining, grpo=own), run).interrupted_by)
    used = sum(os.times()[:4]) - sum(before[:4])  # of this process and of those that rewarded
    write_atomically(note, json.dumps({"cpu": used, "wall": time.monotonic() - start}) + "\n")


def records_of(staleness: int, run: Path) -> list[dict]:
    """Return the records of a run."""
    rows = read_rows(run)
    updates = [row for row in rows if "policy/loss" in row and row["step"] % TURN.value != 1]
    evaluated = [row for row in rows if "eval/accuracy" in row]
    turns = [json.loads(path.read_text()) for path in sorted(run.parent.glob(f"{run.name}_*.json"))]
    common = {"mode": f"staleness {staleness}"}
    found = [
        common | {"op": f"median {key}", "value": statistics.median(row[key] for row in updates), "unit": "s"}
        for key in TIMES
    ]
    found += [
        common | {"op": f"{key} seconds of all turns", "value": sum(turn[key] for turn in turns), "unit": "s"}
        for key in ("cpu", "wall")
    ]
    for row in evaluated:
        interval = {"low": row["eval/accuracy_low"], "high": row["eval/accuracy_high"]}
        what = {"op": f"held-out accuracy at {row['step']}", "value": row["eval/accuracy"], "unit": "share"}
        found.append(common | what | interval)
    largest = max(row["policy/staleness"] for row in updates)
    return [*found, common | {"op": "largest staleness", "value": largest, "unit": "updates"}]


if __name__ == "__main__":
    command.run(main)
