"""Where a run begins: with random weights, with those of a released checkpoint, or with another run's.

    training.initial_weights
    ""                    random weights
    "folder"              the weights of a folder in Hugging Face's format
    "workdir"             the weights of the newest intact checkpoint of a run; "workdir@500" those of step 500
    "state:workdir@500"   the whole training state of that checkpoint: the moments too, and the new run goes on at the
                          same step, token and position in the data

A run that begins with weights takes their tokenizer, since it gives the ids their meaning. The origin is read when a
run starts without a checkpoint of its own, and when such a run is evaluated or asked for text; it is never changed.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from deepseek_jax.config import Config, Model
from deepseek_jax.huggingface import companions
from deepseek_jax.huggingface.folder import initial_weights as released_weights
from deepseek_jax.inputs import local_path, read_json, shown
from deepseek_jax.parameters import Weights
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.saved import CHECKPOINTS
from deepseek_jax.training.state import State, abstract_state, create_state, jit_state_around
from deepseek_jax.training.workdir import ADAPTERS, check_tokenizer, put_tokenizer

KEY = "training.initial_weights"
WHOLE = "state:"  # in front of a workdir: its whole training state
# Of the model, what may differ from the run that the weights are from: the arrays are the same.
FREE_MODEL_FIELDS = {"yarn", "rope_base", "norm_eps", "init_std", "residual_init_scale"}


class Origin(NamedTuple):
    """Where a run begins; `run` says whether `folder` is another run's workdir, `whole` whether to take its state."""

    folder: Path
    step: int | None = None
    run: bool = False
    whole: bool = False


class Beginning(NamedTuple):
    """What an origin gives: weights, or a whole state that has them."""

    weights: Weights
    state: State | None
    progress: Progress
    tokenizer: dict[str, str]


def find_origin(config: Config) -> Origin | None:
    """Return where a run of `config` begins; None if with random weights.

    Raises:
        ValueError: `training.initial_weights` names something that does not exist.
    """
    text = config.training.initial_weights
    if not text:
        return None
    whole, name = text.startswith(WHOLE), text.removeprefix(WHOLE)
    folder, step = local_path(name, KEY), None
    before, at, number = name.rpartition("@")
    if not folder.exists() and at and number.isascii() and number.isdecimal():
        folder, step = local_path(before, KEY), int(number)
    if not folder.is_dir():
        raise ValueError(
            f"{KEY} = {shown(name)!r} does not exist; put the checkpoint back there, or import it from where it is now"
        )
    run = _is_run(folder)
    if (whole or step is not None) and not run:
        raise ValueError(f"{KEY} = {shown(text)!r}: {folder} is not the workdir of a run with checkpoints; name one")
    if run and (folder / ADAPTERS).exists():
        raise ValueError(
            f"{KEY} = {shown(text)!r} is a run of adapters, whose checkpoints have no model; merge them with"
            " experiments.convert_hf export, and begin with that folder; or train them on: begin with their base, and"
            " name them with config.posttraining.lora.initial"
        )
    return Origin(folder, step, run, whole)


def initial_tokenizer(config: Config) -> dict[str, str]:
    """Return the content of the tokenizer files in the released checkpoint that a run begins with, by name.

    Raises:
        ValueError: the folder or one of its tokenizer files is missing or damaged, or has more ids than the model.
    """
    return companions.read_tokenizer(find_origin(config).folder, config.model.vocab_size)


def read_origin(config: Config, mesh: jax.sharding.Mesh, whole: bool = True, as_stored: bool = False) -> Beginning:
    """Read what a run with `training.initial_weights` begins with onto `mesh`.

    Args:
        config: of the new run.
        mesh: of `config.mesh`, or another.
        whole: read the whole state if the origin asks for it; else the weights alone.
        as_stored: keep a released checkpoint's weights in FP8 if they are stored so; all other weights are FP32.

    Raises:
        ValueError: the origin is missing, damaged, or of another model; the message shows each difference.
    """
    origin = find_origin(config)
    start = Progress(step=0, tokens_seen=0, data=None)
    if not origin.run:
        tokenizer = initial_tokenizer(config)
        named = config.with_(training={"initial_weights": str(origin.folder)})
        return Beginning(released_weights(named, mesh, as_stored), None, start, tokenizer)
    state, progress, tokenizer = _restore(config, mesh, origin, whole and origin.whole)
    weights = Weights(state["params"], state["router_bias"])
    return Beginning(weights, state if origin.whole else None, progress if origin.whole else start, tokenizer)


def initial_state(config: Config, workdir: Path, mesh: jax.sharding.Mesh) -> tuple[State, Progress]:
    """Return state and progress of a run without a checkpoint; a tokenizer that comes with weights goes into `workdir`.

    Raises:
        ValueError: as `read_origin`; or `data.tokenizer` names another tokenizer than the weights have.
    """
    if not config.training.initial_weights:
        return create_state(config), Progress(step=0, tokens_seen=0, data=None)
    beginning = read_origin(config, mesh)
    put_tokenizer(workdir, beginning.tokenizer)
    if find_origin(config).run:
        check_tokenizer(config, workdir)
    if beginning.state is not None:
        return beginning.state, beginning.progress
    return jit_state_around(config.optimizer, beginning.weights), beginning.progress


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a workdir, and not a released checkpoint: both have a config.json."""
    path = folder / "config.json"
    return (folder / CHECKPOINTS).is_dir() or (path.exists() and "training" in read_json(path))


def _restore(
    config: Config, mesh: jax.sharding.Mesh, origin: Origin, whole: bool
) -> tuple[State, Progress, dict[str, str]]:
    checkpoints = Checkpoints(origin.folder, keep=None)
    try:
        abstract = abstract_state(config, mesh)
        if not whole:
            abstract = {name: abstract[name] for name in ("params", "router_bias")}
        accept = functools.partial(_check_same_arrays, config, origin.folder, whole)
        restored = checkpoints.restore(abstract, mesh, origin.step, accept)
    finally:
        checkpoints.close()
    if restored is None:
        raise ValueError(f"{KEY}: {origin.folder} has no complete checkpoint yet; let it train until its first save")
    return restored


def model_differences(stored: dict[str, Any], model: Model) -> dict[str, str]:
    """Return a line about each field of a model that differs from `stored`, by its name."""
    ours = dataclasses.asdict(model)
    return {
        field.name: f"  model.{field.name}: {stored.get(field.name)!r} there, {ours[field.name]!r} in the config"
        for field in dataclasses.fields(Model)
        if stored.get(field.name) != ours[field.name]
    }


def _check_same_arrays(config: Config, folder: Path, whole: bool, record: dict[str, Any]) -> None:
    differences = model_differences(record["config"]["model"], config.model)
    if differences.keys() - FREE_MODEL_FIELDS:
        raise ValueError(
            f"{KEY}: {folder} has another model than the config; give its values, or other weights:\n"
            + "\n".join(differences.values())
        )
    for line in differences.values():
        logging.warning("beginning with the weights of another model:%s", line[1:])
    if whole and config.optimizer.ema_decay > 0.0 and not record["config"]["optimizer"]["ema_decay"] > 0.0:
        raise ValueError(
            f"{KEY}: the state in {folder} has no average of the weights; set optimizer.ema_decay = 0, or begin with"
            f" the weights alone: without {WHOLE!r}"
        )
