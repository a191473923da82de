"""What R1's stages gave, for a person: a table of accuracy, and curves of reinforcement learning."""

from pathlib import Path
from typing import Any

from deepseek_jax.inputs import read_json
from deepseek_jax.palette import BLUE, SERIES
from deepseek_jax.posttraining.r1_settings import RANDOM, RESULTS, Plan, base_of
from deepseek_jax.training.metrics import read_rows

# Key of the metrics to title.
PANELS = {
    "rollout/reward": "reward",
    "rollout/accuracy": "accuracy: samples (line), held out (dots)",
    "rollout/length": "tokens of a sample",
    "policy/kl": "KL to the reference, nats a token",
    "policy/entropy": "entropy, nats a token",
}
HELD_OUT = "eval/accuracy"


def results(plan: Plan, workdir: Path) -> dict[str, dict[str, Any]]:
    """Return name to result, of the stages that are done, in their order; random weights come before their stage."""
    names = []
    for stage in plan.stages:
        names += [base_of(stage)] if stage.initial == RANDOM else []
        names += [stage.name] if stage.kind != "samples" else []
    paths = {name: workdir / RESULTS / f"{name}.json" for name in names}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def table(plan: Plan, workdir: Path) -> str:
    """Return the accuracy behind each stage, as lines."""
    lines = [f"{'behind':<20}{'held out':>9}   95% interval     tokens"]
    for name, row in results(plan, workdir).items():
        interval = f"{row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%}"
        lines.append(f"{name:<20}{row[HELD_OUT]:>9.1%}   {interval:<17}{row['eval/length']:>5.1f}")
    return "\n".join(lines)


def draw(plan: Plan, workdir: Path) -> Path | None:
    """Draw the curves of the stages of GRPO; return the drawing, or None if none has begun."""
    from matplotlib.figure import Figure

    runs = [(stage.name, workdir / stage.name) for stage in plan.stages if stage.kind == "grpo"]
    curves = {name: read_rows(folder) for name, folder in runs if (folder / "metrics.jsonl").exists()}
    if not curves:
        return None
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (key, title) in zip(panels, PANELS.items(), strict=False):
        for (name, rows), colour in zip(curves.items(), SERIES, strict=False):
            found = [row for row in rows if key in row]
            axes.plot([row["step"] for row in found], [row[key] for row in found], color=colour, label=name)
            if key == "rollout/accuracy":
                seen = [row for row in rows if HELD_OUT in row]
                axes.plot([row["step"] for row in seen], [row[HELD_OUT] for row in seen], "o", color=colour)
        axes.set(title=title, xlabel="update")
        axes.set_ylim(bottom=0)
    panels[0].legend()
    _draw_stages(panels[len(PANELS)], results(plan, workdir))
    path = workdir / "r1.png"
    figure.savefig(path, dpi=100)
    return path


def _draw_stages(axes, rows: dict[str, dict[str, Any]]) -> None:
    shares = [row[HELD_OUT] for row in rows.values()]
    ends = [[row[HELD_OUT] - row[f"{HELD_OUT}_low"] for row in rows.values()]]
    ends.append([row[f"{HELD_OUT}_high"] - row[HELD_OUT] for row in rows.values()])
    axes.barh(list(rows), shares, xerr=[[max(0.0, end) for end in side] for side in ends], color=BLUE, alpha=0.6)
    axes.invert_yaxis()
    axes.set(title="held-out accuracy behind each stage", xlim=(0, 1))
