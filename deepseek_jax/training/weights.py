"""The weights of a run, for use without training."""

import functools
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.parameters import Weights
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.continuation import check_continues
from deepseek_jax.training.origin import read_origin
from deepseek_jax.training.saved import SAVED, stored_steps
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.workdir import put_tokenizer


def restore_weights(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh, step: int | None = None, as_stored: bool = False
) -> tuple[Weights, Progress]:
    """Return the weights of a run and where it stood; put the run's tokenizer into the workdir.

    Args:
        config: the run's config; its mesh may differ.
        workdir: the run's folder.
        mesh: to restore onto.
        step: step of the checkpoint. 0 means `training.initial_weights`, if the run has any. None means the newest
            intact checkpoint, or the initial weights of a run without checkpoints.
        as_stored: keep initial weights in FP8 if the folder stores them in FP8; all other weights are FP32.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another config.
    """
    begins, saved = bool(config.training.initial_weights), (workdir / SAVED).exists() or stored_steps(workdir)
    restored = None
    if not begins or saved:
        accept = functools.partial(_check_same_run, config, workdir)
        checkpoints = Checkpoints(workdir, keep=None)
        try:
            if not (begins and step == 0):
                whole = abstract_state(config, mesh)
                part = {name: whole[name] for name in ("params", "router_bias")}
                restored = checkpoints.restore(part, mesh, step, accept)
        finally:
            checkpoints.close()
    if restored is not None:
        state, progress, tokenizer = restored
        weights = Weights(**state)
    elif not begins:
        raise ValueError(f"{workdir} has no complete checkpoint yet; let experiments.train run until its first save")
    elif step:
        raise ValueError(
            f"{workdir} has no checkpoint of step {step}; the run has not trained since"
            f" {config.training.initial_weights}"
        )
    else:
        weights, _, progress, tokenizer = read_origin(config, mesh, whole=False, as_stored=as_stored)
    put_tokenizer(workdir, tokenizer)
    return weights, progress


def _check_same_run(config: Config, workdir: Path, record: dict[str, Any]) -> None:
    where = f"the checkpoint of step {record['step']}"
    check_continues(record["config"], config, workdir, where, trained=True, say=False)
