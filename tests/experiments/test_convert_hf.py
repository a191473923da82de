"""The command `experiments.convert_hf` from its arguments to its files.

Each command runs in a process of its own, forked from one that has imported what they all need: an import takes
seconds, a command less.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.huggingface.config import read_model
from deepseek_jax.huggingface.config_writer import TokenIds, write_model
from deepseek_jax.huggingface.contents import expected
from deepseek_jax.huggingface.folder import initial_weights
from deepseek_jax.huggingface.load import load
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.safetensors.folder import INDEX, Shards
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.state import jit_state_around
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import claim_workdir, read_config, read_tokenizer
from experiments.benchmarks import synthetic_checkpoint
from tests.golden import hf_checkpoint
from tests.support.checkpoints import config as small_config
from tests.training.runs import finish, start, write_corpus

pytestmark = pytest.mark.xdist_group("huggingface")

ROOT = Path(__file__).parents[2]
DEADLINE = 600.0  # seconds for one command, on a loaded machine with nothing compiled
CONFIG = ("--config=configs/tiny.py", "--config.data.sequence_length=128")
SHARD_BYTES = 500_000
TINY_SHARDS = "--shard_gigabytes=0.0001"

# Reads {"arguments": [...], "log": path, "killed": false} by line; answers with the process id, and with its exit code
# when it has ended. "killed": it is, as soon as its record has a finished shard.
SERVER = """
import gc, json, os, signal, sys, warnings
from deepseek_jax.safetensors.writer import ShardWriter
from experiments import command, convert_hf

gc.freeze()  # or each process, when it ends, visits every object that was imported

for line in sys.stdin:
    request = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX has threads once it has computed, and here it has not
        pid = os.fork()
    if pid == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["convert_hf", *request["arguments"]]
        if request["killed"]:
            record = ShardWriter.record
            ShardWriter.record = lambda *rest: (record(*rest), os.kill(os.getpid(), signal.SIGKILL))
        command.run(convert_hf.main, tuple(convert_hf.COMMANDS))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Runs `python -m experiments.convert_hf *arguments`, one after the other."""

    def __init__(self, server: subprocess.Popen, log: Path):
        self.server, self.log = server, log

    def start(self, *arguments: str, killed: bool = False) -> int:
        """Start a command and return its process id; `end` must follow."""
        request = {"arguments": [str(argument) for argument in arguments], "log": str(self.log), "killed": killed}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self) -> int:
        """Wait for the command and return its exit code."""
        return int(self.server.stdout.readline())

    def __call__(self, *arguments: str) -> str:
        """Run a command that succeeds and return what it printed."""
        self.start(*arguments)
        assert self.end() == 0, self.log.read_text()[-4000:]
        return self.log.read_text()

    def fails(self, *arguments: str) -> str:
        """Run a command that ends with an error and return what it printed."""
        self.start(*arguments)
        assert self.end() == 2, self.log.read_text()[-4000:]
        return self.log.read_text()


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        yield Commands(process, tmp_path_factory.mktemp("log") / "log")
        process.stdin.close()
        assert process.wait(DEADLINE) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder in FP8, of several files, with everything that goes along with weights."""
    folder = tmp_path_factory.mktemp("released") / "small"
    synthetic_checkpoint.write(small_config().model, folder, fp8=True, max_shard_bytes=SHARD_BYTES)
    (folder / "conversion.json").unlink()  # as downloaded
    byte_tokenizer().save(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "chat_template.jinja").write_bytes("{{ bos_token }}\r\n<｜User｜>".encode())  # a line end of Windows
    hf = json.loads((folder / "config.json").read_text())
    # a key that says nothing of the model, on one line
    (folder / "config.json").write_text(json.dumps(hf | {"ep_size": 1}))
    return folder


@pytest.fixture(scope="module")
def workdir(convert, checkpoint, tmp_path_factory) -> Path:
    """What import made of it."""
    folder = tmp_path_factory.mktemp("run") / "W"
    printed = convert("import", f"--hf={checkpoint}", f"--workdir={folder}", *CONFIG)
    assert f"python -m experiments.train --config={folder}/config.py --workdir={folder}" in printed
    return folder


@pytest.fixture(scope="module")
def whole(convert, workdir, tmp_path_factory) -> Path:
    """An export that nothing interrupted, in many files."""
    folder = tmp_path_factory.mktemp("whole") / "small"
    convert("export", f"--workdir={workdir}", f"--hf={folder}", TINY_SHARDS)
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and SHA-256 of every tensor."""
    shards = Shards(folder)
    read = {name: hashlib.sha256(shards.read(name).tobytes()).hexdigest() for name in shards.entries}
    return {name: (entry.dtype, entry.shape, read[name]) for name, entry in shards.entries.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder; empty if there is none."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(folder: Path, copy: Path, **keys: object) -> Path:
    """A copy of a checkpoint, by links, with other values in config.json."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (copy / path.name).symlink_to(path)
    (copy / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | keys))
    return copy


