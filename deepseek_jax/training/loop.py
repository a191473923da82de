"""The training loop: batch -> step -> metrics -> evaluation -> checkpoint.

The loop owns time, files and printing; the step owns the mathematics. The loop dispatches step s and then reads the
metrics of the step before, so the device has work while the host writes. Before an evaluation or a checkpoint of step s
it reads the metrics of s too: the lines of `metrics.jsonl` up to s are on disk before the checkpoint of s begins.

A run is a function of (state, data position, tokens seen): nothing else is carried from one step to the next, and all
three are in a checkpoint. So a killed run that continues repeats the steps since its last checkpoint bit for bit.

A `Trainer` runs parts that its caller built: step, batches, evaluators, checkpoints, log. `training.pretrain.train`
builds the parts of pre-training.

How a run ends:

    the tokens are consumed          returns, `interrupted_by` None
    Ctrl-C, SIGTERM, SIGUSR1, SIGHUP the step is finished and saved; returns, `interrupted_by` the signal. A second
                                     signal stops at once
    N consecutive non-finite steps   `NonFiniteError`; nothing is saved, the last good checkpoint stays
    a save or a write fails          `SaveError` or `OSError`; the earlier checkpoints stay
    another process is gone          `ProcessError`; the earlier checkpoints stay
    no step is finished for long     of several processes, each ends with exit code 75 (`parallel.watchdog`)
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from absl import logging

from deepseek_jax.config import Config
from deepseek_jax.parallel.watch import lost_processes_named
from deepseek_jax.parallel.watchdog import Watchdog
from deepseek_jax.parameters import Weights
from deepseek_jax.training.average import averaged, beside
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.flops import flops_per_token
from deepseek_jax.training.interruption import Interruption
from deepseek_jax.training.metrics import MetricsLog, Speedometer, train_row
from deepseek_jax.training.optimizer import Rates, batch_size, rates
from deepseek_jax.training.progress import ProgressBar
from deepseek_jax.training.state import State, weights_of

Row = dict[str, Any]  # of the metrics


class NonFiniteError(RuntimeError):
    """Too many consecutive steps had a loss or gradients that are not finite."""


class Batches(Protocol):
    """A source of batches, which are a function of its position."""

    def next_batch(self, batch_size: int) -> dict[str, Any]:
        """Return this process's rows of the next batch of `batch_size` sequences, NumPy arrays."""

    def state(self) -> Any:
        """Return the position (JSON), from which `restore` continues with the same batches."""

    def restore(self, position: Any) -> None:
        """Continue from a position that `state` returned."""


class Pending(NamedTuple):
    """A step that is dispatched and whose metrics are not yet read."""

    step: int
    tokens_seen: int
    num_tokens: int
    rates: Rates
    metrics: dict[str, jax.Array]


