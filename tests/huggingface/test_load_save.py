"""Checkpoint -> weights on a mesh -> checkpoint: every byte comes back, from FP8 and through FP32 masters, on any
mesh.
"""

import jax
import numpy as np
import pytest

from deepseek_jax.huggingface import device_arrays
from deepseek_jax.huggingface.contents import check
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.save import save
from deepseek_jax.safetensors import reader
from deepseek_jax.safetensors.folder import Shards
from deepseek_jax.safetensors.header import read_header
from deepseek_jax.safetensors.writer import Planned, ShardWriter
from experiments.benchmarks import synthetic_checkpoint
from tests.golden import hf_checkpoint
from tests.support.checkpoints import config, hashes
from tests.support.meshes import mesh_of

MESHES = ((1, 1, 1), (2, 1, 4), (2, 2, 2))
pytestmark = pytest.mark.xdist_group("huggingface")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    synthetic_checkpoint.write(config().model, folder, fp8=True, max_shard_bytes=200_000)
    return folder


QUICK = (("fp8", MESHES[0]), ("fp8", MESHES[1]), ("fp32", MESHES[2]))
CASES = [
    pytest.param(weights, sizes, marks=[pytest.mark.slow] * ((weights, sizes) not in QUICK))
    for weights in ("fp8", "fp32")
    for sizes in MESHES
]


@pytest.mark.parametrize(("weights", "sizes"), CASES)
def test_every_tensor_comes_back(checkpoint, tmp_path, sizes, weights):
    shards = Shards(checkpoint)
    assert len({entry.file for entry in shards.entries.values()}) > 3
    check(shards, config().model, fp8=True)
    loaded = load(shards, config(), mesh_of(*sizes), weights)
    save(loaded, config().model, tmp_path / "back", fp8=True, max_shard_bytes=200_000)
    assert hashes(tmp_path / "back") == hashes(checkpoint)


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [
        ("fp8", MESHES[0]),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("bf16", MESHES[1]), ("fp32", MESHES[2]))),
    ],
)
def test_accelerators_get_the_same_by_programs(checkpoint, tmp_path, monkeypatch, sizes, weights):
    """CPUs taken for devices with memory of their own: written by donation, transposed and multiplied there, in
    chunks.
    """
    shards, mesh = Shards(checkpoint), mesh_of(*sizes)
    expected = load(shards, config(), mesh, weights)
    monkeypatch.setattr(device_arrays, "HOST_PLATFORMS", set())
    monkeypatch.setattr(reader, "CHUNK_BYTES", 5000)
    found = load(shards, config(), mesh, weights)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    save(found, config().model, tmp_path / "theirs", weights == "fp8", 200_000)
    monkeypatch.undo()
    save(expected, config().model, tmp_path / "ours", weights == "fp8", 200_000)
    assert hashes(tmp_path / "theirs") == hashes(tmp_path / "ours")


def test_scales_may_lie_in_other_files(checkpoint, tmp_path):
    shards = Shards(checkpoint)
    order = sorted(shards.entries.values(), key=lambda entry: entry.name.endswith("_scale_inv"))
    planned = [Planned(entry.name, entry.dtype, entry.shape) for entry in order]
    ShardWriter(tmp_path / "apart", planned, 200_000).write(shards.read)
    save(
        load(Shards(tmp_path / "apart"), config(), mesh_of(), "fp8"),
        config().model,
        tmp_path / "back",
        True,
        200_000,
    )
    assert hashes(tmp_path / "back") == hashes(checkpoint)


def test_missing_shards_are_made_again(checkpoint, tmp_path):
    """Some begin with the scales of a weight that another shard holds."""
    loaded, arguments = (
        load(Shards(checkpoint), config(), mesh_of(), "fp8"),
        (config().model, tmp_path / "back", True, 20_000),
    )
    save(loaded, *arguments)
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    first = {shard: min(read_header(shard), key=lambda entry: entry.offset).name for shard in shards}
    missing = [shard for i, shard in enumerate(shards) if i % 2 or first[shard].endswith("_scale_inv")]
    assert any(first[shard].endswith("_scale_inv") for shard in missing[1:])
    for shard in missing:
        shard.unlink()
    save(loaded, *arguments)
    assert hashes(tmp_path / "back") == hashes(checkpoint)


def test_bf16_of_fp8_is_the_product_rounded_once(checkpoint, tmp_path):
    shards = Shards(checkpoint)
    for weights in ("fp8", "bf16"):
        save(
            load(shards, config(), mesh_of(data=2, expert=4), weights),
            config().model,
            tmp_path / weights,
            fp8=False,
            max_shard_bytes=10**9,
        )
    assert hashes(tmp_path / "fp8") == hashes(tmp_path / "bf16")
    back, name = Shards(tmp_path / "bf16"), "model.layers.1.mlp.experts.3.down_proj.weight"
    check(back, config().model, fp8=False)
    scales = np.repeat(np.repeat(shards.read(name + "_scale_inv"), 128, 0), 128, 1)
    product = shards.read(name).astype(np.float32) * scales
    np.testing.assert_array_equal(back.read(name), product.astype(back.read(name).dtype))


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_weights_are_those_of_the_goldens(case, tmp_path):
    golden = hf_checkpoint.read(case)
    # gradients lie beside it
    (tmp_path / "model.safetensors").symlink_to(hf_checkpoint.FOLDER / case / "model.safetensors")
    shards = Shards(tmp_path)
    check(shards, golden.config.model, fp8=False)
    found = load(shards, golden.config, mesh_of(), "fp32")
    jax.tree.map(np.testing.assert_array_equal, found.params, golden.params)
    jax.tree.map(np.testing.assert_array_equal, found.router_bias, golden.router_bias)


def test_fp8_wants_a_checkpoint_in_fp8(tmp_path):
    golden = hf_checkpoint.read("base")
    (tmp_path / "model.safetensors").symlink_to(hf_checkpoint.FOLDER / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="is not in FP8; load it as 'bf16' or 'fp32'"):
        load(Shards(tmp_path), golden.config, mesh_of(), "fp8")


def test_an_mtp_layer_with_a_head_of_its_own_is_refused(checkpoint, tmp_path):
    loaded = load(Shards(checkpoint), config(), mesh_of(), "fp8")
    save(loaded, config().model, tmp_path / "own", fp8=True, max_shard_bytes=10**9)
    name = f"model.layers.{config().model.num_layers}.shared_head.head.weight"
    entry = Shards(tmp_path / "own").entries[name]
    with open(entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes([1, 2]))
    with pytest.raises(ValueError, match=rf"{name} in .* differs from lm_head.weight"):
        load(Shards(tmp_path / "own"), config(), mesh_of(), "fp8")