# ---- import, export, verify


def test_every_byte_comes_back(convert, checkpoint, whole):
    assert {dtype for dtype, _, _ in tensors(checkpoint).values()} == {"F8_E4M3", "BF16", "F32"}
    assert tensors(whole) == tensors(checkpoint)
    assert len(list(whole.glob("*.safetensors"))) > 2 * len(list(checkpoint.glob("*.safetensors"))) > 6
    kept = {name: data for name, data in contents(checkpoint).items() if not name.startswith("model")}
    assert len(kept) == 5
    assert {
        name: data for name, data in contents(whole).items() if not name.startswith(("model", "conversion"))
    } == kept
    printed = convert("verify", f"--hf={whole}", *CONFIG)
    assert "FP8: complete" in printed and "SHA-256 of every file: as written" in printed
    printed = convert("verify", f"--hf={checkpoint}", *CONFIG)  # nobody recorded its checksums
    assert "FP8: complete" in printed and "SHA-256" not in printed and "values: not checked" in printed


def test_bf16_has_no_scales(convert, checkpoint, workdir, tmp_path):
    convert("export", f"--workdir={workdir}", f"--hf={tmp_path / 'bf16'}", "--precision=bf16")
    found = tensors(tmp_path / "bf16")
    assert found.keys() == {name for name in tensors(checkpoint) if not name.endswith("_scale_inv")}
    assert {dtype for dtype, _, _ in found.values()} == {"BF16", "F32"}
    hf = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in hf and read_model(hf) == small_config().model
    assert (tmp_path / "bf16" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert "not FP8: complete" in convert("verify", f"--hf={tmp_path / 'bf16'}", *CONFIG)


def test_the_run_owns_recipe_and_model(workdir, checkpoint):
    spec = importlib.util.spec_from_file_location("imported", workdir / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = from_config_dict(module.get_config())
    assert config == read_config(workdir)
    assert config.model == small_config().model
    assert (config.name, config.data.sequence_length, config.execution.precision) == ("small", 128, "fp32")
    assert config.training.initial_weights == str(checkpoint)


def test_a_folder_without_its_mtp_layers_is_noted(convert, tmp_path):
    """As transformers saves it: nobody is left to believe that the layers are there."""
    golden = hf_checkpoint.FOLDER / "base"
    hf = json.loads((golden / "config.json").read_text())
    kept = {
        name: value
        for name, value in load_file(golden / "model.safetensors").items()
        if not name.startswith(tuple(f"model.layers.{hf['num_hidden_layers'] + depth}." for depth in range(2)))
    }
    save_file(kept, tmp_path / "model.safetensors")
    shutil.copy(golden / "config.json", tmp_path)
    printed = convert("verify", f"--hf={tmp_path}", *CONFIG)
    assert "NOTE: " in printed and "it is read WITHOUT MTP layers, as if the key were 0" in printed


def test_widths_that_fp8_does_not_have_are_refused(convert, tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((1, 8), np.int32))
    arguments = (f"--tokens={tmp_path / 'tokens.npy'}", f"--output={tmp_path / 'out.npz'}", *CONFIG)
    folder = hf_checkpoint.FOLDER / "no_query_latent"
    said = convert.fails("logits", f"--hf={folder}", "--precision=fp8", *arguments)
    assert "--precision=fp8: config.model: width = 24 must be a multiple of 128" in said
    assert said.endswith("; use --precision=bf16\n")
    for output in (tmp_path, "/dev/full"):
        said = convert.fails("logits", f"--hf={folder}", *arguments[:1], f"--output={output}", *CONFIG)
        assert str(output) in said and "load:" not in said


def test_an_import_copies_no_weights(workdir, checkpoint):
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file()) < weights / 10
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("saved_on", "exported_on"), [((2, 1, 4), 1), pytest.param((1, 1, 1), 2, marks=pytest.mark.slow)]
)
def test_through_a_checkpoint_of_the_run(convert, checkpoint, workdir, whole, tmp_path, saved_on, exported_on):
    """FP32 masters, split over one mesh, saved by Orbax, restored onto another: the stored bytes come back."""
    copy = tmp_path / "W"
    shutil.copytree(workdir, copy)
    config = read_config(copy)
    data, node, expert = saved_on
    sizes = dataclasses.replace(config.mesh, pipe=1, data=data, node=node, expert=expert, tensor=1)
    mesh = make_mesh(sizes, jax.devices()[: data * node * expert])
    with jax.set_mesh(mesh):
        weights = load(Shards(checkpoint), config, mesh, "fp32")
        state = jit_state_around(config.optimizer, weights)
    checkpoints = Checkpoints(copy, keep=1)
    checkpoints.save(state, Progress(step=3, tokens_seen=0, data=None), config, read_tokenizer(copy), mesh)
    checkpoints.close()
    (copy / "config.json").write_text((copy / "config.json").read_text().replace(str(checkpoint), "/gone"))
    printed = convert(
        "export", f"--workdir={copy}", f"--hf={tmp_path / 'small'}", TINY_SHARDS, f"--cpu_devices={exported_on}"
    )
    assert "step 3 of" in printed
    assert tensors(tmp_path / "small") == tensors(whole)
    said = convert.fails("export", f"--workdir={copy}", f"--hf={tmp_path / 'none'}", "--step=0")
    assert (
        "training.initial_weights = '/gone' does not exist; put the checkpoint back there, or import it from where it"
        " is now" in said
    )


