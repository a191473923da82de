"""Evaluation of a run from its workdir, on any mesh."""

from pathlib import Path

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.data.pipeline import open_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.evaluation import Evaluation, evaluate
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.step import jit_eval_step
from deepseek_jax.training.weights import restore_weights


def evaluate_workdir(
    config: Config, workdir: Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Evaluation, Progress]:
    """Evaluate a checkpoint on the held-out split; return the result and where the run stood.

    Args:
        config: the run's config, with the mesh and the number of batches to use.
        workdir: the run's folder.
        step: step of the checkpoint, as `restore_weights` takes it; the newest intact one if None.
        mesh: to evaluate on; by default that of `config`.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    mesh = mesh or make_mesh(config.mesh)
    weights, progress = restore_weights(config, workdir, mesh, step)
    processes = jax.process_index(), jax.process_count()
    held_out = open_held_out(config, open_tokenizer(config, workdir), workdir, *processes)
    with jax.set_mesh(mesh):
        return evaluate(jit_eval_step(config, pretraining(config), mesh), weights, held_out, mesh), progress
