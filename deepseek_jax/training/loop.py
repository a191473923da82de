"""The training loop: config -> mesh -> state -> step -> restore -> batch -> step -> metrics -> checkpoint.

The loop owns time, files and printing; the step owns the mathematics. After step s is dispatched, the metrics of step s
- 1 are read, so the device always has work while the host writes. Before an evaluation or a checkpoint of step s its
own metrics are read too: what `metrics.jsonl` says up to s is on disk before the checkpoint of s begins.

A run is a function of (state, data position, tokens seen): nothing else is carried from one step to the next, and all
three are in a checkpoint. So a killed run that continues repeats the steps since its last checkpoint bit for bit.

How `train` ends:

    the tokens are consumed          returns, `interrupted_by` None
    Ctrl-C or SIGTERM                the step is finished and saved; returns, `interrupted_by` the signal. A second
                                     signal kills at once
    N consecutive non-finite steps   `NonFiniteError`; nothing is saved, the last good checkpoint stays
    a save or a write fails          `SaveError` or `OSError`; the earlier checkpoints stay
"""

import contextlib
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import multihost_utils

from deepseek_jax.config import Config
from deepseek_jax.data.heldout import heldout_batches
from deepseek_jax.data.pipeline import make_train_loader, open_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.huggingface.folder import initial_weights
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.training.checkpoint import (
    Checkpoints,
    Progress,
    check_workdir,
    claim_workdir,
    initial_tokenizer,
    put_tokenizer,
    read_tokenizer,
)
from deepseek_jax.training.evaluation import evaluate, place_batch
from deepseek_jax.training.flops import flops_per_token
from deepseek_jax.training.metrics import MetricsLog, Speedometer, eval_row, train_row
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import Rates, batch_size, rates
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import State, abstract_state, create_state, jit_state_around
from deepseek_jax.training.step import jit_eval_step, jit_train_step

BEFORE_THE_FIRST = (
    -1
)  # a run without a checkpoint starts its metrics anew, the evaluation before the first step included


class NonFiniteError(RuntimeError):
    """Too many consecutive steps had a loss or gradients that are not finite."""


class Result(NamedTuple):
    """What is left of a run when `train` returns."""

    state: State
    step: int
    tokens_seen: int
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    interrupted_by: signal.Signals | None


class Pending(NamedTuple):
    """A step that has been dispatched and whose metrics have not been read."""

    step: int
    tokens_seen: int
    num_tokens: int
    rates: Rates
    metrics: dict[str, jax.Array]


