"""What a run writes down: `metrics.jsonl`, one JSON object per line. `trackers` draws curves of the same values.

Each line has `step`, `tokens_seen` and one group of the keys in `KEYS`: a training line every `log_every` steps, an
evaluation line, and one yardstick line at the end. Lists run over layers, the main model's MoE layers first and then
the MTP layers. A value that is not finite is null, since JSON has no NaN.

A process only appends to the file. Every line up to a step is on disk before the checkpoint of that step begins, and a
run that continues from step s first drops the lines beyond s. So an interrupted run leaves the same lines as an
uninterrupted one.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import regular_file, shown
from deepseek_jax.storage import remedy
from deepseek_jax.training.flops import model_flops_utilization, peak_flops
from deepseek_jax.training.trackers import open_trackers, scalars

FILE_NAME = "metrics.jsonl"

KEYS = {
    "step": "optimizer steps taken",
    "tokens_seen": "positions fed so far: batch size x sequence length, summed over the steps",
    "train/loss": "cross entropy of the main head before the update, nats per token",
    "train/perplexity": "exp(train/loss)",
    "train/mtp_loss": "cross entropy of each MTP depth over the same number of tokens, nats; list over depths",
    "train/balance_loss": "weighted sequence-wise and batch-wise balance losses",
    "train/z_loss": "weighted z-loss",
    "train/tokens": "positions of the step's batch that hold a token, with or without loss; the rest is padding",
    "optimizer/learning_rate": "of this step",
    "optimizer/mtp_weight": "of this step",
    "optimizer/bias_update_rate": "gamma of this step",
    "optimizer/grad_norm": "global L2 norm of the gradient, before clipping",
    "optimizer/update_norm": "global L2 norm of the change of the parameters",
    "optimizer/param_norm": "global L2 norm of the parameters",
    "optimizer/nonfinite": (
        "gradient elements, gradient norms and losses that are inf or NaN; above 0 the update is skipped"
    ),
    "optimizer/skipped": "consecutive skipped steps, this one included",
    "router/max_vio": "(max load - mean load) / mean load over the step's batch; list over layers",
    "router/max_vio_sequence": "the same per sequence, averaged; list over layers",
    "router/bias_min": "smallest router bias after the update; list over layers",
    "router/bias_max": "largest router bias after the update; list over layers",
    "router/dead_experts": "experts without a token in the step's batch, summed over layers",
    "router/load": "assignments in the step's batch; list over layers of lists over experts",
    "speed/tokens_per_second": (
        "tokens over training time since the last line; evaluation and saving are not training time"
    ),
    "speed/step_seconds": "training time per step since the last line",
    "speed/teraflops": (
        "model TFLOP/s over all devices: flops per token (causal attention counted by half; gradients of weights that"
        " adapters leave frozen do not count) x tokens per second"
    ),
    "speed/mfu": "speed/teraflops over the devices' dense BF16 peak; absent where the peak is unknown (CPUs)",
    "speed/compile_seconds": "tracing and compiling the step; on the first line of each process",
    "eval/loss": "cross entropy over the held-out batches, nats per token",
    "eval/perplexity": "exp(eval/loss)",
    "eval/bits_per_byte": (
        "held-out bits over the UTF-8 bytes that the predicted tokens stand for; of several sources the mean by weight"
    ),
    "eval/source_bits_per_byte": (
        "the same of each source alone, null where nothing is held out; list over data.sources, if there are several"
    ),
    "eval/mtp_loss": "cross entropy of each MTP depth over the held-out batches; list over depths",
    "eval/max_vio": "MaxVio of the load summed over the held-out batches; list over layers",
    "yardstick/bigram_bits_per_byte": (
        "interpolated bigram model counted on the tokens that the run has seen; yardsticks of several sources are means"
        " by weight"
    ),
    "yardstick/gzip_pieces_bits_per_byte": "gzip -9 of pieces of the model's context, each alone",
    "yardstick/gzip_files_bits_per_byte": "gzip -9 of each document, held-out ones",
    "yardstick/xz_files_bits_per_byte": "xz -9 of each document, held-out ones",
}
# What people call the yardsticks, in tables, drawings and pages alike.
YARDSTICKS = {
    "yardstick/bigram_bits_per_byte": "bigram of the tokens seen",
    "yardstick/gzip_pieces_bits_per_byte": "gzip -9 of pieces of the model's context",
    "yardstick/gzip_files_bits_per_byte": "gzip -9 of each document",
    "yardstick/xz_files_bits_per_byte": "xz -9 of each document",
}


class MetricsLog:
    """The metrics of one workdir, opened to continue after `step`. Of several processes only the first writes."""

    def __init__(self, workdir: Path, step: int, config: Config, wandb: str = "", keys: Mapping[str, str] = KEYS):
        """Drop the lines beyond `step`, and open the file and the trackers for appending.

        Args:
            workdir: the run's folder.
            step: the last step whose lines stay.
            config: the run's configuration, for the trackers.
            wandb: a project of Weights & Biases to write to as well; none if "".
            keys: that lines may have, with their meaning.

        Raises:
            ValueError: a file of the metrics is damaged, or wandb is not installed.
        """
        self._path, self._keys = Path(workdir) / FILE_NAME, keys
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        if os.path.lexists(self._path):
            kept = [row for row in read_rows(workdir) if row["step"] <= step]
            write_atomically(self._path, "".join(_line(row) for row in kept))
        self._layers = config.model.routed_layers
        self._trackers = open_trackers(workdir, step, config, wandb)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line, which then survives the death of the process.

        Raises:
            OSError: the line cannot be written, for example to a full disk; the message says where and what to do.
        """
        assert row.keys() <= self._keys.keys(), f"undocumented keys {row.keys() - self._keys.keys()}"
        if not self._writes:
            return
        row = {key: _plain(value) for key, value in row.items()}
        with self._full_disk_named():
            self._file.write(_line(row))
            self._file.flush()
            for tracker in self._trackers:
                tracker.write(row["step"], dict(scalars(row, self._layers)))

    def flush(self) -> None:
        """Write the trackers' points to disk too; call it before a checkpoint."""
        if self._writes:
            with self._full_disk_named():
                for tracker in self._trackers:
                    tracker.flush()

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._writes:
            with self._full_disk_named():
                for tracker in self._trackers:
                    tracker.close()
                self._file.close()

    @contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = (
                f"writing {self._path} or the events beside it failed: {error.strerror or error};"
                f" {remedy(error, self._path.parent)}; the same command continues"
            )
            raise OSError(error.errno, text) from error


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of a workdir's metrics, without a last line that a kill cut off.

    Raises:
        ValueError: the file cannot be read, or any other line is not a row: JSON with a step.
    """
    path = Path(workdir) / FILE_NAME
    rows = []
    with regular_file(path) as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):  # else it is cut off
                rows.append(_row(line, f"{shown(str(path))}, line {number}"))
    return rows


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); remove the line") from error
    for key in ("step", "tokens_seen"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{where} has no {key}, a whole number; remove the line")
    return row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return `value` as JSON: arrays become lists, non-finite numbers become null."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def train_row(metrics: dict[str, np.ndarray], rates: Any) -> dict[str, Any]:
    """Return the training keys, from a step's metrics on the host (`training/step.py`) and its `Rates`."""
    loss = float(metrics["loss"])
    return {
        "train/loss": loss,
        "train/perplexity": _exp(loss),
        "train/mtp_loss": metrics["mtp_loss"],
        "train/balance_loss": metrics["balance_loss"],
        "train/z_loss": metrics["z_loss"],
        "train/tokens": metrics["tokens"],
    } | update_row(metrics, rates)


