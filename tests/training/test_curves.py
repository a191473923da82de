"""Drawing leaves the plotting of the program that imports us alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def output_of(program):
    """Return what a fresh Python process prints that runs `program`."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_loop_and_the_curves_does_not_import_matplotlib():
    imports = "import sys, deepseek_jax.training.curves, deepseek_jax.training.loop"
    assert output_of(f"{imports}; print('matplotlib' in sys.modules)") == "False"


def test_the_plotting_backend_stays(tmp_path):
    """Neither the import nor a sheet that is drawn switches the backend."""
    row = {"tokens_seen": 1, "train/loss": 2.0, "train/mtp_loss": [2.0], "router/load": [[1, 1]]}
    row |= {f"router/{name}": [0.0] for name in ("max_vio", "max_vio_sequence", "bias_min", "bias_max")}
    program = f"""
import json, pathlib
import matplotlib
matplotlib.use("svg")
import deepseek_jax.training.loop
from deepseek_jax.training import curves
workdir = pathlib.Path({str(tmp_path)!r})
(workdir / "metrics.jsonl").write_text(json.dumps({row!r}) + "\\n")
assert curves.draw_sheet(workdir).read_bytes().startswith(b"\\x89PNG")
print(matplotlib.rcParams["backend"])
"""
    assert output_of(program) == "svg"


@pytest.mark.parametrize("package", ["deepseek_jax", "experiments", "pallas_kernels"])
def test_nothing_draws_with_pyplot(package):
    """pyplot has state for the whole process, and keeps every figure."""
    sources = {path.relative_to(ROOT): path.read_text() for path in (ROOT / package).rglob("*.py")}
    assert sources and not [path for path, text in sources.items() if "pyplot" in text.replace("`pyplot`", "")]