class Interruption:
    """A context in which the first SIGINT or SIGTERM is noted instead of obeyed; a second one is obeyed."""

    def __init__(self):
        """Nothing has happened yet."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        """Install the handlers. Python allows it in the main thread alone; of several processes JAX's own notice is
        used.
        """
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: finishing the step and saving; a second one stops at once", flush=True)
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Say whether to stop after `step`, the same on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None


def train(config: Config, workdir: Path) -> Result:
    """Train `config` in `workdir` from its newest intact checkpoint, or from the start.

    Raises:
        ValueError: bad input, or `workdir` belongs to another config.
        NonFiniteError: `training.max_skipped_steps` consecutive steps were not finite.
        SaveError: a checkpoint could not be written.
    """
    check_workdir(workdir, config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as resources:
        trainer = Trainer(config, workdir, mesh, resources)
        claim_workdir(workdir, config)
        with Interruption() as interruption:
            trainer.run(interruption)
        signal_number = None if trainer.complete else interruption.signal
        return Result(trainer.state, trainer.step, trainer.tokens_seen, mesh, trainer.tokenizer, signal_number)


class Trainer:
    """One run in one process. `state`, `step`, `tokens_seen` and the loader's position change; all else stays."""

    def __init__(self, config: Config, workdir: Path, mesh: jax.sharding.Mesh, resources: contextlib.ExitStack):
        """Build everything that a step needs. What has to be closed is handed to `resources`."""
        self.config, self.mesh = config, mesh
        objective = pretraining(config)
        self.train_step, self.eval_step = (
            jit_train_step(config, objective, mesh),
            jit_eval_step(config, objective, mesh),
        )
        self.checkpoints = Checkpoints(workdir, config.training.keep_checkpoints)
        resources.callback(self.checkpoints.close)
        position = self._restore_or_create(workdir)

        processes = jax.process_index(), jax.process_count()
        self.tokenizer = open_tokenizer(config, workdir)
        self.tokenizer_files = read_tokenizer(workdir)
        self.loader = make_train_loader(config, self.tokenizer, workdir, *processes)
        resources.callback(self.loader.close)
        if position is not None:
            self.loader.restore(position)
        training = config.training
        self.held_out = heldout_batches(
            config, self.tokenizer, workdir, training.micro_batch_size, training.eval_batches, *processes
        )

        self.log = MetricsLog(workdir, self.step if self.step else BEFORE_THE_FIRST)
        resources.callback(self.log.close)
        self.bar = ProgressBar(int(training.num_tokens), self.tokens_seen, silent=jax.process_index() > 0)
        resources.callback(self.bar.close)
        flops = flops_per_token(config.model, config.data.sequence_length, causal=True, mtp=True)
        self.speed = Speedometer(flops, list(mesh.devices.flat))
        self.programs: dict[int, Any] = {}  # by batch size
        self.compile_seconds = 0.0  # not yet written
        self.pending: Pending | None = None
        self.skipped = 0
        self.saved_step = self.step

    def _restore_or_create(self, workdir: Path) -> Any:
        """Set state, step and tokens seen; return the data position to continue from, None at the start."""
        restored = self.checkpoints.restore(abstract_state(self.config, self.mesh), self.mesh)
        if restored is None:
            self.state, self.step, self.tokens_seen = self._initial_state(workdir), 0, 0
            return None
        self.state, progress, tokenizer_files = restored
        put_tokenizer(workdir, tokenizer_files)
        self.step, self.tokens_seen = progress.step, progress.tokens_seen
        return progress.data

    def _initial_state(self, workdir: Path) -> State:
        if not self.config.training.initial_weights:
            return create_state(self.config)
        put_tokenizer(workdir, initial_tokenizer(self.config))
        weights = initial_weights(self.config, self.mesh)
        return jit_state_around(self.config.optimizer, weights)

    @property
    def complete(self) -> bool:
        """Whether all tokens are consumed."""
        return self.tokens_seen >= self.config.training.num_tokens

    def run(self, interruption: Interruption) -> None:
        """Train to the end, or until an interruption; leaves a checkpoint of the last step either way."""
        training = self.config.training
        self.speed.restart()
        if self.step == 0:
            self._evaluate()
        while not self.complete and not interruption.requested(self.step):
            self._take_step()
            if self.complete or (training.eval_every and self.step % training.eval_every == 0):
                self._evaluate()
            if self.step % training.checkpoint_every == 0:
                self._save()
        self._save()
        self.checkpoints.wait()

    def _take_step(self) -> None:
        config = self.config
        size = batch_size(config, self.tokens_seen)
        batch = place_batch(self.loader.next_batch(size), self.mesh)
        step_rates = rates(config, self.step, self.tokens_seen)
        if size not in self.programs:
            self._compile(size, batch, step_rates)
        self.state, metrics = self.programs[size](self.state, batch, step_rates)
        num_tokens = size * config.data.sequence_length
        self.step += 1
        self.tokens_seen += num_tokens
        before, self.pending = self.pending, Pending(self.step, self.tokens_seen, num_tokens, step_rates, metrics)
        self._read(before)
        self.checkpoints.check()

    def _compile(self, size: int, batch: Any, step_rates: Rates) -> None:
        self._read_pending()
        with self.speed.paused():
            start = time.perf_counter()
            self.programs[size] = self.train_step.lower(self.state, batch, step_rates).compile()
            self.compile_seconds += time.perf_counter() - start

    def _read_pending(self) -> None:
        pending, self.pending = self.pending, None
        self._read(pending)

    def _read(self, pending: Pending | None) -> None:
        """Wait for a dispatched step; count it, show it, write it down."""
        if pending is None:
            return
        metrics = jax.device_get(pending.metrics)
        self.speed.count(pending.num_tokens)
        self.skipped = int(metrics["skipped"])
        self.bar.show(pending.tokens_seen, pending.step, float(metrics["loss"]))
        if pending.step % self.config.training.log_every == 0 or self.skipped:
            row = (
                {"step": pending.step, "tokens_seen": pending.tokens_seen}
                | train_row(metrics, pending.rates)
                | self.speed.row()
            )
            if self.compile_seconds:
                row["speed/compile_seconds"], self.compile_seconds = self.compile_seconds, 0.0
            self.log.write(row)
        if self.skipped >= self.config.training.max_skipped_steps:
            steps = self.checkpoints.steps()
            good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise NonFiniteError(
                f"step {pending.step}: the loss or the gradients were not finite {self.skipped} times in a row; these"
                " updates were"
                f" skipped and {good}. Lower optimizer.learning_rate or loss weights in a new --workdir, or look for"
                " bad data"
            )

    def _evaluate(self) -> None:
        self._read_pending()
        with self.speed.paused():
            result = evaluate(
                self.eval_step, Weights(self.state["params"], self.state["router_bias"]), self.held_out, self.mesh
            )
        row = eval_row(result.loss, result.mtp_loss, result.bits_per_byte, result.max_vio_L)
        self.log.write({"step": self.step, "tokens_seen": self.tokens_seen} | row)
        self.bar.note(f"step {self.step}: {result.bits_per_byte:.3f} held-out bits per byte")

    def _save(self) -> None:
        self._read_pending()
        if self.step == self.saved_step:
            return
        if self.skipped:
            logging.warning("step %d is not saved: its update was skipped; the last good checkpoints stay", self.step)
            return
        self.log.flush()
        progress = Progress(step=self.step, tokens_seen=self.tokens_seen, data=self.loader.state())
        with self.speed.paused():
            self.checkpoints.save(self.state, progress, self.config, self.tokenizer_files, self.mesh)
        self.saved_step = self.step