def update_row(metrics: dict[str, np.ndarray], rates: Any) -> dict[str, Any]:
    """Return the keys of optimizer and routers, which every objective has."""
    return {
        "optimizer/learning_rate": rates.learning_rate,
        "optimizer/mtp_weight": rates.mtp_weight,
        "optimizer/bias_update_rate": rates.bias_update_rate,
        "optimizer/grad_norm": metrics["grad_norm"],
        "optimizer/update_norm": metrics["update_norm"],
        "optimizer/param_norm": metrics["param_norm"],
        "optimizer/nonfinite": metrics["nonfinite"],
        "optimizer/skipped": metrics["skipped"],
        "router/max_vio": metrics["max_vio_L"],
        "router/max_vio_sequence": metrics["max_vio_sequence_L"],
        "router/bias_min": metrics["bias_min_L"],
        "router/bias_max": metrics["bias_max_L"],
        "router/dead_experts": metrics["dead_experts"],
        "router/load": metrics["counts_LE"],
    }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf  # e^709 is the largest double


def eval_row(
    loss: float, mtp_loss: Any, bits_per_byte: float, max_vio_L: Any, source_bits_per_byte: Sequence[float | None] = ()
) -> dict[str, Any]:
    """Return the evaluation keys; `source_bits_per_byte` has one entry per source."""
    row = {
        "eval/loss": loss,
        "eval/perplexity": _exp(loss),
        "eval/bits_per_byte": bits_per_byte,
        "eval/mtp_loss": mtp_loss,
        "eval/max_vio": max_vio_L,
    }
    return row | ({"eval/source_bits_per_byte": source_bits_per_byte} if len(source_bits_per_byte) > 1 else {})


class Speedometer:
    """Measures training time without pauses, tokens per second and model FLOP utilisation."""

    def __init__(self, flops_per_token: float, devices: list[jax.Device]):
        """Start the clock. `flops_per_token` counts forward and backward."""
        self._flops_per_token = flops_per_token
        peak = peak_flops(devices[0].device_kind)
        self._peak = peak * len(devices) if peak else None
        self.restart()

    def restart(self) -> None:
        """Forget all counts, and count from now."""
        self._mark, self._seconds, self._tokens, self._steps = time.perf_counter(), 0.0, 0, 0

    def count(self, tokens: int) -> None:
        """Note that a step over `tokens` positions is complete."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside this context: no step is running."""
        self._seconds += time.perf_counter() - self._mark
        try:
            yield
        finally:
            self._mark = time.perf_counter()

    def row(self) -> dict[str, float]:
        """Return the speed keys over the steps since the last call."""
        rate = self._tokens / self._seconds
        row = {
            "speed/tokens_per_second": rate,
            "speed/step_seconds": self._seconds / self._steps,
            "speed/teraflops": rate * self._flops_per_token / 1e12,
        }
        if self._peak:
            row["speed/mfu"] = model_flops_utilization(self._flops_per_token, rate, self._peak)
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return row
