"""Pre-training: config -> mesh -> step -> state -> data -> trainer, built in this order and run.

Another kind of training builds other parts (its own batches and objective) around the same `Trainer`, with the same
`begin`, `open_log` and `open_bar`.
"""

import contextlib
import functools
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import HeldOut, open_held_out
from deepseek_jax.data.pipeline import make_train_loader, open_corpus, open_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.parallel.context import readers
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.continuation import check_continues, check_length, say_division
from deepseek_jax.training.evaluation import evaluate
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row, Trainer
from deepseek_jax.training.metrics import KEYS, MetricsLog, eval_row
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.origin import initial_state
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.record import check_names
from deepseek_jax.training.state import State, abstract_state
from deepseek_jax.training.step import jit_eval_step, jit_train_step
from deepseek_jax.training.summary import run_lines
from deepseek_jax.training.workdir import (
    check_workdir,
    claim_workdir,
    occupied,
    put_tokenizer,
    read_tokenizer,
)

# A run without a checkpoint drops all old metrics, even those of the evaluation before the first step.
BEFORE_THE_FIRST = -1


class Result(NamedTuple):
    """What `train` returns: where the run stopped, and what it leaves in memory."""

    state: State
    step: int
    tokens_seen: int
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    interrupted_by: signal.Signals | None


def train(config: Config, workdir: Path, mesh: jax.sharding.Mesh | None = None, wandb: str = "") -> Result:
    """Train `config` in `workdir` from its newest intact checkpoint, or from the start.

    Args:
        config: any valid config.
        workdir: the run's folder; made if it does not exist.
        mesh: to train on; by default that of `config`, over all devices.
        wandb: a project of Weights & Biases to show the metrics in, too; none if "".

    Raises:
        ValueError: bad input, `workdir` belongs to another config, or another process trains there.
        NonFiniteError: `training.max_skipped_steps` consecutive steps were not finite.
        SaveError: a checkpoint could not be written.
        OSError: the metrics could not be written.
    """
    with contextlib.ExitStack() as resources:
        resources.enter_context(occupied(workdir))
        check_workdir(workdir, config)
        mesh = mesh or make_mesh(config.mesh)
        processes = readers(mesh)
        resources.enter_context(jax.set_mesh(mesh))
        objective = pretraining(config)
        train_step, eval_step = jit_train_step(config, objective, mesh), jit_eval_step(config, objective, mesh)
        checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(checkpoints.close)
        create = functools.partial(initial_state, config, workdir, mesh)
        state, progress = begin(checkpoints, config, workdir, mesh, abstract_state(config, mesh), create)
        tokenizer = open_tokenizer(config, workdir)
        loader = make_train_loader(config, tokenizer, workdir, *processes)
        resources.callback(loader.close)
        if progress.data is not None:
            loader.restore(progress.data)  # refuses other data before anything is written
        held_out = open_held_out(config, tokenizer, workdir, *processes)
        log = open_log(config, workdir, progress, resources, wandb)
        claim_workdir(workdir, config)
        corpus = open_corpus(config, tokenizer, workdir)
        say("\n".join(run_lines(config, mesh, state["params"], corpus, progress)))
        trainer = Trainer(
            config=config,
            mesh=mesh,
            train_step=train_step,
            state=state,
            progress=progress,
            batches=loader,
            evaluators=[functools.partial(held_out_row, eval_step, held_out, mesh)],
            checkpoints=checkpoints,
            tokenizer_files=read_tokenizer(workdir),
            log=log,
            bar=open_bar(config, progress, resources),
        )
        interrupted_by = trainer.run()
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, tokenizer, interrupted_by)


def begin(
    checkpoints: Checkpoints,
    config: Config,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    abstract: State,
    create: Callable[[], tuple[State, Progress]],
) -> tuple[State, Progress]:
    """Return state and progress of the newest intact checkpoint, or of the run's beginning if there is none.

    The tokenizer of the checkpoint is put into `workdir`.

    Args:
        checkpoints: the checkpoints of `workdir`.
        config: to continue with.
        workdir: the run's folder.
        mesh: the mesh of the state.
        abstract: shapes and shardings of the state.
        create: makes what a run without a checkpoint begins with.

    Raises:
        ValueError: the checkpoint is of another config, has other arrays, or has seen more tokens than `config` trains
            on.
    """

    def accept(record: dict[str, Any]) -> None:
        where, alone = f"the checkpoint of step {record['step']}", not (workdir / "config.json").exists()
        check_continues(record["config"], config, workdir, where, trained=True, say=alone)
        check_length(record["config"], config, record["step"], record["tokens_seen"])
        check_names(record, abstract, whole=True)
        say_division(record, config, mesh)

    restored = checkpoints.restore(abstract, mesh, accept=accept)
    if restored is None:
        return create()
    state, progress, tokenizer_files = restored
    put_tokenizer(workdir, tokenizer_files)
    return state, progress


def held_out_row(eval_step: Callable, held_out: HeldOut, mesh: jax.sharding.Mesh, weights: Weights) -> Row:
    """Evaluate on held-out text; return a row of the metrics."""
    result = evaluate(eval_step, weights, held_out, mesh)
    return eval_row(result.loss, result.mtp_loss, result.bits_per_byte, result.max_vio_L, result.source_bits_per_byte)


def open_log(
    config: Config,
    workdir: Path,
    progress: Progress,
    resources: contextlib.ExitStack,
    wandb: str = "",
    keys: Mapping[str, str] = KEYS,
) -> MetricsLog:
    """Open the metrics of a workdir to continue after `progress`; `resources` closes them."""
    log = MetricsLog(workdir, progress.step if progress.step else BEFORE_THE_FIRST, config, wandb, keys)
    resources.callback(log.close)
    return log


def open_bar(config: Config, progress: Progress, resources: contextlib.ExitStack) -> ProgressBar:
    """Open the progress bar of a run, which `resources` closes; of several processes only the first shows it."""
    bar = ProgressBar(int(config.training.num_tokens), progress.tokens_seen, silent=jax.process_index() > 0)
    resources.callback(bar.close)
    return bar
