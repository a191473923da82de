"""Folders as people have them: saved by other programs, or without what a released one has."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepseek_jax.huggingface.folder import open_folder
from deepseek_jax.huggingface.load import load
from tests.golden import hf_checkpoint
from tests.support.meshes import mesh_of

GOLDEN = hf_checkpoint.FOLDER / "base"
HF = json.loads((GOLDEN / "config.json").read_text())
LAYERS, MTP = HF["num_hidden_layers"], HF["num_nextn_predict_layers"]
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture
def make(tmp_path):
    """Writes a folder and opens it."""

    def write(tensors, **keys):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(HF | keys))
        return open_folder(tmp_path)

    return write


def without_mtp(tensors):
    names = tuple(f"model.layers.{LAYERS + depth}." for depth in range(MTP))
    return {name: value for name, value in tensors.items() if not name.startswith(names)}


def test_frequencies_of_the_rotary_part_are_not_read(make, tensors):
    """Moonlight and Kimi-K2 store them, and call themselves kimi_k2."""
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(LAYERS + MTP)
    }
    opened = make(tensors | frequencies, model_type="kimi_k2")
    assert opened.model == hf_checkpoint.read("base").config.model and not opened.notes
    with pytest.raises(ValueError, match="1 extra: model.layers.0.self_attn.rotary_emb.other"):
        make(tensors | {"model.layers.0.self_attn.rotary_emb.other": np.ones(6, np.float32)})


def test_a_folder_that_lost_its_mtp_layers_is_read_without_them(make, tensors):
    """As transformers saves it: the key stays. The folder says so, and no weight is made up."""
    opened = make(without_mtp(tensors))
    assert opened.model == dataclasses.replace(hf_checkpoint.read("base").config.model, num_mtp_layers=0)
    assert len(opened.notes) == 1
    assert f"says num_nextn_predict_layers = {MTP}, and the folder has no tensor of an MTP layer" in opened.notes[0]
    first = next(name for name in tensors if name.startswith(f"model.layers.{LAYERS}."))
    with pytest.raises(ValueError, match="missing: model.layers"):  # but some of it is a damage
        make(without_mtp(tensors) | {first: tensors[first]})


@pytest.mark.parametrize("announced", [0, MTP - 1])
def test_mtp_layers_that_are_not_announced_are_refused_with_the_key(make, tensors, announced):
    with pytest.raises(
        ValueError,
        match=f"tensors of an MTP layer, model.layers.{LAYERS + announced}, .*"
        f'set "num_nextn_predict_layers": {MTP} there, or remove them',
    ):
        make(tensors, num_nextn_predict_layers=announced)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_selection_biases_of_another_dtype_lose_nothing(make, tensors, dtype):
    """As transformers stored them before 2026."""
    golden = hf_checkpoint.read("base")
    stored = {name: value.astype(dtype) if name.endswith(BIAS) else value for name, value in tensors.items()}
    assert all(stored[name].dtype == dtype for name in stored if name.endswith(BIAS))
    found = load(make(stored).shards, golden.config, mesh_of(), "fp32")
    expected = jax.tree.map(lambda bias: np.asarray(bias).astype(dtype).astype(np.float32), golden.router_bias)
    jax.tree.map(np.testing.assert_array_equal, found.router_bias, expected)


WRONG_CONFIGS = {
    "list": (b"[]", "holds a list, not a dict"),
    "null": (b"null", "holds a NoneType, not a dict"),
    "text": (b'"x"', "holds a str, not a dict"),
    "latin-1": ('{"a": "\xe9"}'.encode("latin-1"), "is not UTF-8 text"),
    "deep": (b"[" * 100_000, "is nested too deeply"),
    "digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "infinite": (json.dumps(HF | {"rms_norm_eps": float("inf")}).encode(), "rms_norm_eps is inf: it must be a finite"),
    "layers": (json.dumps(HF | {"num_hidden_layers": 10**9}).encode(), "num_hidden_layers = 1000000000"),
    "experts": (json.dumps(HF | {"n_routed_experts": 2 * 10**6}).encode(), "n_routed_experts = 2000000"),
    "mtp": (json.dumps(HF | {"num_nextn_predict_layers": 10**9}).encode(), "num_nextn_predict_layers = 1000000000"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configs_are_refused_at_once(tmp_path, case):
    content, message = WRONG_CONFIGS[case]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        open_folder(tmp_path)


def test_a_config_that_is_no_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="there is no folder .*absent"):
        open_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="there is no folder .*n{100}; name"):
        open_folder(tmp_path / ("n" * 5000))
    path.mkdir()
    with pytest.raises(ValueError, match="config.json is a folder"):
        open_folder(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="config.json is a FIFO"):
        open_folder(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ValueError, match="config.json cannot be read: Too many levels"):
        open_folder(tmp_path)
