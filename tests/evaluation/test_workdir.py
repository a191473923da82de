"""Evaluation of a workdir whose weights are damaged."""

import math

import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.evaluation import workdir as evaluation
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.evaluation import Evaluation
from tests.support.meshes import mesh_of


def test_a_loss_that_is_not_a_number_is_an_error(monkeypatch, tmp_path):
    """What is computed is told, not the arithmetic that led to it."""
    progress, nothing = Progress(step=3, tokens_seen=0, data=None), lambda *arguments: None
    result = Evaluation(*[math.nan] * len(Evaluation._fields))
    monkeypatch.setattr(evaluation, "restore_weights", lambda *arguments: (None, progress))
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: result)
    for name in ("open_held_out", "open_tokenizer", "open_corpus", "check_corpus", "jit_eval_step", "pretraining"):
        monkeypatch.setattr(evaluation, name, nothing)
    mesh = mesh_of()
    with pytest.raises(ValueError, match="the held-out loss of step 3 in .* is nan: its weights are damaged, or it"):
        evaluation.evaluate_workdir(from_config_dict(tiny.get_config()), tmp_path, mesh=mesh)
