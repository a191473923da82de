"""GRPO on one device and on two, from the same cold start: rewards, and held-out accuracy.

    python -m experiments.studies.grpo_meshes --runs=runs/grpo_meshes --cpu_devices=2

Makes the first two stages of `configs/tiny_r1.py` in RUNS on one of the two devices, the cold start and `reasoning`,
unless RUNS has them: it may be the workdir of `experiments.r1`, with the same --config. The latter is the run of one
device. The first updates of `reasoning` are made again from the same cold start on two devices that share the samples
(RUNS/data), and on two that share the experts (RUNS/expert). All have the same prompts and the same seeds of draws, so
they are one run up to the order of sums: the first rollouts must be equal, until rounding draws another token
somewhere. Tokens themselves are not compared: what is, is in `SAMPLES`. What is done is read. Writes records and a
drawing.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.inputs import new_folder
from deepseek_jax.palette import BLUE, GREEN, ORANGE
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.r1_settings import Plan, R1Config
from deepseek_jax.posttraining.settings import Posttraining
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.record import read_sealed
from deepseek_jax.training.saved import CHECKPOINTS, stored_steps
from experiments import command, recipe, session
from experiments.studies import output
from experiments.studies.runs import RUNS
from experiments.studies.stages import config_name, run_stages, stop_if
from pallas_kernels.bench import records

CONFIG = recipe.Recipe("configs/tiny_r1.py", "Configuration with a section `r1`.", schema=R1Config)
STEPS = flags.DEFINE_integer("steps", 20, "Updates of each run.", lower_bound=2, upper_bound=30)

ONE = "reasoning"
# Folder to the name of a run, its mesh, and its colour.
KINDS = {
    ONE: ("one device", {}, BLUE),
    "data": ("mesh.data = 2", {"mesh.data": 2, "mesh.expert": 1}, ORANGE),
    "expert": ("mesh.expert = 2", {"mesh.data": 1, "mesh.expert": 2}, GREEN),
}
# Equal where the samples are, and equal by chance alone where they are not; the last is tokens by layer and expert.
SAMPLES = "rollout/reward", "rollout/reward_std", "rollout/length", "policy/tokens", "router/load"
SUMS = {"policy/entropy": "nats", "optimizer/grad_norm": "1"}  # differ by the order of sums
FIGURES = {"rollout/reward": "1", "rollout/length": "tokens", "policy/tokens": "tokens"} | SUMS
FIGURES |= {"rollout/sampler_difference_max": "nats", "speed/step_seconds": "s"}
CURVES = "rollout/reward", "rollout/length", "policy/entropy", "optimizer/grad_norm"
HELD_OUT = "eval/accuracy"


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("grpo_meshes")
    session.start()
    if (count := len(jax.devices())) != 2:
        raise ValueError(f"there are {count} devices, and the study is of two; simulate them with --cpu_devices=2")
    assert CONFIG.value is not None  # it has a default
    tree = CONFIG.value.to_dict()
    tree["r1"]["num_stages"] = 2
    plan = run_stages(tree, workdir, jax.devices()[:1])
    check_one_device(workdir / ONE)
    for kind in KINDS:
        if kind != ONE:
            train(plan, workdir, kind)
    rows = {kind: [row for row in read_rows(workdir / kind) if row["step"] <= STEPS.value] for kind in KINDS}
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        devices = jax.devices()[: 1 if kind == ONE else 2]
        mesh = make_mesh(settings(plan, workdir, kind)[0].mesh, devices)
        common = records.provenance("experiments.studies.grpo_meshes", session.describe_device(mesh))
        common |= {"config": f"{config_name(plan)}, {ONE}", "precision": "fp32"}
        found += [record | common for record in records_of(kind, rows)]
    records.write(folder / "grpo_meshes.json", found)
    draw(rows).savefig(folder / "grpo_meshes.png", dpi=100)
    for record in found:
        print(f"{record['mode']:<16}{record['op']:<64}{record['value']:>14.7g} {record['unit']}")


def check_one_device(run: Path) -> None:
    """Refuse a run of one device that was made on several, by its last checkpoint."""
    environment = read_sealed(run / CHECKPOINTS / str(stored_steps(run)[-1]) / "run")["environment"]
    if (count := math.prod(environment["mesh"].values())) != 1:
        raise ValueError(
            f"{run} was made on {count} devices, and the study begins with a run of one; give a new --runs"
        )


def settings(plan: Plan, workdir: Path, kind: str) -> tuple[Config, Posttraining]:
    """Return what the updates of one kind take."""
    stage = plan.measure
    changes, own = stage.changes | KINDS[kind][1], stage.settings | {"steps": STEPS.value}
    return plan.settings(dataclasses.replace(stage, changes=changes, settings=own), workdir)


def train(plan: Plan, workdir: Path, kind: str) -> None:
    """Make the updates of one kind."""
    config, posttraining = settings(plan, workdir, kind)
    stop_if(train_grpo(config, posttraining, workdir / kind, make_mesh(config.mesh)).interrupted_by)


def records_of(kind: str, rows: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Return the records of a run."""
    updates, of_one = ([row for row in rows[name] if "policy/loss" in row] for name in (kind, ONE))
    found: list[dict[str, Any]] = []
    for key, unit in FIGURES.items():
        values = [row[key] for row in updates]
        what = {"op": f"mean {key}, updates 2 to {len(updates)}", "value": float(np.mean(values[1:])), "unit": unit}
        found.append(what | {"by_update": values})
    for key in SUMS if kind != ONE else ():
        apart = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(updates, of_one, strict=True))
        found.append({"op": f"{key}, largest relative difference to one device's", "value": apart, "unit": "1"})
    for key in SAMPLES if kind != ONE else ():
        equal = sum(a[key] == b[key] for a, b in zip(updates, of_one, strict=True))
        found.append({"op": f"{key}, updates equal to one device's", "value": equal, "unit": f"of {len(updates)}"})
    for row in [row for row in rows[kind] if HELD_OUT in row]:
        interval = {"low": row[f"{HELD_OUT}_low"], "high": row[f"{HELD_OUT}_high"]}
        what = {"op": f"held-out accuracy at {row['step']}", "value": row[HELD_OUT], "unit": "share"}
        found.append(what | interval)
    return [{"mode": KINDS[kind][0]} | record for record in found]


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
