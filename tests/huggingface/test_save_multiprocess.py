"""What several processes do to write one folder, as far as one process can show it; with two:
tests/training/test_processes.py.
"""

import jax
import numpy as np
import pytest

from deepseek_jax.huggingface import save, save_multiprocess, stored_tensors
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.names import tensors
from deepseek_jax.huggingface.stored_tensors import StoredTensors
from deepseek_jax.safetensors.folder import INDEX, Shards
from deepseek_jax.safetensors.writer import ShardWriter
from experiments.benchmarks import synthetic_checkpoint
from tests.support.checkpoints import config, hashes
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("huggingface")

KINDS = (
    "self_attn.q_b_proj",
    "self_attn.o_proj",
    "self_attn.kv_a_proj_with_mqa",
    "mlp.down_proj",
    "mlp.experts.3.up_proj",
    "norm",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    synthetic_checkpoint.write(config().model, folder, fp8=True, max_shard_bytes=300_000)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return StoredTensors(load(Shards(folder), config(), mesh_of(2, 2, 2), "fp8"), config().model, fp8=True)


def test_a_matrix_is_gathered_from_all_devices_bit_for_bit(source):
    """Split by rows, columns or experts, half of a leaf, replicated; -0 and NaN, too, and scales."""
    seen = set()
    for name, tensor in source.table.items():
        kind = next((kind for kind in KINDS if kind in name), None)
        if kind is None or (kind, tensor.leaf) in seen:
            continue
        seen.add((kind, tensor.leaf))
        leaf = source.weights._asdict()
        for key in tensor.leaf:
            leaf = leaf[key]
        pairs = [(leaf.values, tensor), (leaf.scales, tensor.scales)] if tensor.quantized else [(leaf, tensor)]
        for array, part in pairs:
            expected = np.asarray(stored_tensors._fetch_matrix(array, part))
            found = np.asarray(stored_tensors._gather_matrix(array, part))
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_array_equal(
                found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8), err_msg=name
            )
            assert expected.view(np.uint8).any()
    assert len(seen) > len(KINDS)


def test_bits_that_are_no_numbers_survive():
    mesh = mesh_of(node=2, expert=4)
    tensor = next(t for t in tensors(config().model) if t.leaf[-1] == "down_FD")
    shape = (config().model.num_dense_layers, *tensor.matrix_shape)
    bits = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    bits[..., :2] = 0x80000000, 0x7FC00001
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, None, ("data", "node", "expert")))
    found = stored_tensors._gather_matrix(jax.device_put(bits.view(np.float32), sharding), tensor)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), bits[tensor.index])


def new_writer(source, folder):
    return lambda: ShardWriter(folder, save.plan(source.model, True), 300_000)


def test_the_files_are_those_of_one_process(source, folder, tmp_path):
    """A round of one process: jobs in order, scales with their weight or alone at the start of a file."""
    seen = []
    save_multiprocess.write(tmp_path / "new", new_writer(source, tmp_path / "new"), source, seen.append)
    assert hashes(tmp_path / "new") == hashes(folder)
    writer = new_writer(source, tmp_path / "new")()
    assert not writer.missing()
    assert sum(seen) == sum(map(writer.num_bytes, writer.shards))


@pytest.mark.parametrize("fails", ["stored", "disk"])
def test_a_failure_is_raised_and_leaves_no_index(source, tmp_path, monkeypatch, fails):
    """What is finished stays, what is not is gone, and the same call goes on."""
    stop = [name for name in source.table if "experts.1.up_proj" in name][0]
    stored = StoredTensors.stored

    def failing(self, name, *fetched):
        if name == stop:
            if fails == "stored":
                raise MemoryError(name)
            return np.zeros(3, np.uint8), None  # the writer refuses it
        return stored(self, name, *fetched)

    monkeypatch.setattr(StoredTensors, "stored", failing)
    with pytest.raises((MemoryError, ValueError), match="experts.1.up_proj"):
        save_multiprocess.write(tmp_path, new_writer(source, tmp_path), source, lambda n: None)
    assert not (tmp_path / INDEX).exists()
    assert not list(tmp_path.glob("*.partial*"))
    finished = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert finished
    monkeypatch.undo()
    save_multiprocess.write(tmp_path, new_writer(source, tmp_path), source, lambda n: None)
    assert finished.items() <= {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}.items()
    Shards(tmp_path)
