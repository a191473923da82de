"""GRPO on one device and on two, from the same cold start: rewards, and held-out accuracy.

    python -m experiments.studies.grpo_meshes --runs=runs/grpo_meshes --cpu_devices=2

Makes the first two stages of `configs/tiny_r1.py` in RUNS, the cold start and `reasoning`, unless RUNS has them; the
latter is the run of one device. The first updates of `reasoning` are made again from the same cold start on two devices
that share the samples (RUNS/data), and on two that share the experts (RUNS/expert). All have the same prompts and the
same seeds of draws, so they are one run up to the order of sums: the first rollouts must be equal, until rounding draws
another token somewhere. What is done is read. Writes records and a drawing.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import tiny_r1
from deepseek_jax.inputs import new_folder
from deepseek_jax.palette import BLUE, GREEN, ORANGE
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import r1
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.r1_settings import Plan, read_plan
from deepseek_jax.training.journal import say
from deepseek_jax.training.metrics import read_rows
from experiments import command, session
from experiments.studies import output
from experiments.studies.runs import RUNS
from pallas_kernels.bench import records

SEED = flags.DEFINE_integer("seed", 0, "Of the weights, the problems and the draws.")
STEPS = flags.DEFINE_integer("steps", 20, "Updates of each run.", lower_bound=2, upper_bound=30)

ONE = "reasoning"
# Folder to the name of a run, its mesh, and its colour.
KINDS = {
    ONE: ("one device", {}, BLUE),
    "data": ("mesh.data = 2", {"mesh.data": 2, "mesh.expert": 1}, ORANGE),
    "expert": ("mesh.expert = 2", {"mesh.data": 1, "mesh.expert": 2}, GREEN),
}
# Of the first update, which all begin with the same weights.
FIRST = "rollout/reward", "rollout/length", "policy/tokens", "policy/entropy", "optimizer/grad_norm"
MEANS = {"rollout/reward": "1", "rollout/sampler_difference_max": "nats", "speed/step_seconds": "s"}
CURVES = "rollout/reward", "rollout/length", "policy/entropy", "optimizer/grad_norm"
HELD_OUT = "eval/accuracy"


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("grpo_meshes")
    session.start()
    if (count := len(jax.devices())) != 2:
        raise ValueError(f"there are {count} devices, and the study is of two; simulate them with --cpu_devices=2")
    tree: dict[str, Any] = tiny_r1.get_config().to_dict() | {"seed": SEED.value}
    tree["mesh"]["data"] = 1  # of the stages before
    tree["r1"]["num_stages"] = 2
    plan = read_plan(tree, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    stop_if(r1.run_stages(plan, workdir, say))
    for kind in KINDS:
        if kind != ONE:
            train(plan, workdir, kind)
    rows = {kind: [row for row in read_rows(workdir / kind) if row["step"] <= STEPS.value] for kind in KINDS}
    common = records.provenance("experiments.studies.grpo_meshes", "cpu, 2 cores; two devices are simulated")
    found = [record for kind in KINDS for record in records_of(kind, rows)]
    records.write(folder / "grpo_meshes.json", [record | common for record in found])
    draw(rows).savefig(folder / "grpo_meshes.png", dpi=100)
    for record in found:
        print(f"{record['mode']:<16}{record['op']:<52}{record['value']:>14.7g} {record['unit']}")


def train(plan: Plan, workdir: Path, kind: str) -> None:
    """Make the updates of one kind."""
    stage = plan.measure
    changes, settings = stage.changes | KINDS[kind][1], stage.settings | {"steps": STEPS.value}
    config, posttraining = plan.settings(dataclasses.replace(stage, changes=changes, settings=settings), workdir)
    stop_if(train_grpo(config, posttraining, workdir / kind, make_mesh(config.mesh)).interrupted_by)


def stop_if(signal: int | None) -> None:
    """End the study where a signal ended a run."""
    if signal is not None:
        sys.exit(128 + signal)


def records_of(kind: str, rows: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Return the records of a run."""
    common = {"config": f"tiny_r1 reasoning, seed {SEED.value}", "mode": KINDS[kind][0], "precision": "fp32"}
    updates, of_one = ([row for row in rows[name] if "policy/loss" in row] for name in (kind, ONE))
    found = [{"op": f"{key}, update 1", "value": updates[0][key], "unit": "1"} for key in FIRST]
    for key, unit in MEANS.items():
        mean = float(np.mean([row[key] for row in updates[1:]]))
        found.append({"op": f"mean {key}, updates 2 to {len(updates)}", "value": mean, "unit": unit})
    apart = next((a["step"] for a, b in zip(updates, of_one, strict=True) if differs(a, b)), 0)
    found.append({"op": "first update with other samples than one device's", "value": apart, "unit": "0: none"})
    for row in [row for row in rows[kind] if HELD_OUT in row]:
        interval = {"low": row[f"{HELD_OUT}_low"], "high": row[f"{HELD_OUT}_high"]}
        what = {"op": f"held-out accuracy at {row['step']}", "value": row[HELD_OUT], "unit": "share"}
        found.append(what | interval)
    return [common | record for record in found]


def differs(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two updates had other samples: as many tokens and the same rewards are those of the same ones."""
    return any(row[key] != other[key] for key in ("rollout/reward", "rollout/length", "policy/tokens"))


def draw(rows: dict[str, list[dict]]):
    """Draw the curves of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, key in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for kind, style in zip(KINDS, ("-", "--", ":"), strict=True):
            name, _, colour = KINDS[kind]
            updates = [row for row in rows[kind] if key in row]
            axes.plot([row["step"] for row in updates], [row[key] for row in updates], style, color=colour, label=name)
        axes.set(title=key, xlabel="update")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)
