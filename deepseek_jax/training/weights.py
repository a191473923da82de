"""The weights of a run, for use without training."""

from pathlib import Path

import jax

from deepseek_jax.config import Config
from deepseek_jax.huggingface.folder import initial_weights
from deepseek_jax.parameters import Weights
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.workdir import initial_tokenizer, put_tokenizer


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
        ValueError: there is no such checkpoint, or it is damaged.
    """
    begins, directory = bool(config.training.initial_weights), workdir / "checkpoints"
    restored = None
    if directory.exists() or not begins:
        whole = abstract_state(config, mesh)
        checkpoints = Checkpoints(workdir, keep=None)
        if not (begins and step == 0):
            restored = checkpoints.restore({name: whole[name] for name in ("params", "router_bias")}, mesh, step)
        checkpoints.close()
    if restored is not None:
        state, progress, tokenizer = restored
        weights = Weights(**state)
    elif not begins:
        raise ValueError(f"{workdir} has no complete checkpoint yet; let experiments.train run until its first save")
    elif step:
        raise ValueError(
            f"{directory} has no checkpoint of step {step}; the run has not trained since"
            f" {config.training.initial_weights}"
        )
    else:
        tokenizer = initial_tokenizer(config)
        weights, progress = initial_weights(config, mesh, as_stored), Progress(step=0, tokens_seen=0, data=None)
    put_tokenizer(workdir, tokenizer)
    return weights, progress
