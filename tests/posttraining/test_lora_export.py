"""Adapters on a folder in FP8: an export has its bytes where they learned nothing, else W + scale A B."""

import jax
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.adapters import Lora
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.huggingface.load import abstract_weights
from deepseek_jax.huggingface.peft import adapter_tensors
from deepseek_jax.parameters import Fp8Weight
from deepseek_jax.safetensors.folder import Shards
from deepseek_jax.training.adapted import abstract_adapters
from deepseek_jax.training.adapters_file import check_base, claim_adapters
from deepseek_jax.training.checkpoint import Checkpoints, Progress
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import claim_workdir, read_tokenizer
from experiments.benchmarks import synthetic_checkpoint
from tests.support.checkpoints import config as small_config
from tests.support.meshes import mesh_of
from tests.training.runs import finish, start

LORA = Lora(rank=2, alpha=4.0, targets=("attention", "shared", "experts"))
MESH = mesh_of()


def write_run(folder):
    """A checkpoint of adapters on folder/base: the shared experts and all routed ones but the first learned nothing."""
    synthetic_checkpoint.write(small_config().model, folder / "base", fp8=True, max_shard_bytes=10**9)
    byte_tokenizer().save(folder / "base" / "tokenizer.json")
    config, workdir = small_config().with_(training={"initial_weights": str(folder / "base")}), folder / "lora"
    workdir.mkdir()
    byte_tokenizer().save(workdir / "tokenizer.json")
    random = np.random.default_rng(0)

    def fill(path, leaf):
        where = jax.tree_util.keystr(path)
        values = np.zeros(leaf.shape, leaf.dtype)
        if path[0].key == "params" and not ("shared" in where and "lora_b" in where):
            values = 0.02 * random.standard_normal(leaf.shape).astype(leaf.dtype)
        if "lora_b_EUO" in where:
            values[:, 1:] = 0
        return jax.device_put(values, leaf.sharding)

    state = jax.tree_util.tree_map_with_path(
        fill, abstract_adapters(config, LORA, abstract_weights(config, MESH), MESH)
    )
    claim_adapters(workdir, LORA, check_base(config, workdir))
    claim_workdir(workdir, config)
    with jax.set_mesh(MESH):
        checkpoints = Checkpoints(workdir, keep=1)
        checkpoints.save(state, Progress(step=1, tokens_seen=8, data={}), config, read_tokenizer(workdir), MESH)
        checkpoints.close()
    return config, adapter_tensors(state["params"], config.model)


def numbers(shards, name):
    """A matrix in FP32, and what is stored of it."""
    values = shards.read(name)
    if f"{name}_scale_inv" not in shards.entries:
        return values.astype(np.float32), values.tobytes()
    scales = shards.read(f"{name}_scale_inv")
    blocks = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: values.shape[0], : values.shape[1]]
    codes = values if values.dtype == ml_dtypes.float8_e4m3fn else values.view(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * blocks, values.tobytes() + scales.tobytes()


@pytest.mark.slow
def test_an_export_changes_what_learned_and_no_other_byte(tmp_path):
    config, pairs = write_run(tmp_path)
    weights, _ = restore_weights(config, tmp_path / "lora", MESH, as_stored=True)
    assert isinstance(weights.params["moe_layers"]["attention"]["o_NHD"], Fp8Weight)
    for precision in ("fp8", "bf16"):
        command = ["-m", "experiments.convert_hf", "export", f"--workdir={tmp_path / 'lora'}"]
        log = tmp_path / f"{precision}.log"
        finish(start([*command, f"--hf={tmp_path / precision}", f"--precision={precision}"], log), log)
    base, fp8, bf16 = (Shards(tmp_path / name) for name in ("base", "fp8", "bf16"))
    learned = 0
    for name in (name for name in base.entries if not name.endswith(("_scale_inv", "_bias"))):  # biases are the state's
        module = f"base_model.model.{name.removesuffix('.weight')}"
        (old, old_bytes), (new, new_bytes) = numbers(base, name), numbers(fp8, name)
        added = pairs.get(f"{module}.lora_B.weight", np.zeros(0))
        if not added.any():
            assert old_bytes == new_bytes, name
            continue
        wanted = old + LORA.alpha / LORA.rank * added @ pairs[f"{module}.lora_A.weight"]
        # half a step of E4M3 is a 16th; below its smallest normal number, a 1024th of the largest scale's unit
        assert np.all(np.abs(new - wanted) <= np.abs(wanted) / 16 + np.abs(wanted).max() / 448 / 512), name
        np.testing.assert_allclose(numbers(bf16, name)[0], wanted, rtol=2**-8, atol=1e-7, err_msg=name)
        learned += 1
    layers, moe = config.model.num_layers, config.model.num_moe_layers
    assert learned == 5 * layers + 3 * moe  # of attention, and of the first expert
