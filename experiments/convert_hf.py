"""Released checkpoints in and out, in Hugging Face's format: `python -m experiments.convert_hf COMMAND --hf=DIR`.

    import   --hf=DIR --workdir=W --config=C   make a run in W that begins with the weights of DIR: the checkpoint's
                                               model and C's recipe, in W/config.py
    export   --workdir=W --hf=DIR              write a checkpoint of W in FP8, whatever its precision (in BF16 with
                                               --precision=bf16), with config and tokenizer
    adapters --workdir=W --hf=DIR              write the adapters of a run that trains them, in PEFT's format
    verify   --hf=DIR                          check names, shapes, dtypes and sizes against DIR's config.json, and the
                                               checksums of our own exports; values of other folders are not read
    logits   --hf=DIR --tokens=T.npy --output=O.npz    write logits, routes and gates for int32 tokens [B, S]

The same command continues an interrupted export. `--dry_run` lists tensors and bytes, then stops. Weights are split
over all devices.
"""

import os
from pathlib import Path

import jax
import numpy as np
from absl import flags

from deepseek_jax.adapters import unadapted
from deepseek_jax.config import Config, Mesh, Model, from_config_dict, to_dict
from deepseek_jax.evaluation.logits import logits, read_tokens
from deepseek_jax.files import replacing, write_atomically
from deepseek_jax.huggingface import companions, imported_recipe
from deepseek_jax.huggingface import config as hf_config
from deepseek_jax.huggingface.changes import changed_line
from deepseek_jax.huggingface.companions import Companion
from deepseek_jax.huggingface.contents import expected, num_bytes
from deepseek_jax.huggingface.folder import Folder, open_folder, progress_bar
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.peft import check_folder, save_adapters
from deepseek_jax.huggingface.save import SHARD_BYTES, save
from deepseek_jax.inputs import local_path, new_file, new_folder
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.safetensors import record
from deepseek_jax.safetensors.folder import RECORD
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.training.adapted import merged
from deepseek_jax.training.adapters_file import base_for_peft, read_adapters
from deepseek_jax.training.origin import initial_tokenizer
from deepseek_jax.training.saved import stored_steps
from deepseek_jax.training.weights import restore_adapters, restore_weights
from deepseek_jax.training.workdir import (
    HUGGINGFACE,
    check_workdir,
    claim_workdir,
    occupied,
    put_tokenizer,
    read_config,
    read_tokenizer,
)
from experiments import command, recipe, session

