"""What a folder of R1's stages keeps of its plan, and which changes of it are refused when the stages continue."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.posttraining.r1_settings import RESULTS, Plan
from deepseek_jax.training.workdir import is_claimed

RECORD = "r1.json"


def keep_plan(plan: Plan, workdir: Path) -> None:
    """Write the plan into `workdir`, or refuse one that contradicts what is there.

    `num_stages` may differ, and stages that have not begun may.

    Raises:
        ValueError: another key differs; the message names the first that does. Or the folder is a run's.
    """
    if is_claimed(workdir):
        raise ValueError(f"{shown(str(workdir))} holds a run, and stages are folders of their own; name a new folder")
    ours = json.loads(json.dumps({"shared": plan.shared, "r1": dataclasses.asdict(plan.r1) | {"num_stages": 0}}))
    path = workdir / RECORD
    stored = read_json(path) if path.exists() else None
    if stored and (difference := _difference(_fixed(stored, workdir), _fixed(ours, workdir), "config")):
        raise ValueError(
            f"{shown(str(workdir))} holds stages with other settings: {difference}; give its values, or a new folder"
            " (only stages that have not begun may change)"
        )
    if stored != ours:
        write_atomically(path, json.dumps(ours, indent=1) + "\n")


def _fixed(record: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Return what may not change of a record: all but the stages that have not begun, and the one that measures."""
    stages, measured = record["r1"]["stages"], (workdir / RESULTS).exists()
    measure = next((stage for stage in stages if stage["kind"] == "grpo"), {"name": ""})
    fixed = {s["name"]: s for s in stages if _has_begun(s["name"], workdir) or (measured and s is measure)}
    return record | {"r1": record["r1"] | {"stages": fixed, "measured by": measure["name"] if measured else ""}}


def _has_begun(name: str, workdir: Path) -> bool:
    return any((workdir / made).exists() for made in (name, f"{name}.jsonl", f"{name}_random"))


def _difference(stored: Any, ours: Any, path: str) -> str:
    if isinstance(stored, dict) and isinstance(ours, dict):
        keys = sorted(stored.keys() | ours.keys())
        return next(filter(None, (_difference(stored.get(k), ours.get(k), f"{path}.{k}") for k in keys)), "")
    if isinstance(stored, list) and isinstance(ours, list) and len(stored) == len(ours):
        pairs = enumerate(zip(stored, ours, strict=True))
        return next(filter(None, (_difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)), "")
    return "" if stored == ours else f"{path} is {shown(repr(stored))} there, and {shown(repr(ours))} here"
