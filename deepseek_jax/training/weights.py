"""The weights of a run, for use without training."""

import functools
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.adapters import adapt, mark
from deepseek_jax.config import Config
from deepseek_jax.huggingface.load import abstract_weights
from deepseek_jax.parameters import Weights
from deepseek_jax.training.adapted import abstract_adapters, merged
from deepseek_jax.training.adapters_file import check_base, read_adapters
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.continuation import check_continues
from deepseek_jax.training.origin import read_origin
from deepseek_jax.training.saved import SAVED, stored_steps
from deepseek_jax.training.state import State, abstract_state
from deepseek_jax.training.workdir import put_tokenizer


def restore_weights(
    config: Config,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
    as_stored: bool = False,
    merge: bool = True,
) -> tuple[Weights, Progress]:
    """Return the weights of a run and where it stood; put the run's tokenizer into the workdir.

    Args:
        config: the run's config; its mesh may differ.
        workdir: the run's folder.
        mesh: to restore onto.
        step: step of the checkpoint. 0 means `training.initial_weights`, if the run has any. None means the newest
            intact checkpoint, or the initial weights of a run without checkpoints.
        as_stored: keep initial weights in FP8 if the folder stores them in FP8; all other weights are FP32. Those that
            adapters changed are quantised again.
        merge: merge adapters, if the run trains them; else `adapters.Adapted`s are in place of their weights.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another config; adapters are of another base
            than the one that `config` names.
    """
    lora = read_adapters(workdir)
    if lora:
        check_base(config, workdir)
    begins, saved = bool(config.training.initial_weights), (workdir / SAVED).exists() or stored_steps(workdir)
    restored = None
    if not begins or saved:
        restored = _restore(config, workdir, mesh, step, skip=begins and step == 0)
    if restored is not None:
        state, progress, tokenizer = restored
        weights = Weights(**state)
        if lora:
            base = read_origin(config, mesh, whole=False, as_stored=as_stored).weights
            weights = weights._replace(params=adapt(mark(lora, base.params), weights.params))
            with jax.set_mesh(mesh):
                weights = merged(weights) if merge else weights
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


def restore_adapters(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Any, Progress]:
    """Return the adapters of a run that trains them, and where it stood; the weights below them are not read.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another config.
    """
    restored = _restore(config, workdir, mesh, step)
    if restored is None:
        raise ValueError(f"{workdir} has no complete checkpoint yet; let the run train until its first save")
    return restored[0]["params"], restored[1]


def _restore(
    config: Config, workdir: Path, mesh: jax.sharding.Mesh, step: int | None, skip: bool = False
) -> tuple[Any, Progress, dict[str, str]] | None:
    """Return weights, progress and tokenizer of a checkpoint; with `skip` only look whether checkpoints are there."""
    checkpoints = Checkpoints(workdir, keep=None)
    try:
        if skip:
            return None
        whole = _abstract_state(config, workdir, mesh)
        part = {name: whole[name] for name in ("params", "router_bias")}
        return checkpoints.restore(part, mesh, step, functools.partial(_check_same_run, config, workdir))
    finally:
        checkpoints.close()


def _abstract_state(config: Config, workdir: Path, mesh: jax.sharding.Mesh) -> State:
    if lora := read_adapters(workdir):
        return abstract_adapters(config, lora, abstract_weights(config, mesh), mesh)
    return abstract_state(config, mesh)


def _check_same_run(config: Config, workdir: Path, record: dict[str, Any]) -> None:
    where = f"the checkpoint of step {record['step']}"
    check_continues(record["config"], config, workdir, where, trained=True, say=False)