def test_a_folder_that_moved_is_imported_from_where_it_is(convert, checkpoint, tmp_path):
    (tmp_path / "old").mkdir()
    moved = changed(checkpoint, tmp_path / "old" / "small")
    arguments = (f"--workdir={tmp_path / 'W'}", *CONFIG)
    convert("import", f"--hf={moved}", *arguments)
    moved = moved.rename(tmp_path / "small")
    said = convert.fails("export", f"--workdir={tmp_path / 'W'}", f"--hf={tmp_path / 'out'}")
    assert f"training.initial_weights = '{tmp_path / 'old' / 'small'}' does not exist" in said
    assert not (tmp_path / "out").exists()
    convert("import", f"--hf={moved}", *arguments)
    assert read_config(tmp_path / "W").training.initial_weights == str(moved)


def test_a_killed_export_continues(convert, workdir, whole, tmp_path):
    folder = tmp_path / "small"
    command = ("export", f"--workdir={workdir}", f"--hf={folder}", TINY_SHARDS)
    convert.start(*command, killed=True)
    assert convert.end() == -signal.SIGKILL
    record = json.loads((folder / "conversion.json").read_text())
    assert 0 < len(record["shards"]) < record["num_shards"] and not (folder / INDEX).exists()
    finished = {file: (folder / file).stat() for file in record["shards"]}

    said = convert.fails("verify", f"--hf={folder}", *CONFIG)
    assert f"{folder}" in said and "unfinished" in said and "run the same command again" in said
    said = convert.fails("export", f"--workdir={workdir}", f"--hf={folder}", "--shard_gigabytes=0.0002")
    assert (
        "holds a conversion of other tensors, shard sizes or source: choose another folder, or delete this one" in said
    )

    convert(*command)
    assert contents(folder) == contents(whole)
    for file, before in finished.items():
        after = (folder / file).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# ---- --dry_run


def lines(model: object, fp8: bool) -> tuple[list[str], str]:
    """The list, made anew."""
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    rows = {
        name: (dtype, list(shape), sizes[dtype] * int(np.prod(shape)))
        for name, (dtype, shape) in expected(model, fp8).items()
    }
    total = sum(size for _, _, size in rows.values())
    listed = [f"{name}  {dtype}  {shape}  {size:,}" for name, (dtype, shape, size) in rows.items()]
    return listed, f"{len(rows):,} tensors, {total:,} bytes"


def test_an_import_without_a_recipe_runs_on_what_is_there(convert, checkpoint, tmp_path):
    """V3's mesh of 64 devices was written, and the printed command refused it."""
    printed = convert(
        "import", f"--hf={checkpoint}", f"--workdir={tmp_path / 'W'}", "--config.execution.precision=bf16"
    )
    assert "its recipe is V3's" in printed and "in BF16" in printed
    mesh = read_config(tmp_path / "W").mesh
    assert (mesh.data, mesh.node, mesh.expert) == (-1, 1, 1)


