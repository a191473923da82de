"""From our weights on a mesh to a Hugging Face folder, by one process or by all that share the weights."""

import functools
import os
from pathlib import Path

import jax

from deepseek_jax.config import Model
from deepseek_jax.huggingface import save_multiprocess
from deepseek_jax.huggingface.contents import expected
from deepseek_jax.huggingface.load import OnBytes
from deepseek_jax.huggingface.stored_tensors import StoredTensors
from deepseek_jax.parameters import Weights
from deepseek_jax.safetensors.writer import Planned, ShardWriter

SHARDS_AT_ONCE = min(8, os.cpu_count() or 1)  # SHA-256 takes a core each
SHARD_BYTES = 4_300_000_000  # of the released checkpoint: 688.6 GB in 163 files


def plan(model: Model, fp8: bool) -> list[Planned]:
    """Return every tensor of a checkpoint of `model` in order; scales follow their weight."""
    return [Planned(name, dtype, shape) for name, (dtype, shape) in expected(model, fp8).items()]


def save(
    weights: Weights,
    model: Model,
    folder: Path,
    fp8: bool,
    max_shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda n: None,
    source: str = "",
) -> None:
    """Write the tensors of `weights` into `folder`; shards that an interrupted call has finished are kept.

    Args:
        weights: `params` and `router_bias` as `load.load` or a training state has them. If several processes share
            them, all must call this.
        model: of the weights.
        folder: new, or one that an interrupted call was writing.
        fp8: whether quantised weights are stored in FP8 with scales, or in BF16.
        max_shard_bytes: of the tensors in one file.
        on_bytes: called with the number of bytes that have been written.
        source: where the weights come from; an interrupted call is continued only with the same source.

    Raises:
        ValueError: the folder holds something else, or several processes do not share it.
        OSError: the disk has too little space.
    """
    tensors = StoredTensors(weights, model, fp8)
    new_writer = functools.partial(ShardWriter, folder, plan(model, fp8), max_shard_bytes, source=source)
    if jax.process_count() > 1:
        save_multiprocess.write(Path(folder), new_writer, tensors, on_bytes)
    else:
        new_writer().write(tensors.get, on_bytes, SHARDS_AT_ONCE)