CONFIG = recipe.Recipe("configs/deepseek_v3.py", "Recipe of the run; the model is the checkpoint's.")
MOST_GIGABYTES = 1e6
HF = flags.DEFINE_string("hf", None, "Folder in Hugging Face's format.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
STEP = flags.DEFINE_integer(
    "step", None, "export, adapters: step of the checkpoint; the newest intact one by default.", lower_bound=0
)
PRECISION = flags.DEFINE_enum(
    "precision",
    None,
    ["fp8", "bf16", "fp32"],
    "export: precision of the files, fp8 (the default) or bf16. logits: precision of the arithmetic.",
)
TOKENS = flags.DEFINE_string("tokens", None, "logits: .npy file with int32 tokens [B, S].")
OUTPUT = flags.DEFINE_string("output", None, "logits: .npz file to write.")
SHARD_GIGABYTES = flags.DEFINE_float(
    "shard_gigabytes", SHARD_BYTES / 1e9, "export: size of one file.", lower_bound=1e-6, upper_bound=MOST_GIGABYTES
)
BASE = flags.DEFINE_string(
    "base", None, "adapters: the base for PEFT, a name on the Hub or a folder; the run's own folder by default."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "import, export: list names, dtypes, shapes and bytes, and stop.")


def main(argv: list[str]) -> None:
    """Parse and call."""
    COMMANDS[argv[1]]()


def import_() -> None:
    """Make a workdir whose run begins with a folder's weights. The weights stay where they are; the run reads them onto
    its mesh when it starts.
    """
    folder, workdir = _hf_folder().absolute(), new_folder(_needed("workdir"), "--workdir")
    opened = open_told(folder)
    try:
        base = from_config_dict(CONFIG.value)
        if CONFIG.is_default and not any(key.startswith("mesh") for key, _ in CONFIG.overrides):
            # V3's mesh is one of 64 devices and more; this one is of whatever is there
            base = base.with_(mesh={"data": -1, "context": 1, "node": 1, "expert": 1})
        config = hf_config.run_config(base, folder.resolve().name, opened.model)
    except ValueError as error:  # the recipe is V3's by default, for many devices and in FP8
        raise ValueError(f"{error}; or name a recipe of the model's size: --config=configs/tiny.py") from error
    if DRY_RUN.value:
        list_tensors(config, opened.fp8)
        return
    session.start(keep_heap=False)
    config = config.with_(training={"initial_weights": str(folder)})
    tokenizer = initial_tokenizer(config)
    files = companions.read(folder)
    files |= {name: Companion(text) for name, text in tokenizer.items() if name not in files}  # made from another form
    with occupied(workdir):
        make_run(workdir, config, tokenizer, files)
    print(
        f"{workdir}: a run that begins with the weights of {folder}, which must stay there until the first checkpoint;"
        " to train on:"
    )
    print(f"  {imported_recipe.training_command(workdir)}")
    if CONFIG.is_default:
        precision, file = config.execution.precision.upper(), workdir / imported_recipe.FILE
        print(
            f"without --config its recipe is V3's (batches, schedules, corpus) in {precision}, on as many devices as"
            f" there are; edit {file} before the first start, or import with --config"
        )


def make_run(workdir: Path, config: Config, tokenizer: dict[str, str], files: dict[str, Companion]) -> None:
    """Write the files of a run that begins with a folder's weights; the last one makes `workdir` its own."""
    check_workdir(workdir, config)
    if stored_steps(workdir):
        raise ValueError(f"{workdir} holds a run with checkpoints; import into another --workdir")
    (workdir / HUGGINGFACE).mkdir(exist_ok=True)
    companions.write(workdir / HUGGINGFACE, files)
    put_tokenizer(workdir, tokenizer)
    write_atomically(workdir / imported_recipe.FILE, imported_recipe.source(config))
    claim_workdir(workdir, config)


def export() -> None:
    """Write a run's checkpoint in Hugging Face's format."""
    folder, workdir = new_folder(HF.value, "--hf"), local_path(_needed("workdir"), "--workdir")
    if not SHARD_GIGABYTES.value <= MOST_GIGABYTES:  # NaN
        raise ValueError(f"--shard_gigabytes={SHARD_GIGABYTES.value} is no size; give at most {MOST_GIGABYTES:g}")
    if PRECISION.value == "fp32":
        raise ValueError("--precision=fp32: released checkpoints are in FP8 or BF16; choose one")
    config, fp8 = read_config(workdir), PRECISION.value != "bf16"
    if DRY_RUN.value:
        list_tensors(config, fp8)
        return
    record.check_target(
        folder, num_bytes(config.model, fp8), (dtype for dtype, _ in expected(config.model, fp8).values())
    )
    if PRECISION.value is None:
        print("writing FP8, the form of the released checkpoint; --precision=bf16 writes BF16")
    session.start(keep_heap=False)
    mesh = all_devices(config)
    as_stored = fp8 or read_adapters(workdir) is None  # merged in FP8, adapters would be rounded to E4M3
    adapted, progress = restore_weights(config, workdir, mesh, STEP.value, as_stored, merge=False)
    with jax.set_mesh(mesh):
        weights = merged(adapted)
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
    line = changed_line(unadapted(adapted), weights, config.model, fp8) if read_adapters(workdir) else None
    if jax.process_index() > 0:
        return
    if line:
        print(line)
    companions.write(folder, companions.export(workdir / HUGGINGFACE, read_tokenizer(workdir), config, fp8))
    print(f"{folder}: step {progress.step} of {workdir} in {'FP8' if fp8 else 'BF16'}")


def adapters() -> None:
    """Write a run's adapters in PEFT's format."""
    folder, workdir = new_folder(HF.value, "--hf"), local_path(_needed("workdir"), "--workdir")
    config, lora = read_config(workdir), read_adapters(workdir)
    if lora is None:
        raise ValueError(f"{workdir} holds a run that trains all weights; export writes them: convert_hf export")
    for flag in (PRECISION, DRY_RUN):
        if flag.value:
            raise ValueError(f"--{flag.name} is not for adapters, which are written in FP32, all of them; leave it out")
    base = base_for_peft(config, BASE.value)
    check_folder(folder)
    session.start(keep_heap=False)
    if jax.process_count() > 1:
        raise ValueError(f"adapters are written by one process, and here are {jax.process_count()}; start one alone")
    pairs, progress = restore_adapters(config, workdir, all_devices(config), STEP.value)
    size = save_adapters(pairs, lora, config.model, folder, base)
    print(f"{folder}: adapters of step {progress.step} of {workdir}, {size:,} bytes, for the base {base}")


def verify() -> None:
    """Check a folder in Hugging Face's format."""
    folder = _hf_folder()
    model, shards, fp8, _ = open_told(folder)
    with_precision("bf16", model)  # the shape is possible
    session.start(keep_heap=False)
    files = {entry.file for entry in shards.entries.values()}
    form = "FP8" if fp8 else "not FP8"
    print(
        f"{folder}: {len(shards.entries):,} tensors, {shards.num_bytes:,} bytes in {len(files)} files, {form}: complete"
        " (names, shapes, dtypes and sizes)"
    )
    if (folder / RECORD).exists():
        with progress_bar(sum(file.stat().st_size for file in files), "checksums") as progress:
            record.verify(folder, progress.update)
        print("SHA-256 of every file: as written")
    else:
        print("values: not checked; only our own exports have checksums")


def write_logits() -> None:
    """Run a checkpoint over tokens, and write its logits, routes and gates."""
    path, output = local_path(_needed("tokens"), "--tokens"), new_file(_needed("output"), "--output")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} for --output; make it")
    if os.path.lexists(output) and not output.is_file():  # a device would be replaced by a file
        raise ValueError(f"--output={output} is no regular file; name one that may be replaced")
    model, shards, fp8, _ = open_told(_hf_folder())
    tokens_BS = read_tokens(path, model.vocab_size)
    precision = PRECISION.value or ("fp8" if fp8 else "bf16")
    config = with_precision("bf16", model)
    if precision != "bf16":
        try:
            config = with_precision(precision, model)
        except ValueError as error:  # FP8 wants multiples of 128
            reason = str(error).partition(";")[0]
            raise ValueError(f"--precision={precision}: {reason}; use --precision=bf16") from error
    session.start(keep_heap=False)
    mesh = all_devices(config)
    with progress_bar(shards.num_bytes, "load") as progress:
        # A checkpoint that is not in FP8 is quantised from FP32, as in training.
        weights = load(shards, config, mesh, "fp32" if precision == "fp8" and not fp8 else precision, progress.update)
    found = logits(config, weights, tokens_BS, mesh)
    with replacing(output) as descriptor, open(descriptor, "wb", closefd=False) as file:
        np.savez(file, **found)
    print(f"{output}: " + ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items()))