@pytest.mark.parametrize(("command", "fp8"), [("import", True), ("export", True), ("export", False)])
def test_dry_run_lists_and_writes_nothing(convert, checkpoint, workdir, tmp_path, command, fp8):
    if command == "import":
        arguments = (f"--hf={checkpoint}", f"--workdir={tmp_path / 'new'}", *CONFIG)
    else:
        arguments = (f"--hf={tmp_path / 'new'}", f"--workdir={workdir}", f"--precision={'fp8' if fp8 else 'bf16'}")
    before = contents(workdir)
    printed = convert(command, "--dry_run", *arguments)
    listed, total = lines(small_config().model, fp8)
    assert printed.splitlines() == [*listed, total]
    assert "lm_head.weight  BF16  [512, 128]  131,072" in listed
    assert not list(tmp_path.iterdir()) and contents(workdir) == before


def test_dry_run_of_v3_is_the_released_checkpoint(convert, tmp_path):
    base = from_config_dict(deepseek_v3.get_config())
    model = read_model(json.loads(json.dumps(write_model(base.model, True, TokenIds(0, 1, 2), 4096))))
    claim_workdir(tmp_path, dataclasses.replace(base, model=model))
    printed = convert("export", "--dry_run", f"--workdir={tmp_path}", f"--hf={tmp_path / 'hf'}").splitlines()
    assert printed[-1] == "91,991 tensors, 688,574,839,360 bytes"
    assert "model.layers.60.mlp.experts.255.down_proj.weight_scale_inv  F32  [56, 16]  3,584" in printed
    assert len(printed) == 91_992 and not (tmp_path / "hf").exists()


# ---- errors


def test_a_folder_without_a_readable_config(convert, checkpoint, tmp_path):
    new = tmp_path / "W"
    said = convert.fails("import", f"--hf={tmp_path}", f"--workdir={new}", *CONFIG)
    assert f"{tmp_path / 'config.json'} is missing; a checkpoint in Hugging Face's format has one" in said
    broken = changed(checkpoint, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": ')
    said = convert.fails("import", f"--hf={broken}", f"--workdir={new}", *CONFIG)
    assert f"{broken / 'config.json'} is not valid JSON" in said and "restore or repair it" in said
    assert not new.exists()


def test_a_config_that_does_not_fit_the_tensors(convert, checkpoint, tmp_path):
    fewer = changed(checkpoint, tmp_path / "fewer", num_hidden_layers=2)
    for command in (("verify",), ("import", f"--workdir={tmp_path / 'W'}")):
        said = convert.fails(*command, f"--hf={fewer}", *CONFIG)
        assert f"{fewer} does not hold this model; choose its config, or another checkpoint:" in said
        assert "extra: model.layers.3." in said
    assert not (tmp_path / "W").exists()


def test_a_folder_without_tokenizer(convert, checkpoint, tmp_path):
    without = changed(checkpoint, tmp_path / "without")
    (without / "tokenizer_config.json").unlink()
    said = convert.fails("import", f"--hf={without}", f"--workdir={tmp_path / 'W'}", *CONFIG)
    assert f"{without} lacks ['tokenizer_config.json']; a run needs its tokenizer: put these files there" in said
    assert not (tmp_path / "W").exists()


def test_a_workdir_that_is_taken(convert, checkpoint, workdir, tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    said = convert.fails("import", f"--hf={checkpoint}", f"--workdir={tmp_path}", *CONFIG)
    assert f"{tmp_path} holds a run with checkpoints; import into another --workdir" in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    before = contents(workdir)
    convert("import", f"--hf={checkpoint}", f"--workdir={workdir}", *CONFIG)  # the same again
    assert contents(workdir) == before
    said = convert.fails("import", f"--hf={checkpoint}", f"--workdir={workdir}", *CONFIG, "--config.seed=7")
    assert "seed: 0 in the workdir, 7 given" in said
    assert contents(workdir) == before


def test_wrong_arguments(convert, checkpoint, workdir, tmp_path):
    """Others: tests/experiments/test_wrong_inputs.py."""
    hf = f"--hf={tmp_path / 'new'}"
    for size in ("nan", "inf", "1e300"):
        said = convert.fails("export", hf, f"--workdir={workdir}", f"--shard_gigabytes={size}")
        assert "shard_gigabytes" in said
    assert f"has no checkpoint of step 4; the run has not trained since {checkpoint}" in convert.fails(
        "export", hf, f"--workdir={workdir}", "--step=4"
    )
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_not_begun_with(checkpoint, workdir, tmp_path):
    """Neither tensors of another shape nor, what no shape shows, another scaling of the gates."""
    config = read_config(workdir)
    other = changed(checkpoint, tmp_path / "other", routed_scaling_factor=1.5)
    mesh = make_mesh(dataclasses.replace(config.mesh, pipe=1, data=1, node=1, expert=1, tensor=1), jax.devices()[:1])
    training = dataclasses.replace(config.training, initial_weights=str(other))
    message = (
        f"(?s)initial_weights = '{other}' is another model than the config's"
        ".*import makes.*1.5 in the folder, 2.5 in the config"
    )
    with pytest.raises(ValueError, match=message):
        initial_weights(dataclasses.replace(config, training=training), mesh)


def test_wrong_tokens_are_found_before_the_weights_are_read(convert, checkpoint, tmp_path):
    tokens, output = tmp_path / "tokens.npy", tmp_path / "out.npz"
    arguments = ("logits", f"--hf={checkpoint}", f"--tokens={tokens}", *CONFIG)
    size = small_config().model.vocab_size
    cases = {
        "has int32 [5]; give int32 [B, S]": np.zeros(5, np.int32),
        "has float32 [1, 5]; give int32 [B, S]": np.zeros((1, 5), np.float32),
        "has int32 [0, 5]; give int32 [B, S]": np.zeros((0, 5), np.int32),
        f"has tokens from 0 to {size}, the vocabulary is 0 to {size - 1}; use the checkpoint's tokenizer": np.array(
            [[0, size]], np.int32
        ),
    }
    for text, array in cases.items():
        np.save(tokens, array)
        said = convert.fails(*arguments, f"--output={output}")
        assert f"{tokens} {text}" in said and "load:" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


# ---- what a model is used for


@pytest.mark.slow
def test_logits(convert, checkpoint, tmp_path):
    model = small_config().model
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, model.vocab_size, (2, 128), np.int32))
    arguments = ("logits", f"--hf={checkpoint}", f"--tokens={tmp_path / 'tokens.npy'}", *CONFIG)
    found = {}
    for precision in ("fp8", "fp32"):
        printed = convert(*arguments, f"--output={tmp_path / 'out.npz'}", f"--precision={precision}")
        with np.load(tmp_path / "out.npz") as file:
            found[precision] = dict(file)
        shapes = {name: (array.dtype.name, array.shape) for name, array in found[precision].items()}
        assert shapes == {
            "logits": ("float32", (2, 128, model.vocab_size)),
            "experts": ("int32", (2, 2, 128, model.experts_per_token)),
            "expert_weights": ("float32", (2, 2, 128, model.experts_per_token)),
            "mtp_logits": ("float32", (2, 127, model.vocab_size)),
        }
        assert f"logits float32 [2, 128, {model.vocab_size}]" in printed
    error = np.linalg.norm(found["fp8"]["logits"] - found["fp32"]["logits"])
    assert 0 < error < 0.1 * np.linalg.norm(found["fp32"]["logits"])


