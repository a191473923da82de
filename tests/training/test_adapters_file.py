"""The base of adapters: a copy of it is taken wherever it lies, and another one is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from deepseek_jax.adapters import Lora
from deepseek_jax.config import from_config_dict
from deepseek_jax.locks import LOCK
from deepseek_jax.training.adapters_file import (
    ADAPTERS,
    SAMPLE_BYTES,
    base_fingerprint,
    base_for_peft,
    check_base,
    claim_adapters,
    read_adapters,
)
from deepseek_jax.training.origin import Origin, find_origin
from deepseek_jax.training.record import seal
from deepseek_jax.training.workdir import occupied
from tests.training.nano import get_config

LORA = Lora(rank=2, alpha=4.0, targets=("attention",))
SIZE = 4 * SAMPLE_BYTES


def write_folder(folder, change=None, dtype=np.uint8, shards=1):
    """A folder of three tensors, larger and smaller than a sample; `change` is the place of one byte of the first."""
    random = np.random.default_rng(0)
    tensors = {f"t{i}": random.integers(0, 255, size, np.uint8) for i, size in enumerate((SIZE, 100, SIZE))}
    if change is not None:
        tensors["t0"][change] ^= 1
    tensors = {name: array.view(dtype) for name, array in tensors.items()}
    folder.mkdir()
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in sorted(tensors)[i::shards]}, folder / file)
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base_fingerprint(Origin(folder))


def write_run(workdir, number):
    """What a fingerprint reads of a run's checkpoints."""
    for step in (1, 2):
        folder = workdir / "checkpoints" / str(step) / "run"
        folder.mkdir(parents=True)
        arrays = {"['params']['w']": number * step, "['optimizer']['m']": 5}
        (folder / "metadata").write_text(json.dumps(seal({"fingerprints": arrays})))


def test_a_folder_is_the_same_base_in_other_files_and_another_one_if_a_sample_differs(tmp_path):
    base = write_folder(tmp_path / "base")
    assert write_folder(tmp_path / "split", shards=3) == base
    assert write_folder(tmp_path / "changed", change=SIZE // 2) != base
    assert write_folder(tmp_path / "typed", dtype=np.int8) != base


@pytest.fixture
def runs(tmp_path):
    """(folder, configuration of a workdir whose base is the checkpoint of step 1 of a run there)."""
    write_run(tmp_path / "base", 7)
    config = from_config_dict(get_config("corpus")).with_(training={"initial_weights": f"{tmp_path / 'base'}@1"})
    workdir = tmp_path / "lora"
    workdir.mkdir()
    claim_adapters(workdir, LORA, check_base(config, workdir))
    return tmp_path, config


def test_another_base_is_refused_and_one_that_moved_is_taken(runs):
    folder, config = runs
    workdir = folder / "lora"
    assert read_adapters(workdir) == LORA
    write_run(folder / "other", 8)
    for name in ("other@1", "base@2"):
        with pytest.raises(ValueError, match="is another base than the one .* were trained on; name where theirs is"):
            check_base(config.with_(training={"initial_weights": str(folder / name)}), workdir)
    with pytest.raises(ValueError, match="adapters are of one base; name a step: .*base@2"):
        check_base(config.with_(training={"initial_weights": str(folder / "base")}), workdir)
    shutil.move(folder / "base", folder / "moved")
    with pytest.raises(ValueError, match=r"has moved, name where theirs is now: initial_weights in .*config\.json"):
        check_base(config, workdir)
    check_base(config.with_(training={"initial_weights": f"{folder / 'moved'}@1"}), workdir)


def test_a_run_without_adapters_is_not_taken_for_one_where_a_start_with_them_was_killed(runs):
    workdir = runs[0] / "lora"
    (workdir / LOCK).write_text("process 1 on host x since then")  # the system has released its lock
    with occupied(workdir):
        assert not (workdir / ADAPTERS).exists()
    claim_adapters(workdir, LORA, "")
    claim_adapters(workdir, None, "")
    assert read_adapters(workdir) is None


def test_peft_gets_a_base_that_it_can_open(runs):
    folder, config = runs
    assert base_for_peft(config, "deepseek-ai/DeepSeek-V3") == "deepseek-ai/DeepSeek-V3"
    with pytest.raises(ValueError, match=r"which PEFT cannot open; export it .*base --step=1 .*give --base"):
        base_for_peft(config, None)
    write_folder(folder / "released")
    released = config.with_(training={"initial_weights": str(folder / "released")})
    assert not find_origin(released).run and base_for_peft(released, None) == str(folder / "released")
