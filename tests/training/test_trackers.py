"""Weights & Biases behind the seam of TensorBoard, and the hyper-parameters in both."""

import json
import sys
import types

import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict, to_dict
from deepseek_jax.training.metrics import MetricsLog
from deepseek_jax.training.trackers import scalars

CONFIG = from_config_dict(tiny.get_config())


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for the library: record what is called."""
    calls = []
    run = types.SimpleNamespace(
        define_metric=lambda *args, **named: calls.append(("define_metric", args, named)),
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**named):
        calls.append(("init", named))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_a_run_has_its_hyper_parameters_and_tokens_as_its_axis(wandb, tmp_path):
    for step in (3, 4):  # the run is continued: the same identity
        log = MetricsLog(tmp_path, step, CONFIG, "my-project")
        log.write({"step": step + 1, "tokens_seen": 100, "train/loss": 2.0, "router/max_vio": [0.1, 0.2, 0.3, 0.4]})
        log.flush()
        log.close()
    starts = [call[1] for call in wandb if call[0] == "init"]
    assert starts[0] == starts[1] and starts[0]["resume"] == "allow"
    assert starts[0]["project"] == "my-project" and starts[0]["config"] == to_dict(CONFIG)
    assert ("define_metric", ("*",), {"step_metric": "tokens_seen"}) in wandb
    (point, _) = [call[1] for call in wandb if call[0] == "log"]
    assert point == {"step": 4, "tokens_seen": 100, "train/loss": 2.0} | {
        f"router/max_vio/{name}": value
        for name, value in zip(("layer_1", "layer_2", "layer_3", "MTP_1"), (0.1, 0.2, 0.3, 0.4), strict=True)
    }
    assert wandb[-1] == ("finish",)


def test_without_the_library_the_flag_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb = 'my-project' needs the library wandb; install it"):
        MetricsLog(tmp_path, 0, CONFIG, "my-project")


def test_tensorboard_shows_the_hyper_parameters(tmp_path):
    MetricsLog(tmp_path, 0, CONFIG).close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b'"learning_rate": [' in events.read_bytes()
    assert json.dumps(CONFIG.name).encode() in events.read_bytes()


def test_lists_get_names_and_null_has_no_point():
    row = {"step": 1, "eval/mtp_loss": [1.0, None], "router/load": [[1, 2]], "speed/mfu": None, "eval/max_vio": [0.5]}
    assert dict(scalars(row, ["layer 7"])) == {"eval/mtp_loss/depth_1": 1.0, "eval/max_vio/layer_7": 0.5}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(ValueError, match="tensorboard is not a folder; remove it"):
        MetricsLog(tmp_path, 0, CONFIG)
