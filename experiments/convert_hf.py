"""Released checkpoints in and out, in Hugging Face's format: `python -m experiments.convert_hf COMMAND --hf=DIR`.

    import   --hf=DIR --workdir=W --config=C   make a run in W that begins with the weights of DIR: the checkpoint's
                                               model and C's recipe, in W/config.py
    export   --workdir=W --hf=DIR              write a checkpoint of W in FP8 (BF16 with --precision=bf16), with config
                                               and tokenizer
    verify   --hf=DIR                          check names, shapes, dtypes and sizes against DIR's config.json, and the
                                               checksums of our own exports
    logits   --hf=DIR --tokens=T.npy --output=O.npz    write logits, routes and gates for int32 tokens [B, S]

The same command continues an interrupted export. `--dry_run` lists tensors and bytes, then stops. Weights are split
over all devices.
"""

import json
import pprint
from pathlib import Path

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config, Mesh, from_config_dict, to_dict
from deepseek_jax.evaluation.logits import check_tokens, logits
from deepseek_jax.files import write_atomically
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.contents import expected, num_bytes
from deepseek_jax.huggingface.folder import open_folder, progress_bar
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.save import SHARD_BYTES, save
from deepseek_jax.inputs import local_path, new_file, new_folder
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.safetensors import record
from deepseek_jax.safetensors.folder import RECORD, Shards
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import (
    TOKENIZER_FILES,
    check_workdir,
    claim_workdir,
    initial_tokenizer,
    put_tokenizer,
    read_config,
    read_tokenizer,
)
from experiments import command, recipe, session

CONFIG = recipe.Recipe("configs/deepseek_v3.py", "Recipe of the run; the model is the checkpoint's.")
HF = flags.DEFINE_string("hf", None, "Folder in Hugging Face's format.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
STEP = flags.DEFINE_integer(
    "step", None, "export: step of the checkpoint; the newest intact one by default.", lower_bound=0
)
PRECISION = flags.DEFINE_enum(
    "precision",
    None,
    ["fp8", "bf16", "fp32"],
    "export: precision of the files, fp8 or bf16. logits: precision of the arithmetic.",
)
TOKENS = flags.DEFINE_string("tokens", None, "logits: .npy file with int32 tokens [B, S].")
OUTPUT = flags.DEFINE_string("output", None, "logits: .npz file to write.")
SHARD_GIGABYTES = flags.DEFINE_float(
    "shard_gigabytes", SHARD_BYTES / 1e9, "export: size of one file.", lower_bound=1e-6, upper_bound=1e6
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "import, export: list names, dtypes, shapes and bytes, and stop.")

# The files beside the weights. They go through a run unchanged as long as the model stays the same. An export writes
# the last one last, which marks the folder complete.
COMPANIONS = ("generation_config.json", "chat_template.jinja", *TOKENIZER_FILES, "config.json")

CONFIG_FILE = '''"""The recipe of a run that began with the weights of {folder}."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the configuration."""
    return ConfigDict(
{config}
    )
'''


def main(argv: list[str]) -> None:
    """Parse and call."""
    COMMANDS[argv[1]]()


def import_() -> None:
    """Make a workdir whose run begins with a folder's weights. The weights stay where they are; the run reads them onto
    its mesh when it starts.
    """
    folder, workdir = _hf_folder().absolute(), new_folder(_needed("workdir"), "--workdir")
    config, _, fp8 = open_checkpoint(folder)
    if DRY_RUN.value:
        list_tensors(config, fp8)
        return
    session.start(keep_heap=False)
    config = config.with_(training={"initial_weights": str(folder)})
    tokenizer = initial_tokenizer(config)
    check_workdir(workdir, config)
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} holds a run with checkpoints; import into another --workdir")
    (workdir / "huggingface").mkdir(exist_ok=True)
    for name in COMPANIONS:
        if (folder / name).exists():
            write_atomically(workdir / "huggingface" / name, _text(folder / name))
    put_tokenizer(workdir, tokenizer)
    write_atomically(
        workdir / "config.py",
        CONFIG_FILE.format(folder=folder, config=pprint.pformat(to_dict(config), sort_dicts=False)),
    )
    claim_workdir(workdir, config)
    print(
        f"{workdir}: a run that begins with the weights of {folder}, which must stay there until the first checkpoint;"
        " to train on:"
    )
    print(f"  python -m experiments.train --config={workdir / 'config.py'} --workdir={workdir}")


def export() -> None:
    """Write a run's checkpoint in Hugging Face's format."""
    folder, workdir = new_folder(HF.value, "--hf"), local_path(_needed("workdir"), "--workdir")
    if PRECISION.value == "fp32":
        raise ValueError("--precision=fp32: released checkpoints are in FP8 or BF16; choose one")
    config, fp8 = read_config(workdir), PRECISION.value != "bf16"
    if DRY_RUN.value:
        list_tensors(config, fp8)
        return
    record.check_target(folder, num_bytes(config.model, fp8))
    session.start(keep_heap=False)
    mesh = all_devices(config)
    weights, progress = restore_weights(config, workdir, mesh, STEP.value, as_stored=True)
    with progress_bar(num_bytes(config.model, fp8), "export") as written:
        save(
            weights,
            config.model,
            folder,
            fp8,
            int(SHARD_GIGABYTES.value * 1e9),
            written.update,
            f"{workdir.resolve()} {progress.step}",
        )
    if jax.process_index() > 0:
        return
    for name, content in companions(workdir, config, fp8).items():
        write_atomically(folder / name, content)
    print(f"{folder}: step {progress.step} of {workdir} in {'FP8' if fp8 else 'BF16'}")


