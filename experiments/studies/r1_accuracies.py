"""The records of runs of R1's stages: held-out accuracy behind each stage, and the samples that were kept."""

from pathlib import Path
from typing import Any

from deepseek_jax.posttraining.r1_settings import Plan


def accuracies(name: str, stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a run's results by stage, with Wilson's 95% intervals."""
    return [
        record_of(name, f"held-out accuracy behind {stage}", row["eval/accuracy"])
        | {"low": row["eval/accuracy_low"], "high": row["eval/accuracy_high"], "tokens": row["eval/length"]}
        for stage, row in stages.items()
    ]


def kept_of(name: str, plan: Plan, workdir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's samples: how many different right answers were kept."""
    paths = [workdir / f"{stage.name}.jsonl" for stage in plan.stages if stage.kind == "samples"]
    return [
        record_of(name, f"right answers kept in {path.stem}", len(path.read_text("utf-8").splitlines()))
        | {"mode": "temperature 1", "unit": "answers"}
        for path in paths
    ]


def record_of(name: str, what: str, value: float) -> dict[str, Any]:
    """Return a record of a share."""
    return {"op": what, "config": name, "mode": "greedy", "precision": "fp32", "value": value, "unit": "share"}
