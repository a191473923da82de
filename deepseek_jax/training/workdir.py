"""The workdir of a run: which configuration owns it, and its tokenizer.

workdir/config.json                              the configuration
workdir/tokenizer.json, tokenizer_config.json    every checkpoint has their content too
workdir/checkpoints/                             `training.checkpoint`
workdir/metrics.jsonl, tensorboard/              `training.metrics`
"""

import json
import os
from pathlib import Path

import jax
from absl import logging

from deepseek_jax.config import Config, flatten, from_config_dict, to_dict
from deepseek_jax.data.tokenizer import TOKENIZER_FILES
from deepseek_jax.files import write_atomically
from deepseek_jax.huggingface import companions

# What may differ when a run continues: how it is computed, and how often the loop logs, evaluates and saves.
FREE_SECTIONS = ("mesh.", "execution.")
FREE_KEYS = {
    "data.prefetch",
    "training.micro_batch_size",
    "training.log_every",
    "training.eval_every",
    "training.eval_batches",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.max_skipped_steps",
    "training.initial_weights",  # a folder may move, and a run with a checkpoint does not read it again
}
BOUND_KEYS = {"execution.precision"}  # inside a free section, yet part of what is computed


def claim_workdir(workdir: Path, config: Config) -> None:
    """Write `config` into `workdir`, which then belongs to it.

    Call it after everything is built, so that a config with a mistake does not own a workdir.
    """
    if jax.process_index() == 0:
        write_atomically(workdir / "config.json", json.dumps(to_dict(config), indent=1) + "\n")


def check_workdir(workdir: Path, config: Config) -> None:
    """Check that `workdir` is free, or holds a run that `config` may continue; create it if it does not exist.

    Raises:
        ValueError: it holds a run with another configuration; the message shows each difference.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
        return
    stored, given = flatten(read_config(workdir)), flatten(config)
    changed = {key: (stored[key], given[key]) for key in given if stored[key] != given[key]}
    lines = [f"  {key}: {old!r} in the workdir, {new!r} given" for key, (old, new) in changed.items()]
    if any(not _is_free(key) for key in changed):
        raise ValueError(
            f"{workdir} holds a run with another config; give its values, or another --workdir:\n" + "\n".join(lines)
        )
    for line in lines:
        logging.warning("continuing with a changed config:%s", line[1:])


def read_config(workdir: Path) -> Config:
    """Return the configuration that `workdir` was started with.

    Raises:
        ValueError: there is no run in `workdir`, or its config.json cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(
            f"{workdir} holds no run: {path.name} is missing; train one with experiments.train --workdir={workdir}"
        )
    try:
        return from_config_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a checkpoint's run/metadata") from error


def read_tokenizer(workdir: Path) -> dict[str, str]:
    """Return the content of the workdir's tokenizer files by name."""
    return {name: (workdir / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES}


def put_tokenizer(workdir: Path, files: dict[str, str]) -> None:
    """Write the tokenizer files of a checkpoint into `workdir` where they are missing.

    Raises:
        ValueError: `workdir` has another tokenizer than the checkpoint, whose ids mean other tokens.
    """
    for name, content in files.items():
        path = workdir / name
        if not path.exists():
            write_atomically(path, content)
        elif path.read_text(encoding="utf-8") != content:
            raise ValueError(
                f"{path} is not the tokenizer of the checkpoint; remove it, and the checkpoint's own is put back"
            )


def initial_tokenizer(config: Config) -> dict[str, str]:
    """Return the content of the tokenizer files in the folder `training.initial_weights`, by name.

    Raises:
        ValueError: the folder or one of its tokenizer files is missing or damaged, or has more ids than the model.
    """
    try:
        return companions.read_tokenizer(Path(config.training.initial_weights), config.model.vocab_size)
    except ValueError as error:
        if os.path.isdir(config.training.initial_weights):
            raise
        raise ValueError(
            f"training.initial_weights = {config.training.initial_weights!r} does not exist; put the checkpoint back"
            " there, or import it from where it is now"
        ) from error


def _is_free(key: str) -> bool:
    return key not in BOUND_KEYS and (key in FREE_KEYS or key.startswith(FREE_SECTIONS))