def verify() -> None:
    """Check a folder in Hugging Face's format."""
    folder = _hf_folder()
    config, shards, fp8 = open_checkpoint(folder)
    session.start(keep_heap=False)
    files = {entry.file for entry in shards.entries.values()}
    form = "FP8" if fp8 else "not FP8"
    print(
        f"{folder}: {len(shards.entries):,} tensors, {shards.num_bytes:,} bytes in {len(files)} files, {form}: complete"
    )
    if (folder / RECORD).exists():
        with progress_bar(sum(file.stat().st_size for file in files), "checksums") as progress:
            record.verify(folder, progress.update)
        print("SHA-256 of every file: as written")


def write_logits() -> None:
    """Run a checkpoint over tokens, and write its logits, routes and gates."""
    path, output = local_path(_needed("tokens"), "--tokens"), new_file(_needed("output"), "--output")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} for --output; make it")
    config, shards, fp8 = open_checkpoint(_hf_folder())
    tokens_BS = read_tokens(path, config.model.vocab_size)
    precision = PRECISION.value or ("fp8" if fp8 else "bf16")
    config = from_config_dict(to_dict(config.with_(execution={"precision": precision})))  # FP8 wants multiples of 128
    session.start(keep_heap=False)
    mesh = all_devices(config)
    with progress_bar(shards.num_bytes, "load") as progress:
        # A checkpoint that is not in FP8 is quantised from FP32, as in training.
        weights = load(shards, config, mesh, "fp32" if precision == "fp8" and not fp8 else precision, progress.update)
    found = logits(config, weights, tokens_BS, mesh)
    with output.open("wb") as file:
        np.savez(file, **found)
    print(f"{output}: " + ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items()))


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Return the tokens [B, S] of a file. Raises ValueError for bad ones, before any weight is read."""
    if not path.exists():
        raise ValueError(f"{path} is missing; --tokens is a file that np.save made of int32 [B, S]")
    try:
        tokens_BS = np.load(path)
    except (EOFError, ValueError) as error:  # empty, or of another format
        raise ValueError(f"{path} is not an .npy file ({error}); make it with np.save of int32 [B, S]") from error
    if not isinstance(tokens_BS, np.ndarray):
        raise ValueError(f"{path} has several arrays; give int32 [B, S]")
    check_tokens(tokens_BS, vocab_size, str(path))
    return tokens_BS


def open_checkpoint(folder: Path) -> tuple[Config, Shards, bool]:
    """Check a checkpoint; return its model in the recipe of --config, its shards, and whether it is in FP8."""
    model, shards, fp8 = open_folder(folder)
    return hf_config.run_config(from_config_dict(CONFIG.value), folder.resolve().name, model), shards, fp8


def all_devices(config: Config) -> jax.sharding.Mesh:
    """Return a mesh that splits the experts, and with them all other weights, over all devices."""
    count = jax.device_count()
    model = config.model
    for name, size in {"width": model.width, "num_experts": model.num_experts, "kv_latent": model.kv_latent}.items():
        if size % count:
            raise ValueError(f"{count} devices do not divide the model's {name} = {size}; use fewer devices")
    return make_mesh(Mesh(pipe=1, data=1, node=1, expert=count, tensor=1))


def companions(workdir: Path, config: Config, fp8: bool) -> dict[str, str]:
    """Return the files beside the weights: those of the import where they still fit the model, new ones elsewhere."""
    kept = {name: workdir / "huggingface" / name for name in COMPANIONS}
    found = {name: _text(path) for name, path in kept.items() if path.exists()} or read_tokenizer(workdir)
    hf = json.loads(found["config.json"]) if "config.json" in found else None
    if hf is None or hf_config.read_model(hf) != config.model or hf_config.is_fp8(hf) != fp8:
        found["config.json"] = json.dumps(hf_config.write_model(config.model, fp8), indent=2) + "\n"
    return found


def list_tensors(config: Config, fp8: bool) -> None:
    """Print every tensor with its dtype, shape and bytes, then the totals."""
    tensors = expected(config.model, fp8)
    for name, (dtype, shape) in tensors.items():
        print(f"{name}  {dtype}  {list(shape)}  {DTYPES[dtype].itemsize * int(np.prod(shape)):,}")
    print(f"{len(tensors):,} tensors, {num_bytes(config.model, fp8):,} bytes")


def _text(path: Path) -> str:
    """Return the text of a file with its own line ends."""
    return path.read_bytes().decode()


def _hf_folder() -> Path:
    return local_path(HF.value, "--hf")


def _needed(flag: str) -> str:
    value = flags.FLAGS[flag].value
    if value is None:
        raise ValueError(f"--{flag} is missing; give it: {flags.FLAGS[flag].help}")
    return value


COMMANDS = {"import": import_, "export": export, "verify": verify, "logits": write_logits}

if __name__ == "__main__":
    command.run(main, words=tuple(COMMANDS))
