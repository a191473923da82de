"""GRPO on one device and on two, from the same cold start: rewards, held-out accuracy, and how far the weights part.

    python -m experiments.studies.grpo_meshes --runs=runs/grpo_meshes --cpu_devices=2

Makes the cold start of `configs/tiny_r1.py` in RUNS, unless RUNS has it, and a few updates of its stage `reasoning`
from there in a folder for each of `KINDS`: on one device, on two that share the samples, on two that share the experts.
All have the same prompts and the same seeds of draws, so they are one run up to rounding. How far rounding alone moves
it says the control: one device that adds up an update in two micro-batches, which is the same sum. What is done is
read. Writes records and a drawing.
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
from deepseek_jax.palette import BLUE, GRAY, GREEN, ORANGE
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import r1
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.r1_settings import read_plan
from deepseek_jax.training.journal import say
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.weights import restore_weights
from experiments import command, session
from experiments.studies import output
from experiments.studies.runs import RUNS
from pallas_kernels.bench import records

SEED = flags.DEFINE_integer("seed", 0, "Of the weights, the problems and the draws.")
STEPS = flags.DEFINE_integer("steps", 10, "Updates of each run.", lower_bound=2)

ONE = "one"
# Folder to the name of a run, its devices, what of the stage is changed, and its colour.
KINDS = {
    ONE: ("one device", 1, {"mesh.data": 1}, BLUE),
    "halves": ("one device, two micro-batches", 1, {"mesh.data": 1, "training.micro_batch_size": 128}, GRAY),
    "data": ("mesh.data = 2", 2, {"mesh.data": 2}, ORANGE),
    "expert": ("mesh.expert = 2", 2, {"mesh.data": 1, "mesh.expert": 2}, GREEN),
}
# Of the first update, which all begin with the same weights.
FIRST = "rollout/reward", "rollout/length", "policy/tokens", "policy/entropy", "optimizer/grad_norm"
CURVES = "rollout/reward", "rollout/length", "policy/entropy", "optimizer/grad_norm"
MEANS = {"rollout/reward": "1", "rollout/sampler_difference_max": "nats", "speed/step_seconds": "s"}
HELD_OUT = "eval/accuracy"


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("grpo_meshes")
    session.start()
    if (count := len(jax.devices())) != 2:
        raise ValueError(f"there are {count} devices, and the study is of two; simulate them with --cpu_devices=2")
    workdir.mkdir(parents=True, exist_ok=True)
    changes = {kind: change_of(workdir, kind) for kind in KINDS}
    rows = {kind: read_rows(workdir / kind) for kind in KINDS}
    common = records.provenance("experiments.studies.grpo_meshes --cpu_devices=2", "2 x cpu, simulated, 2 cores")
    found = [record for kind in KINDS for record in records_of(kind, rows, changes)]
    records.write(folder / "grpo_meshes.json", [record | common for record in found])
    draw(rows).savefig(folder / "grpo_meshes.png", dpi=100)
    for record in found:
        print(f"{record['mode']:<32}{record['op']:<46}{record['value']:>14.7g} {record['unit']}")


def change_of(workdir: Path, kind: str) -> np.ndarray:
    """Run one kind, and the cold start before it where that is missing; return how it changed the weights, flat."""
    _, count, changes, _ = KINDS[kind]
    tree = tiny_r1.get_config().to_dict() | {"seed": SEED.value}
    tree["r1"]["num_stages"] = 1
    plan = read_plan(tree, workdir)
    stop_if(r1.run_stages(plan, workdir, say))
    stage = plan.measure
    changes, settings = stage.changes | changes, stage.settings | {"steps": STEPS.value}
    config, posttraining = plan.settings(dataclasses.replace(stage, changes=changes, settings=settings), workdir)
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    result = train_grpo(config, posttraining, workdir / kind, mesh)
    stop_if(result.interrupted_by)
    with jax.set_mesh(mesh):
        begin = restore_weights(config, workdir / "cold_start", mesh)[0].params
    moved = jax.tree.map(lambda a, b: np.ravel(np.asarray(a) - np.asarray(b)), result.state["params"], begin)
    return np.concatenate(jax.tree.leaves(moved))


def stop_if(signal: int | None) -> None:
    """End the study where a signal ended a run."""
    if signal is not None:
        sys.exit(128 + signal)


def records_of(kind: str, rows: dict[str, list[dict]], changes: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the records of a run."""
    common = {"config": f"tiny_r1 reasoning, seed {SEED.value}", "mode": KINDS[kind][0], "precision": "fp32"}
    updates, of_one = ([row for row in rows[name] if "policy/loss" in row] for name in (kind, ONE))
    found = [{"op": f"{key}, update 1", "value": updates[0][key], "unit": "1"} for key in FIRST]
    for key, unit in MEANS.items():
        mean = float(np.mean([row[key] for row in updates[1:]]))
        found.append({"op": f"mean {key}, updates 2 to {len(updates)}", "value": mean, "unit": unit})
    apart = next((a["step"] for a, b in zip(updates, of_one, strict=True) if differs(a, b)), 0)
    found.append({"op": "first update with other samples than one device's", "value": apart, "unit": "update, 0: none"})
    distance = np.linalg.norm(changes[kind] - changes[ONE]) / np.linalg.norm(changes[ONE])
    found.append({"op": "distance of weights from one device's", "value": float(distance), "unit": "of their change"})
    for row in [row for row in rows[kind] if HELD_OUT in row]:
        interval = {"low": row[f"{HELD_OUT}_low"], "high": row[f"{HELD_OUT}_high"]}
        what = {"op": f"held-out accuracy at {row['step']}", "value": row[HELD_OUT], "unit": "share"}
        found.append(what | interval)
    return [common | record for record in found]


def differs(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two updates had other samples: as many tokens and rewards are those of the same ones."""
    return any(row[key] != other[key] for key in ("rollout/reward", "rollout/length", "policy/tokens"))


def draw(rows: dict[str, list[dict]]):
    """Draw the curves of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, key in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for kind, style in zip(KINDS, ("-", "--", ":", "-."), strict=True):
            name, _, _, colour = KINDS[kind]
            updates = [row for row in rows[kind] if key in row]
            axes.plot([row["step"] for row in updates], [row[key] for row in updates], style, color=colour, label=name)
        axes.set(title=key, xlabel="update")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)
