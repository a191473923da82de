"""Where metrics can be looked at besides `metrics.jsonl`: TensorBoard, and Weights & Biases if it is installed.

Each gets the same curves: `scalars` turns a row of the metrics into (name, value) pairs, one per number. Of several
processes only the first has trackers.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

from deepseek_jax.config import Config, to_dict


class Tracker(Protocol):
    """A destination of curves."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add one point to each named curve; `scalars` has "tokens_seen"."""

    def flush(self) -> None:
        """Bring everything written so far to where it survives this process."""

    def close(self) -> None:
        """Flush, and release what is open."""


class TensorBoard:
    """Event files in `workdir/tensorboard`. The x-axis is the step; the text "config" has every hyper-parameter."""

    def __init__(self, workdir: Path, step: int, config: Config):
        """Open a new event file that continues after `step`."""
        folder = Path(workdir) / "tensorboard"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; remove it: the events of TensorBoard belong there")
        folder.mkdir(exist_ok=True)
        # Not `SummaryWriter`: its thread would lose events at a kill after `flush`, and hang the run after a full disk.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        # From this step on, readers drop the events of earlier files.
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, summary=_text("config", config)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add one point to each curve."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Write the events to disk."""
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()


class WeightsAndBiases:
    """A run of Weights & Biases (wandb). Its x-axis is the tokens seen; a continued workdir continues its run."""

    def __init__(self, workdir: Path, project: str, config: Config):
        """Start or continue the run of `workdir` in `project`.

        Raises:
            ValueError: the library `wandb` is not installed.
        """
        try:
            import wandb  # an option: a run needs no account
        except ImportError as error:
            raise ValueError(
                f"--wandb = {project!r} needs the library wandb; install it (pip install wandb), or leave the flag out"
            ) from error
        name = str(Path(workdir).resolve())
        identity = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, name=Path(name).name, id=identity, resume="allow", dir=name, config=to_dict(config)
        )
        self._run.define_metric("*", step_metric="tokens_seen")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add one point to each curve."""
        self._run.log({"step": step} | scalars)

    def flush(self) -> None:
        """Do nothing: wandb has a process that sends what was written, even after a kill."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def open_trackers(workdir: Path, step: int, config: Config, wandb: str) -> list[Tracker]:
    """Return TensorBoard, and Weights & Biases in the project `wandb` unless that is ""."""
    trackers: list[Tracker] = [WeightsAndBiases(workdir, wandb, config)] if wandb else []
    return [TensorBoard(workdir, step, config), *trackers]


def scalars(row: dict[str, Any], layers: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of a row of the metrics, except its step.

    A list over layers becomes one curve per layer, named by `layers` (`config.Model.routed_layers`), a list over MTP
    depths one per depth. Loads per expert stay in the JSON lines.
    """
    for key, value in row.items():
        if isinstance(value, list):
            names = [f"depth {i}" for i in range(1, len(value) + 1)] if key.endswith("mtp_loss") else layers
            yield from (
                (f"{key}/{name}".replace(" ", "_"), item)
                for name, item in zip(names, value, strict=False)
                if isinstance(item, int | float)
            )
        elif isinstance(value, int | float) and key != "step":
            yield key, value


def _text(tag: str, config: Config) -> Summary:
    """Return a summary that TensorBoard shows as text: the config as JSON in a code block of Markdown."""
    lines = "\n".join("    " + line for line in json.dumps(to_dict(config), indent=1).splitlines())
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[lines.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