def pretraining_row(step: int, metrics: dict[str, Any], rates: Rates) -> Row:
    """Return the row of a step of pre-training."""
    return train_row(metrics, rates)


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """One run in one process, over parts that its caller builds and closes; use it under `jax.set_mesh(mesh)`.

    `progress` is where the run starts; `step` and `tokens_seen` are where it stands. Of the parts, `state` and the
    position of `batches` change.

    Attributes:
        config: says intervals, schedules, and shapes for counting FLOPs; saved with each checkpoint.
        mesh: the mesh of the state and the batches.
        train_step: (state, batch, rates) -> (state, metrics), jitted, as `training.step.jit_train_step` returns it.
        state: the state at `progress`.
        progress: where the run starts.
        batches: continues from `progress.data`.
        evaluators: called with the weights before the first step, every `training.eval_every` steps and at the end;
            each returns a row of the metrics.
        checkpoints: the checkpoints of the workdir.
        tokenizer_files: name to content, saved with each checkpoint.
        log: the metrics of the workdir, opened to continue after `progress`.
        bar: what a person sees.
        row: (step, metrics on the host, rates) -> a row of the metrics; by default that of pre-training.
        adapters: how many weights of adapters a token meets (`training.flops`); 0: all weights are trained.
    """

    config: Config
    mesh: jax.sharding.Mesh
    train_step: Callable
    state: State
    progress: Progress
    batches: Batches
    evaluators: Sequence[Callable[[Weights], Row]]
    checkpoints: Checkpoints
    tokenizer_files: dict[str, str]
    log: MetricsLog
    bar: ProgressBar
    row: Callable[[int, dict[str, Any], Rates], Row] = pretraining_row
    adapters: float = 0.0

    def __post_init__(self):
        """Move the batches to where the run starts, and start the clock."""
        self.step, self.tokens_seen = self.progress.step, self.progress.tokens_seen
        if self.progress.data is not None:
            self.batches.restore(self.progress.data)
        length = self.config.data.sequence_length
        flops = flops_per_token(self.config.model, length, causal=True, mtp=True, adapters=self.adapters)
        self.speed = Speedometer(flops, list(self.mesh.devices.flat))
        self.watchdog = Watchdog()
        self.programs: dict[int, Any] = {}  # by batch size
        self.compile_seconds = 0.0  # not yet in the log
        self.pending: Pending | None = None
        self.skipped = 0
        self.saved_step = self.step

    @property
    def complete(self) -> bool:
        """Whether all tokens are consumed."""
        return self.tokens_seen >= self.config.training.num_tokens

    def run(self) -> signal.Signals | None:
        """Train to the end, or until a signal, which is returned; leave a checkpoint of the last step either way."""
        training = self.config.training
        self.speed.restart()
        with lost_processes_named(), Interruption() as interruption, self.watchdog:
            if self.step == 0:
                self.bar.note("evaluating before the first step; this compiles the evaluation ...")
                self._evaluate()
            while not self.complete and not interruption.requested(self.step):
                self._take_step()
                if self.complete or (training.eval_every and self.step % training.eval_every == 0):
                    self._evaluate()
                if self.step % training.checkpoint_every == 0:
                    self._save()
            self._save()
            with self.watchdog.phase("saving"):
                self.checkpoints.wait()
        return None if self.complete else interruption.signal

    def _take_step(self) -> None:
        config = self.config
        size = batch_size(config, self.tokens_seen)
        batch = place_batch(self.batches.next_batch(size), self.mesh)
        step_rates = rates(config, self.step, self.tokens_seen)
        if size not in self.programs:
            self._compile(size, batch, step_rates)
        state, metrics = self.programs[size](beside(config.optimizer, self.state), batch, step_rates)
        self.state = averaged(config, self.mesh, self.state, state)
        num_tokens = size * config.data.sequence_length
        self.step += 1
        self.tokens_seen += num_tokens
        before, self.pending = self.pending, Pending(self.step, self.tokens_seen, num_tokens, step_rates, metrics)
        self._read(before)
        self.checkpoints.check()

    def _compile(self, size: int, batch: Any, step_rates: Rates) -> None:
        self._read_pending()
        with self.speed.paused(), self.watchdog.phase("compiling"):
            self.bar.note(f"compiling the step for batches of {size} sequences ...")
            start = time.perf_counter()
            state = beside(self.config.optimizer, self.state)
            self.programs[size] = self.train_step.lower(state, batch, step_rates).compile()
            seconds = time.perf_counter() - start
            self.bar.note(f"compiled in {seconds:.1f} s")
            self.compile_seconds += seconds

    def _read_pending(self) -> None:
        pending, self.pending = self.pending, None
        self._read(pending)

    def _read(self, pending: Pending | None) -> None:
        """Wait for a dispatched step; count it, show it, and write its metrics."""
        if pending is None:
            return
        metrics = jax.device_get(pending.metrics)
        self.speed.count(pending.num_tokens)
        self.watchdog.finished(pending.step)
        self.skipped = int(metrics["skipped"])
        self.bar.show(pending.tokens_seen, pending.step, float(metrics["loss"]))
        if pending.step % self.config.training.log_every == 0 or self.skipped:
            row = (
                {"step": pending.step, "tokens_seen": pending.tokens_seen}
                | self.row(pending.step, metrics, pending.rates)
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
                f" updates were skipped and {good}. Lower optimizer.learning_rate or loss weights in a new --workdir,"
                " or look for bad data"
            )

    def _evaluate(self) -> None:
        self._read_pending()
        with self.speed.paused(), self.watchdog.phase("evaluating"):
            rows = [evaluate(weights_of(self.state)) for evaluate in self.evaluators]
        for row in rows:
            self.log.write({"step": self.step, "tokens_seen": self.tokens_seen} | row)
            if "eval/bits_per_byte" in row:
                self.bar.note(f"step {self.step}: {row['eval/bits_per_byte']:.3f} held-out bits per byte")

    def _save(self) -> None:
        self._read_pending()
        if self.step == self.saved_step:
            return
        if self.skipped:
            logging.warning("step %d is not saved: its update was skipped; the last good checkpoints stay", self.step)
            return
        self.log.flush()
        progress = Progress(step=self.step, tokens_seen=self.tokens_seen, data=self.batches.state())
        with self.speed.paused(), self.watchdog.phase("saving"):
            self.checkpoints.save(self.state, progress, self.config, self.tokenizer_files, self.mesh)
        self.saved_step = self.step