@pytest.mark.slow
def test_the_run_is_trained_on_and_continues_a_prompt(convert, checkpoint, tmp_path):
    """Two steps at a learning rate of almost nothing leave the weights that were imported."""
    corpus, workdir, log = write_corpus(tmp_path / "corpus"), tmp_path / "W", tmp_path / "log"
    recipe = (f"--config=tests/training/nano.py:{corpus}", f"--config.training.num_tokens={2 * 8 * 32}")
    recipe += ("--config.optimizer.warmup_steps=100000000", "--config.training.eval_every=0")
    convert("import", f"--hf={checkpoint}", f"--workdir={workdir}", *recipe, "--cpu_devices=2")
    finish(start(["-m", "experiments.train", f"--config={workdir / 'config.py'}", f"--workdir={workdir}"], log), log)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    config = read_config(workdir)
    mesh = make_mesh(dataclasses.replace(config.mesh, pipe=1, data=1, node=1, expert=1, tensor=1), jax.devices()[:1])
    trained, progress = restore_weights(config, workdir, mesh)
    imported = load(Shards(checkpoint), config, mesh, "fp32")
    assert (progress.step, progress.tokens_seen) == (2, 2 * 8 * 32)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6),
        trained.params,
        imported.params,
    )
    assert not np.array_equal(trained.params["embed_VD"], imported.params["embed_VD"])

    text = tmp_path / "text"
    finish(
        start(["-m", "experiments.generate", f"--workdir={workdir}", "--prompt=the ", "--max_new_tokens=3"], text), text
    )
    assert text.read_text(errors="replace").startswith("the ")

    # an export of ours is opened where it lies
    convert("export", f"--hf={tmp_path / 'E'}", f"--workdir={workdir}", "--precision=bf16")
    options = f"--hf={tmp_path / 'E'}", "--prompt=the ", "--max_new_tokens=3", "--temperature=1"
    finish(start(["-m", "experiments.generate", *options], text), text)
    assert "the " in text.read_text(errors="replace")
