"""A checkpoint's folder in Hugging Face's format as a whole, and the weights of a run that starts from one.

`training.initial_weights` names such a folder. Its weights are read onto the mesh when a run starts without a
checkpoint, and when a run is evaluated or asked for text before its first checkpoint. The folder is never copied into
another format.
"""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax

from deepseek_jax.config import Config, Model
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.contents import check, lacks_mtp
from deepseek_jax.huggingface.load import Precision, load
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.parameters import Weights
from deepseek_jax.progress import Bar
from deepseek_jax.safetensors.folder import RECORD, Shards
from pallas_kernels import GROUP


class Folder(NamedTuple):
    """A checkpoint of `model`, found to be complete and sound; `fp8` if its weights are quantised.

    `notes` are sentences about the folder that a user should read.
    """

    model: Model
    shards: Shards
    fp8: bool
    notes: tuple[str, ...]


def open_folder(folder: Path) -> Folder:
    """Read config.json and all headers, and check that they fit.

    A folder that says in its config.json that it has MTP layers, and has not one tensor of them, is read without them:
    transformers drops them when it saves a model, and keeps the key. `notes` says so.

    Raises:
        ValueError: something is missing, damaged or foreign; the message names the file and the tensor.
    """
    hf = read_config(folder)
    path = str(folder / "config.json")
    fp8, model = hf_config.is_fp8(hf, path), hf_config.read_model(hf, path)
    shards = Shards(folder)
    notes = ()
    if lacks_mtp(shards, model):
        notes = (
            f"{shown(path)} says num_nextn_predict_layers = {model.num_mtp_layers}, and the folder has no tensor of an"
            " MTP layer (transformers drops them when it saves): it is read WITHOUT MTP layers, as if the key were 0",
        )
        model = dataclasses.replace(model, num_mtp_layers=0)
    check(shards, model, fp8)
    return Folder(model, shards, fp8, notes)


def read_config(folder: Path) -> dict:
    """Return the config.json of a folder."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        if not os.path.isdir(folder):
            raise ValueError(f"there is no folder {shown(str(folder))}; name the folder of a checkpoint")
        if os.path.lexists(folder / RECORD):  # config.json is written last
            raise ValueError(
                f"{shown(str(path))} is missing: the export into this folder is unfinished; run the same command again"
            )
        raise ValueError(f"{shown(str(path))} is missing; a checkpoint in Hugging Face's format has one")
    return read_json(path)


def initial_weights(config: Config, mesh: jax.sharding.Mesh, as_stored: bool = False) -> Weights:
    """Return the weights of the folder `config.training.initial_weights` on `mesh`, with a progress bar.

    Args:
        config: of the run.
        mesh: of `config.mesh`, or another.
        as_stored: keep FP8 weights in FP8 if no block holds parts of both gate and up; otherwise everything is FP32.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or its model is not that of the run; each difference is
            shown.
    """
    folder = Path(config.training.initial_weights)
    model, shards, fp8, _ = open_folder(folder)
    if differences := [
        f"  model.{field.name}: {theirs!r} in the folder, {ours!r} in the config"
        for field in dataclasses.fields(Model)
        if (theirs := getattr(model, field.name)) != (ours := getattr(config.model, field.name))
    ]:
        raise ValueError(
            f"training.initial_weights = {str(folder)!r} is another model than the config's; experiments.convert_hf"
            " import makes a config"
            " that fits:\n" + "\n".join(differences)
        )
    blocks_are_whole = not any(size % GROUP for size in (model.dense_hidden, model.expert_hidden))
    precision: Precision = "fp8" if as_stored and fp8 and blocks_are_whole else "fp32"
    with progress_bar(shards.num_bytes, "load") as bar:
        return load(shards, config, mesh, precision, bar.update)


def progress_bar(total: int, what: str) -> Bar:
    """Return a bar in bytes and bytes per second; of several processes only the first shows it."""
    return Bar(total, what, silent=jax.process_index() > 0)
