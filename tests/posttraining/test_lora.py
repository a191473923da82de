"""Runs that train adapters: what a workdir holds, how it continues, what it refuses, and what is merged."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import tiny_distillation
from deepseek_jax.adapters import unadapted
from deepseek_jax.config import from_config_dict
from deepseek_jax.huggingface.changes import changes
from deepseek_jax.huggingface.names import tensors
from deepseek_jax.huggingface.peft import save_adapters
from deepseek_jax.posttraining.settings import read
from deepseek_jax.posttraining.sft import train_sft
from deepseek_jax.training.adapted import merged
from deepseek_jax.training.adapters_file import read_adapters
from deepseek_jax.training.origin import find_origin
from deepseek_jax.training.record import read_sealed
from deepseek_jax.training.weights import restore_adapters, restore_weights
from deepseek_jax.training.workdir import read_config
from tests.posttraining.test_sft import chat, one_device, save_run, settings

LORA = {"rank": 2, "alpha": 4.0, "targets": ("attention", "ffn", "shared", "experts")}


def lora_settings(*arguments, lora=LORA, **training):
    tree = settings(*arguments, **training)
    tree.posttraining.sft.mtp = "off"
    tree.posttraining.lora = lora
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank = 0 leaves nothing to train; give 1 or more"),
        ({"alpha": 0.0}, "alpha = 0.0 must be a positive number"),
        ({"targets": ()}, r"targets = \(\) must name some weights"),
        ({"targets": ("ffn", "ffn")}, "each once"),
    ],
)
def test_adapters_that_could_not_learn_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read(lora_settings(lora=LORA | change))


def test_what_adapters_cannot_hold_is_refused():
    for section, key, value, message in (
        ("optimizer", "bias_update_rate", (("constant", 1.0, 1e-3),), "would move router biases"),
        ("optimizer", "ema_decay", 0.9, "no average of adapters"),
        ("mesh", "pipe", 2, "without a pipeline"),
    ):
        tree = lora_settings()
        tree[section][key] = value
        with pytest.raises(ValueError, match=message):
            read(tree)
    tree = lora_settings()
    tree.posttraining.sft.mtp = "detached"
    with pytest.raises(ValueError, match="they have no adapters; set it to 'off'"):
        read(tree)
    tree = tiny_distillation.get_config()
    tree.posttraining.distillation.teacher = "T"
    tree.training.initial_weights = "W"
    tree.posttraining.lora = LORA
    with pytest.raises(
        ValueError, match=r"stages \('sft', 'grpo'\), and stage = 'distillation'; leave it out, or begin"
    ):
        read(tree)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """(a folder with a pre-trained run and chats; a complete run of adapters on it)."""
    folder = tmp_path_factory.mktemp("lora")
    tree = without_mtp(settings())
    del tree["posttraining"]
    tree.training.initial_weights = ""
    save_run(from_config_dict(tree), folder / "base")
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(i, f"{i}!")) + "\n" for i in range(40)))
    return folder, run(folder)


def without_mtp(tree):
    tree.model.num_mtp_layers = 0
    return tree


def run(folder, step="@1"):
    base = f"{folder / 'base'}{step}"
    tree = without_mtp(lora_settings(folder / "chats.jsonl", base, num_tokens=4.0 * 8 * 64))
    config, posttraining = read(tree)
    return train_sft(config, posttraining, folder / "lora", one_device(config))


@pytest.mark.slow
def test_a_run_of_adapters_saves_them_alone_continues_to_the_same_bits_and_merges(workdirs):
    folder, result = workdirs
    with pytest.raises(ValueError, match="adapters are of one base; name a step: .*@1"):
        run(folder, step="")
    workdir = folder / "lora"
    record = read_sealed(workdir / "checkpoints" / "4" / "run")
    arrays = [path for path in record["fingerprints"] if path.startswith(("['params']", "['optimizer']"))]
    assert result.step == 4
    assert len([path for path in arrays if "lora_" in path]) == 3 * 2 * 16  # parameters and both moments
    assert not any(name in path for path in arrays for name in ("embed", "head", "norm", "router"))
    with pytest.raises(ValueError, match="is a run of adapters, whose checkpoints have no model; merge them"):
        find_origin(read_config(workdir).with_(training={"initial_weights": str(workdir)}))
    shutil.rmtree(workdir / "checkpoints" / "4")  # it was killed after step 2
    again = run(folder)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(each.state) for each in (result, again)))


@pytest.mark.slow
def test_what_peft_reads_and_what_is_merged_are_the_same_weights(workdirs, tmp_path):
    """W + alpha / r (B A) of the stored tensors, of every matrix; all else is the base's, bit for bit."""
    folder, _ = workdirs
    config, lora = read_config(folder / "lora"), read_adapters(folder / "lora")
    mesh, model = one_device(config), config.model
    adapted, _ = restore_weights(config, folder / "lora", mesh, merge=False)
    with jax.set_mesh(mesh):
        base, whole = unadapted(adapted), merged(adapted)
    pairs, _ = restore_adapters(config, folder / "lora", mesh)
    save_adapters(pairs, lora, model, tmp_path, "base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    scale, count = settings["lora_alpha"] / settings["r"], 0
    for tensor in tensors(model):
        before, after = (matrix_of(weights, tensor) for weights in (base, whole))
        module = "base_model.model." + tensor.name.removesuffix(".weight")
        added = any(module.endswith("." + name) for name in settings["target_modules"])  # as PEFT finds them
        assert added == (f"{module}.lora_A.weight" in stored)
        if not added:
            np.testing.assert_array_equal(before, after)
            continue
        a, b = (np.float64(stored[f"{module}.lora_{half}.weight"]) for half in "AB")
        assert a.shape == (2, tensor.shape[1]) and b.shape == (tensor.shape[0], 2)
        assert np.any(b) or ".experts." in module  # an expert may have had no token
        np.testing.assert_allclose(after, (before.T + scale * b @ a).T, rtol=0, atol=1e-7)
        count += 1
    assert len(stored) == 2 * count == 2 * (2 * 5 + 3 + 3 + 8 * 3)
    found = changes(base, whole, model, fp8=True)
    assert found.tensors == count and 0 < found.values <= found.changed < found.bytes
    assert changes(base, base, model, fp8=True) == (0, 0, 0, 0, 0)


def matrix_of(weights, tensor):
    """The matrix of a stored tensor in FP32, as [in, out]."""
    leaf = np.asarray(functools.reduce(lambda node, key: node[key], tensor.leaf, weights._asdict()))[tensor.index]
    leaf = leaf if tensor.half is None else leaf[:, tensor.half]
    return leaf.reshape(tensor.matrix_shape)
