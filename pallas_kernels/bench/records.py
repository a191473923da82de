"""Records of measurements: JSON lists of dictionaries that say what was measured, and how to measure it again."""

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

OUTPUTS = ("--json", "--plot")  # flags that say where results are written


def provenance(module: str, device: str) -> dict[str, str]:
    """Return what a record needs to be repeated: device, version of JAX, date, commit, command.

    Args:
        module: what `python -m` was called with; its arguments are those of this process.
        device: number and kind of the devices, such as "1 x NVIDIA H200".
    """
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "device": device,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "not a git checkout",
        "command": shlex.join(["python", "-m", module, *_without_outputs(sys.argv[1:])]),
    }


def _without_outputs(arguments: list[str]) -> list[str]:
    """Arguments without --json and --plot: where results were written did not make them, and names a folder of one
    machine.
    """
    pairs = zip([None, *arguments], arguments, strict=False)
    return [
        argument for before, argument in pairs if before not in OUTPUTS and argument.partition("=")[0] not in OUTPUTS
    ]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write `records` to `path`, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n")
