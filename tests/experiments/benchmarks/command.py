"""Benchmarks run as users run them: as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import compiling

ROOT = Path(__file__).parents[3]
KEYS = {
    "config",
    "mode",
    "precision",
    "shape",
    "value",
    "unit",
    "yardstick",
    "device",
    "jax",
    "date",
    "commit",
    "command",
}


def run(module: str, arguments: list[str], results: Path) -> tuple[list[dict[str, Any]], str]:
    """Run `python -m module` on the CPU; return the records that it wrote to `results`, all of them complete, and what
    it printed. Records of a mesh have its axes besides.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, f"--json={results}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.FLAGS},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(results.read_text())
    assert all(set(record) - {"mesh"} == KEYS for record in records)
    return records, done.stdout
