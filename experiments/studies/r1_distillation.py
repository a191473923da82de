"""A smaller model that learns what a larger one knows: by its answers, by its probabilities, and without it.

    python -m experiments.studies.r1_distillation --runs=runs/r1_distillation

Runs `configs/tiny_r1.py:distill` from nothing, with each seed into `RUNS/seed_<n>`; what is done there is read. Writes
records with Wilson's 95% intervals over the held-out problems, and a drawing.
"""

from pathlib import Path
from typing import Any

from absl import flags

from configs import tiny_r1
from deepseek_jax.inputs import new_folder
from deepseek_jax.palette import SERIES
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import r1_report
from deepseek_jax.posttraining.r1_report import HELD_OUT
from deepseek_jax.training.journal import say
from deepseek_jax.training.metrics import read_rows
from experiments import command, session
from experiments.studies import output
from experiments.studies.r1_accuracies import accuracies, kept_of
from experiments.studies.runs import RUNS
from experiments.studies.stages import config_name, run_stages
from pallas_kernels.bench import records

SEEDS = flags.DEFINE_list("seeds", ["0"], "Of the weights, the problems and the draws; a run of eight stages for each.")

CURVES = "small_both", "small_on_policy", "small_grpo"  # stages


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("r1")
    session.start()
    plans, results, found = {}, {}, []
    for seed in SEEDS.value:
        name = f"seed_{seed}"
        tree = tiny_r1.get_config(tiny_r1.DISTILL).to_dict() | {"seed": int(seed)}
        plan = plans[name] = run_stages(tree, workdir / name)
        results[name] = r1_report.results(plan, workdir / name)
        found += [*accuracies(config_name(plan), results[name]), *kept_of(config_name(plan), plan, workdir / name)]
        say(f"\n{name}\n{r1_report.table(plan, workdir / name)}")
    first = next(iter(plans.values()))
    device = session.describe_device(make_mesh(first.settings(first.stages[0], workdir)[0].mesh))
    common = records.provenance("experiments.studies.r1_distillation", device)
    records.write(folder / "distill.json", [record | common for record in found])
    draw(results, workdir).savefig(folder / "distill.png", dpi=100)


def draw(results: dict[str, dict[str, dict[str, Any]]], workdir: Path):
    """Draw accuracy behind each stage with its interval, and how it grew, of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, stages) in enumerate(results.items()):
        places = [place + 0.2 * i for place in range(len(stages))]
        shares = [row[HELD_OUT] for row in stages.values()]
        ends = [[abs(row[HELD_OUT] - row[f"{HELD_OUT}_{end}"]) for row in stages.values()] for end in ("low", "high")]
        left.errorbar(shares, places, xerr=ends, fmt="o", color=SERIES[i], label=name.replace("_", " "), capsize=2)
        left.set_yticks(range(len(stages)), [*stages])
        for stage, style in zip(CURVES, ("-", "--", ":"), strict=True):
            seen = [row for row in read_rows(workdir / name / stage) if HELD_OUT in row]
            curve = [row["step"] for row in seen], [row[HELD_OUT] for row in seen]
            right.plot(*curve, style, marker="o", color=SERIES[i], label=None if i else stage)
    left.set(xlim=(-0.02, 1.02), xlabel="held-out accuracy behind each stage, 95% interval")
    left.invert_yaxis()
    if len(results) > 1:
        left.legend(frameon=False, loc="center")
    right.set(xlabel="update", ylabel="held-out accuracy", ylim=(-0.02, 1.02))
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)
