"""R1's stages with several seeds, and a control whose reward knows nothing: what GRPO adds, with intervals.

    python -m experiments.studies.r1_seeds --runs=runs/r1_seeds

Runs `configs/tiny_r1.py` with the seeds 0, 1 and 2 into `RUNS/seed_<n>`, and its control, `tiny_r1.py:chance`, with
seed 0 into `RUNS/chance`; what is done there already is read. So the runs may also be made beforehand, side by side:
`python -m experiments.r1 --config.seed=1 --workdir=runs/r1_seeds/seed_1`. Writes records and a drawing; the records in
`results` say in "runs" how theirs were made.

A run has an interval of its own, Wilson's over its held-out problems. That of the mean over the seeds is Student's, of
the differences behind and before `reasoning`; both are of 95%.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from absl import flags

from configs import tiny_r1
from deepseek_jax.inputs import new_folder
from deepseek_jax.palette import GRAY, SERIES
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import r1_report
from deepseek_jax.posttraining.r1_settings import Plan
from deepseek_jax.training.metrics import read_rows
from experiments import command, session
from experiments.studies import output
from experiments.studies.r1_accuracies import accuracies, kept_of, record_of
from experiments.studies.runs import RUNS
from experiments.studies.stages import run_stages
from pallas_kernels.bench import records

STAGES = flags.DEFINE_integer("stages", len(tiny_r1.STAGES), "Stages of each run.", lower_bound=2)

SEEDS = (0, 1, 2)
STUDENT_T = 4.302652729911275  # 97.5% of Student's distribution with len(SEEDS) - 1 degrees of freedom
BEFORE, BEHIND, CONTROL = "cold_start", "reasoning", "chance"


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("r1")
    session.start()
    plans = {f"seed_{seed}": (tiny_r1.get_config(), seed) for seed in SEEDS} | {
        CONTROL: (tiny_r1.get_config(CONTROL), SEEDS[0])
    }
    runs = {}
    for name, (config, seed) in plans.items():
        tree = config.to_dict()
        tree["r1"]["num_stages"] = min(STAGES.value, tree["r1"]["num_stages"])
        tree["seed"] = seed
        runs[name] = run_stages(tree, workdir / name)
    common = records.provenance("experiments.studies.r1_seeds", session.describe_device(make_mesh(plan_mesh(runs))))
    found = records_of({name: r1_report.results(plan, workdir / name) for name, plan in runs.items()})
    found += [record for name, plan in runs.items() for record in kept_of(name, plan, workdir / name)]
    records.write(folder / "r1_seeds.json", [record | common for record in found])
    draw(runs, workdir).savefig(folder / "r1_seeds.png", dpi=100)
    for record in found:
        value = f"{record['value']:.1%}" if record["unit"] == "share" else f"{record['value']:,}"
        print(f"{record['config']:<10}{record['op']:<46}{value:>7}")


def plan_mesh(runs: dict[str, Plan]) -> Any:
    """Return the mesh that all runs share."""
    plan = next(iter(runs.values()))
    return plan.settings(plan.stages[0], Path())[0].mesh


def records_of(results: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the records of runs by name, each with its results by stage."""
    found = [record for name, stages in results.items() for record in accuracies(name, stages)]
    gains = {
        name: stages[BEHIND]["eval/accuracy"] - stages[BEFORE]["eval/accuracy"] for name, stages in results.items()
    }
    found += [record_of(name, f"{BEHIND} adds", gain) for name, gain in gains.items()]
    of_seeds = [gain for name, gain in gains.items() if name != CONTROL]
    mean, low, high = student(of_seeds)
    return [*found, record_of("all seeds", f"{BEHIND} adds, mean", mean) | {"low": low, "high": high}]


def student(values: list[float]) -> tuple[float, float, float]:
    """Return the mean of `len(SEEDS)` values and the ends of its 95% interval."""
    assert len(values) == len(SEEDS)
    mean = statistics.fmean(values)
    half = STUDENT_T * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def draw(runs: dict[str, Plan], workdir: Path):
    """Draw the curves of the first GRPO of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    colours = dict(zip(runs, SERIES, strict=False)) | {CONTROL: GRAY}
    for name in runs:
        rows = read_rows(workdir / name / BEHIND)
        held_out = [row for row in rows if r1_report.HELD_OUT in row]
        for axes, (key, title) in zip(panels, r1_report.PANELS.items(), strict=False):
            curve = [row for row in rows if key in row]
            axes.plot([row["step"] for row in curve], [row[key] for row in curve], color=colours[name], lw=0.8)
            axes.set(title=title.partition(":")[0] + (" of samples" if "accuracy" in key else ""), xlabel="update")
        shares = [row[r1_report.HELD_OUT] for row in held_out]
        panels[-1].plot([row["step"] for row in held_out], shares, "o-", color=colours[name], label=name)
    panels[-1].set(title="held-out accuracy", xlabel="update", ylim=(0, 1))
    panels[-1].legend()
    return figure


if __name__ == "__main__":
    command.run(main)
