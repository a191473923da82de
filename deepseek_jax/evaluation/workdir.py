"""Evaluation of a run from its workdir, on any mesh."""

import math
from pathlib import Path

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.data.pipeline import open_tokenizer
from deepseek_jax.data.token_cache import Corpus, open_corpus
from deepseek_jax.inputs import shown
from deepseek_jax.parallel.context import readers
from deepseek_jax.parallel.mesh import check_context, check_model_fit, make_mesh
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
        ValueError: there is no such checkpoint, it is damaged, or the corpus is not the one that it was trained on; or
            the loss is not a number.
    """
    mesh = mesh or make_mesh(config.mesh)
    check_model_fit(config.model, mesh)
    check_context(config, mesh)
    weights, progress = restore_weights(config, workdir, mesh, step)
    processes = readers(mesh)
    tokenizer = open_tokenizer(config, workdir)
    check_corpus(progress, open_corpus(config, tokenizer, workdir))
    held_out = open_held_out(config, tokenizer, workdir, *processes)
    with jax.set_mesh(mesh):
        result = evaluate(jit_eval_step(config, pretraining(config), mesh), weights, held_out, mesh)
    if not math.isfinite(result.loss):
        raise ValueError(
            f"the held-out loss of step {progress.step} in {shown(str(workdir))} is {result.loss}: its weights are"
            " damaged, or it diverged; evaluate an earlier --step"
        )
    return result, progress


def check_corpus(progress: Progress, corpus: Corpus) -> None:
    """Check by content that `corpus` is the one of a checkpoint, wherever it lies.

    Raises:
        ValueError: it is another, so that its held-out text may have been trained on.
    """
    digest = (progress.data or {}).get("made_from", {}).get("corpus", corpus.digest)
    if digest != corpus.digest:
        raise ValueError(
            f"data.sources hold another corpus (SHA-256 {corpus.digest[:16]}) than the run was trained on"
            f" ({digest[:16]}); restore its files, or name the folder that has them"
        )
