"""The sheet of curves, and that drawing leaves the plotting of the program that imports us alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.training import sheet
from deepseek_jax.training.metrics import YARDSTICKS

ROOT = Path(__file__).parents[2]
CONFIG = from_config_dict(tiny.get_config())
NUM_ROUTED = 4  # layers of `tiny`, MTP's included


def training_row(step):
    """Return a line of training of a run that looks like one: the loss falls, gamma ends at step 80."""
    scalars = ("learning_rate", "bias_update_rate", "grad_norm")
    row = {"step": step, "tokens_seen": 1000 * step, "train/loss": 2.0 + 3.0 / step, "train/mtp_loss": [3.0]}
    row |= {f"optimizer/{name}": 0.1 if step < 80 else 0.0 for name in scalars} | {"speed/tokens_per_second": 5e3}
    row |= {f"router/{name}": [0.1] * NUM_ROUTED for name in ("max_vio", "max_vio_sequence", "bias_min", "bias_max")}
    return row | {"router/load": [[step % 7, 1]] * NUM_ROUTED}


def output_of(program):
    """Return what a fresh Python process prints that runs `program`."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_matplotlib_is_imported_by_a_drawing_only_and_its_backend_stays(tmp_path):
    """Neither the imports nor a sheet that is drawn switches the backend: one process, as each costs seconds."""
    program = f"""
import sys
import deepseek_jax.training.sheet, deepseek_jax.training.loop
print("matplotlib" in sys.modules)
import json, pathlib
import matplotlib
matplotlib.use("svg")
from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.training import sheet
workdir = pathlib.Path({str(tmp_path)!r})
(workdir / "metrics.jsonl").write_text(json.dumps({training_row(1)!r}) + "\\n")
assert sheet.draw_sheet(from_config_dict(tiny.get_config()), workdir).read_bytes().startswith(b"\\x89PNG")
print(matplotlib.rcParams["backend"])
"""
    assert output_of(program).split() == ["False", "svg"]


@pytest.mark.parametrize("package", ["deepseek_jax", "experiments", "pallas_kernels"])
def test_nothing_draws_with_pyplot(package):
    """pyplot has state for the whole process, and keeps every figure."""
    sources = {path.relative_to(ROOT): path.read_text() for path in (ROOT / package).rglob("*.py")}
    assert sources and not [path for path, text in sources.items() if "pyplot" in text.replace("`pyplot`", "")]


def texts_of(figure):
    """Return everything that is written in a drawing."""
    panels = [text for axes in figure.axes for text in (axes.get_title(), *map(str, axes.get_yticklabels()))]
    legends = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    return " ".join([figure.get_suptitle(), *panels, *legends])


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw the sheet of 100 steps, two evaluations and the yardsticks; return the figure."""
    from matplotlib.figure import Figure

    rows = [training_row(step) for step in range(1, 101)]
    rows += [
        {"step": n, "tokens_seen": 1000 * n, "eval/loss": 3.0, "eval/bits_per_byte": b} for n, b in ((1, 4), (100, 1.9))
    ]
    rows += [{"step": 100, "tokens_seen": 100_000} | dict.fromkeys(YARDSTICKS, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    assert sheet.draw_sheet(CONFIG, tmp_path, 10_200_000) == tmp_path / "training.png"
    return figures[0]


def test_the_sheet_says_which_run_it_is_and_names_layers_as_the_model_does(drawn):
    texts = texts_of(drawn)
    for expected in ("tiny, 10.2M parameters, FP32", "0.1M tokens of stdlib, 100 steps: 1.900 held-out bits per byte"):
        assert expected in texts
    for expected in (
        "layer 1",
        "layer 3",
        "MTP 1",
        *(YARDSTICKS[key] for key in sheet.YARDSTICK_COLORS),
        "Learning rate",
        "Gradient norm",
        "Speed",
        "gamma becomes 0",
    ):
        assert expected in texts
    assert "layer 0" not in texts and "layer 4" not in texts  # layer 0 is dense


def test_a_dense_model_has_a_sheet_without_routers(tmp_path):
    rows = [{key: value for key, value in training_row(n).items() if "router" not in key} for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dense = CONFIG.with_(model={"num_dense_layers": CONFIG.model.num_layers, "num_mtp_layers": 0})
    assert sheet.draw_sheet(dense, tmp_path).exists()


def test_the_running_mean_leaves_out_gaps():
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan])
    np.testing.assert_allclose(sheet.smoothed(values, 0.4), [1, 2, 4, 4, 5])
    np.testing.assert_array_equal(sheet.smoothed(values, 0.0), values)
    assert np.isnan(sheet.smoothed(np.full(3, np.nan))).all()
