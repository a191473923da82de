"""Studies that begin with R1's stages: whose folder they take, on which devices, and that a signal ends them."""

import functools
import importlib
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from absl import flags

from configs import tiny_r1
from deepseek_jax.posttraining.r1_record import keep_plan
from deepseek_jax.posttraining.r1_settings import read_plan
from experiments import recipe, session
from experiments.studies import output, stages

STUDIES = "grpo_meshes", "policy_on_scores", "asynchronous"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Import a study with its flags' defaults, the configuration `tiny_r1`, `tmp_path` as --runs, and two devices.

    Its flags are not defined: those of two studies have the same names.
    """

    def take(name):
        module = importlib.import_module(f"experiments.studies.{name}")
        monkeypatch.setattr(module, "RUNS", SimpleNamespace(value=str(tmp_path)))
        if hasattr(module, "CONFIG"):
            monkeypatch.setattr(module, "CONFIG", SimpleNamespace(value=tiny_r1.get_config()))
        return module

    def define(name, default, *rest, **bounds):
        return SimpleNamespace(value=default)

    for kind in ("string", "integer", "list"):
        monkeypatch.setattr(flags, f"DEFINE_{kind}", define)
    monkeypatch.setattr(recipe.Recipe, "defined", [])
    monkeypatch.setattr(session, "start", lambda: None)
    monkeypatch.setattr(output, "folder", lambda name: tmp_path)
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    yield take
    for name in STUDIES:
        sys.modules.pop(f"experiments.studies.{name}", None)


@functools.cache
def foreign_plan():
    return read_plan(tiny_r1.get_config().to_dict() | {"seed": 1}, Path())


@pytest.mark.parametrize("name", STUDIES)
def test_a_folder_of_another_seed_is_refused(study, tmp_path, monkeypatch, name):
    monkeypatch.setattr(stages.r1, "run_stages", lambda *arguments: signal.SIGTERM)  # nothing trains
    keep_plan(foreign_plan(), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds stages with other settings: config.shared.seed is 1 there, and 0 her"):
        study(name).main([])
    assert sorted(tmp_path.iterdir()) == before


def test_two_devices_begin_with_stages_on_one_and_a_signal_ends_the_study(study, tmp_path, monkeypatch):
    asked = []

    def run_stages(plan, workdir, tell, devices=None):
        asked.append((plan.r1.num_stages, workdir, devices))
        return signal.SIGTERM

    monkeypatch.setattr(stages.r1, "run_stages", run_stages)
    with pytest.raises(SystemExit) as end:
        study("grpo_meshes").main([])
    assert end.value.code == 143 and asked == [(2, tmp_path, jax.devices()[:1])]
    assert (tmp_path / "r1.json").exists()


def test_pairs_that_something_else_made_are_refused(study, tmp_path):
    module = study("policy_on_scores")
    plan = foreign_plan()
    (tmp_path / "pairs.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"does not have the pairs of 800 problems with 4 answers and the seed 2"):
        module.write_pairs(plan, tmp_path)
    (tmp_path / module.MADE_OF).write_text(json.dumps(module.made_of("{}\n{}\n", 2)))
    assert module.write_pairs(plan, tmp_path) == 2
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="does not have the pairs"):
        module.write_pairs(plan, tmp_path)
