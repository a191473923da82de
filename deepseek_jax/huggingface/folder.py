"""A checkpoint's folder in Hugging Face's format as a whole, and the weights of a run that starts from one.

`training.initial_weights` names such a folder. Its weights are read onto the mesh when a run starts without a
checkpoint, and when a run is evaluated or asked for text before its first checkpoint. The folder is never copied into
another format.
"""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax

from deepseek_jax.config import Config, Model
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.load import Precision, check, load
from deepseek_jax.parameters import Weights
from deepseek_jax.progress import Bar
from deepseek_jax.safetensors.folder import RECORD, Shards
from pallas_kernels import GROUP


class Folder(NamedTuple):
    """A checkpoint of `model`, found to be complete and sound; `fp8` if its weights are quantised."""

    model: Model
    shards: Shards
    fp8: bool


def open_folder(folder: Path) -> Folder:
    """Read config.json and all headers, and check that they fit.

    Raises:
        ValueError: something is missing, damaged or foreign; the message names the file and the tensor.
    """
    hf = read_json(folder)
    path = str(folder / "config.json")
    fp8, model = hf_config.is_fp8(hf, path), hf_config.read_model(hf, path)
    shards = Shards(folder)
    check(shards, model, fp8)
    return Folder(model, shards, fp8)


def read_json(folder: Path) -> dict:
    """Return the config.json of a folder."""
    path = folder / "config.json"
    if not path.exists() and (folder / RECORD).exists():  # config.json is written last
        raise ValueError(f"{path} is missing: the export into this folder is unfinished; run the same command again")
    if not path.exists():
        raise ValueError(f"{path} is missing; a checkpoint in Hugging Face's format has one")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error


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
    model, shards, fp8 = open_folder(folder)
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
