"""A small model with everything that a checkpoint can hold, and what its folders hold."""

import functools
import hashlib

from deepseek_jax.config import from_config_dict
from deepseek_jax.safetensors.folder import Shards
from tests.support import small


@functools.cache
def config():
    """FP8's dims, MTP, and a kv_a of 136 columns: a block at the edge is partly filled."""
    config = from_config_dict(small.fp8_config_dict())
    return config.with_(model={"num_mtp_layers": 1})


def hashes(folder):
    shards = Shards(folder)
    return {name: hashlib.sha256(shards.read(name).tobytes()).hexdigest() for name in shards.entries}
