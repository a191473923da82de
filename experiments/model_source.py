"""Where a model that makes text comes from: a run's workdir, or a folder in Hugging Face's format."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from configs import deepseek_v3
from deepseek_jax.config import Config, Model, from_config_dict
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.huggingface import companions
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.companions import GENERATION_CONFIG
from deepseek_jax.huggingface.folder import Folder, open_folder, progress_bar, read_config
from deepseek_jax.huggingface.load import load
from deepseek_jax.inference.weights import takes_fp8
from deepseek_jax.inputs import local_path, read_json, shown
from deepseek_jax.parameters import Weights
from deepseek_jax.training import workdir as workdir_lib
from deepseek_jax.training.weights import restore_weights

ONE_DEVICE = {"pipe": 1, "data": 1, "context": 1, "node": 1, "expert": 1, "tensor": 1}


class Source(NamedTuple):
    """A model that can be asked for text, before its weights are read.

    Attributes:
        config: its model, and how it computes.
        tokenizer: opens the tokenizer; call it after the devices have started, as `load`.
        load: reads the weights onto a mesh, in FP8 where they are stored so and can be decoded so.
        chat_folder: where the chat template is, if there is one.
        generation: what the folder's generation_config.json says.
    """

    config: Config
    tokenizer: Callable[[], Tokenizer]
    load: Callable[[jax.sharding.Mesh], Weights]
    chat_folder: Path
    generation: "Generation"


class Generation(NamedTuple):
    """What a folder says of the texts that its model should make.

    Attributes:
        sampling: fields of `inference.sampling.Sampling`.
        ends: ids that end a text.
    """

    sampling: dict[str, Any]
    ends: tuple[int, ...]


def open_named(workdir: str | None, hf: str | None, step: int | None) -> Source:
    """Return the model that --workdir or --hf names.

    Raises:
        ValueError: none of them or both are given, --step comes with --hf, or there is no model.
    """
    if workdir is None and hf is None:
        raise ValueError("--workdir is missing, and --hf too; give the folder of a run, or that of a checkpoint")
    if workdir is not None and hf is not None:
        raise ValueError("--workdir and --hf are both given; leave one out")
    if hf is not None and step is not None:
        raise ValueError(f"--step={step} is for --workdir; a folder of --hf has one checkpoint")
    if hf is not None:
        return open_released(local_path(hf, "--hf"))
    return open_run(local_path(workdir or "", "--workdir"), step)


def open_run(workdir: Path, step: int | None) -> Source:
    """Return the model of a run.

    Raises:
        ValueError: there is no run.
    """
    if _is_released(workdir):
        raise ValueError(
            f"{shown(str(workdir))} is a checkpoint in Hugging Face's format and no run: give --hf instead"
        )
    config = workdir_lib.read_config(workdir)

    def read(mesh: jax.sharding.Mesh) -> Weights:
        return restore_weights(config, workdir, mesh, step, as_stored=takes_fp8(config.model, config.execution))[0]

    imported = workdir / workdir_lib.HUGGINGFACE
    tokenizer = functools.partial(Tokenizer.load, workdir / "tokenizer.json")
    return Source(config, tokenizer, read, imported, read_generation(imported, config.model))


def open_released(folder: Path) -> Source:
    """Return the model of a folder in Hugging Face's format: a released checkpoint, or an export of ours.

    Raises:
        ValueError: the folder or one of its files is missing, damaged or foreign.
    """
    if (folder / companions.CONFIG).is_file() and "training" in read_json(folder / companions.CONFIG):
        raise ValueError(f"{shown(str(folder))} is the workdir of a run: give --workdir instead of --hf")
    opened = open_folder(folder)
    for note in opened.notes:
        print(f"NOTE: {note}")
    config = released_config(folder, opened)
    texts = companions.read_tokenizer(folder, config.model.vocab_size)

    def read(mesh: jax.sharding.Mesh) -> Weights:
        with progress_bar(opened.shards.num_bytes, "load") as bar:
            return load(opened.shards, config, mesh, _precision(config), bar.update)

    settings = read_json(folder / TOKENIZER_FILES[1])
    tokenizer = functools.partial(Tokenizer.parse, texts[TOKENIZER_FILES[0]], settings, folder / TOKENIZER_FILES[0])
    return Source(config, tokenizer, read, folder, read_generation(folder, config.model))


def released_config(folder: Path, opened: Folder) -> Config:
    """Return a config to decode a checkpoint with: in FP8 if it is stored so and can be decoded so, else in BF16.

    The longest text is what config.json's `max_position_embeddings` says, or what YaRN extends it to.
    """
    base = from_config_dict(deepseek_v3.get_config()).with_(mesh=ONE_DEVICE, execution={"experts": "auto"})
    fp8 = opened.fp8 and takes_fp8(opened.model, base.with_(execution={"precision": "fp8"}).execution)
    base = base.with_(execution={"precision": "fp8" if fp8 else "bf16"})
    longest = read_config(folder).get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:
        base = base.with_(data={"sequence_length": longest})
    return hf_config.run_config(base, folder.resolve().name, opened.model)


def read_generation(folder: Path, model: Model) -> Generation:
    """Return what generation_config.json says; nothing if it is not there.

    Raises:
        ValueError: the file is broken, or one of its values has another type.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return Generation({}, ())
    said = read_json(path)
    sampling = {}
    for key, kinds in {"temperature": (int, float), "top_p": (int, float), "top_k": (int,)}.items():
        value = said.get(key)
        if value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{shown(str(path))}: {key} is {shown(repr(value))}, which is no number; repair the file")
        sampling[key] = value
    if said.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    ends = said.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if wrong := [end for end in ends if type(end) is not int or not 0 <= end < model.vocab_size]:
        raise ValueError(
            f"{shown(str(path))}: eos_token_id has {shown(repr(wrong[0]))}, and the model's ids are 0 to"
            f" {model.vocab_size - 1}; repair the file"
        )
    return Generation(sampling, tuple(ends))


def _precision(config: Config) -> Any:
    return "fp8" if config.execution.precision == "fp8" else "bf16"


def _is_released(folder: Path) -> bool:
    path = folder / companions.CONFIG
    return path.is_file() and "model_type" in read_json(path)
