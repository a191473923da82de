"""A Hugging Face checkpoint of any size with random weights.

`python -m experiments.benchmarks.synthetic_checkpoint --hf=DIR --gigabytes=8`

It has V3's names, dtypes and proportions in FP8, with fewer experts and layers. In every block of 128 x 128 the largest
number is 448, as quantisation leaves it. It is for trying conversion; its text would be random.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from configs import deepseek_v3
from deepseek_jax.config import Model, from_config_dict
from deepseek_jax.huggingface.config_writer import TokenIds, write_model
from deepseek_jax.huggingface.contents import expected, num_bytes
from deepseek_jax.huggingface.save import SHARD_BYTES, plan
from deepseek_jax.inputs import new_folder
from deepseek_jax.progress import Bar
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.writer import ShardWriter
from experiments import command

HF = flags.DEFINE_string("hf", None, "Folder to write.", required=True)
GIGABYTES = flags.DEFINE_float("gigabytes", 8.0, "Approximate size, in 10^9 bytes.", lower_bound=0.1, upper_bound=1e4)
SHARD_GIGABYTES = flags.DEFINE_float(
    "shard_gigabytes", SHARD_BYTES / 1e9, "Size of one file.", lower_bound=0.01, upper_bound=1e4
)

POOL_BYTES = 2**26  # tensors are cut from this many random bytes: drawing 8 GB takes longer than writing them
MAX_E4M3 = 0x7E  # the byte of 448; 0x7F is NaN


def main(_) -> None:
    """Write the checkpoint."""
    folder = target()
    model = sized(from_config_dict(deepseek_v3.get_config()).model, GIGABYTES.value * 1e9)
    check_space(folder, num_bytes(model, fp8=True))
    size = num_bytes(model, fp8=True)
    with Bar(size, "write") as bar:
        write(model, folder, fp8=True, max_shard_bytes=int(SHARD_GIGABYTES.value * 1e9), on_bytes=bar.update)
    print(f"{folder}: {model.num_layers} layers, {model.num_experts} experts, {size / 1e9:.2f} GB")


def target() -> Path:
    """Return the folder of --hf, which can be written."""
    return new_folder(HF.value, "--hf")


def check_space(folder: Path, size: int) -> None:
    """Refuse a folder without `size` free bytes."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise ValueError(
            f"--gigabytes={GIGABYTES.value:g} takes {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free;"
            " lower it, or name another --hf"
        )


def sized(model: Model, goal: float) -> Model:
    """Return V3 with fewer experts and layers, as near to `goal` bytes as possible."""
    shapes = [
        dataclasses.replace(
            model, vocab_size=16384, num_layers=layers, num_dense_layers=1, num_experts=experts, num_mtp_layers=1
        )
        for layers in range(2, 62)
        for experts in range(8, 257, 8)
    ]
    return min(shapes, key=lambda shape: abs(num_bytes_estimate(shape) - goal))


def num_bytes_estimate(model: Model) -> float:
    """Return the bytes of V3's shape by arithmetic: listing the tensors of every candidate takes minutes."""
    attention, expert, dense = 187.1e6, 44.04e6, 396.4e6
    moe = attention + (model.num_experts + 1) * expert
    top = 2 * 2 * model.vocab_size * model.width
    return (
        attention + dense + model.num_moe_layers * moe + top + model.num_mtp_layers * (moe + top + 4 * model.width**2)
    )


def write(
    model: Model,
    folder: Path,
    fp8: bool,
    max_shard_bytes: int,
    seed: int = 0,
    on_bytes: Callable[[int], None] = lambda n: None,
):
    """Write a checkpoint of `model` with random weights, config.json included.

    Args:
        model: the shape of the weights.
        folder: is made if it is missing.
        fp8: FP8 with scales, as released; BF16 otherwise.
        max_shard_bytes: the largest file.
        seed: seed of the weights.
        on_bytes: is called with each number of bytes written.
    """
    wanted = expected(model, fp8)
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)
    fp8_pool = np.where((pool & 0x7F) > MAX_E4M3, pool & 0x80, pool)

    def get(name: str) -> np.ndarray:
        dtype, shape = wanted[name]
        count = int(np.prod(shape))
        if dtype == "F8_E4M3":
            values = np.resize(_cut(fp8_pool, min(count, POOL_BYTES), rng), shape)  # a copy
            values[::128, ::128] = MAX_E4M3  # the first number of each block
            return values.view(DTYPES[dtype])
        if name.endswith("_scale_inv"):
            return rng.uniform(0.5, 2.0, shape).astype(np.float32) * (0.05 / 448)
        if name.endswith("norm.weight"):
            return rng.uniform(0.5, 1.5, shape).astype(DTYPES[dtype])
        small = _cut(pool.view(np.int8), min(count, POOL_BYTES), rng).astype(np.float32) * (0.02 / 64)
        return np.resize(small.astype(DTYPES[dtype]), shape)

    folder.mkdir(parents=True, exist_ok=True)
    ShardWriter(folder, plan(model, fp8), max_shard_bytes).write(_with_copies(get), on_bytes)
    hf = write_model(model, fp8, TokenIds(bos=0, eos=1, pad=2), model.yarn.original_length)  # V3's tokenizer
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _cut(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    start = int(rng.integers(POOL_BYTES - count + 1))
    return pool[start : start + count]


def _with_copies(get: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `get` with the embedding and the head of MTP layers equal to those of the model."""
    shared = {}

    def copied(name: str) -> np.ndarray:
        for suffix, original in (
            (".embed_tokens.weight", "model.embed_tokens.weight"),
            (".shared_head.head.weight", "lm_head.weight"),
        ):
            if name == original:
                shared[name] = get(name)
                return shared[name]
            if name.endswith(suffix) and name.startswith("model.layers."):
                return shared[original]
        return get(name)

    return copied


if __name__ == "__main__":
    command.run(main)