def open_told(folder: Path) -> Folder:
    """Check a checkpoint, and say what a user should know of it."""
    opened = open_folder(folder)
    for note in opened.notes:
        print(f"NOTE: {note}")
    return opened


def with_precision(precision: str, model: Model) -> Config:
    """Return a checkpoint's model in the recipe of --config, whose own model and precision do not matter.

    Raises:
        ValueError: the model is impossible, or cannot be computed in `precision`.
    """
    base = to_dict(
        from_config_dict(CONFIG.value).with_(execution={"precision": precision, "experts": "auto"}, model=model)
    )
    return from_config_dict(base)


def all_devices(config: Config) -> jax.sharding.Mesh:
    """Return a mesh that splits the experts, and with them all other weights, over all devices."""
    count = jax.device_count()
    model = config.model
    for name, size in {"width": model.width, "num_experts": model.num_experts, "kv_latent": model.kv_latent}.items():
        if size % count:
            raise ValueError(f"{count} devices do not divide the model's {name} = {size}; use fewer devices")
    return make_mesh(Mesh(pipe=1, data=1, node=1, expert=count, tensor=1))


def list_tensors(config: Config, fp8: bool) -> None:
    """Print every tensor with its dtype, shape and bytes, then the totals."""
    tensors = expected(config.model, fp8)
    for name, (dtype, shape) in tensors.items():
        print(f"{name}  {dtype}  {list(shape)}  {DTYPES[dtype].itemsize * int(np.prod(shape)):,}")
    print(f"{len(tensors):,} tensors, {num_bytes(config.model, fp8):,} bytes")


def _hf_folder() -> Path:
    return local_path(HF.value, "--hf")


def _needed(flag: str) -> str:
    value = flags.FLAGS[flag].value
    if value is None:
        raise ValueError(f"--{flag} is missing; give it: {flags.FLAGS[flag].help}")
    return value


COMMANDS = {"import": import_, "export": export, "adapters": adapters, "verify": verify, "logits": write_logits}

if __name__ == "__main__":
    command.run(main, words=tuple(COMMANDS))
