"""Small folders of safetensors, for the tests of what reads and writes them."""

import hashlib
import math
from pathlib import Path

import numpy as np

from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.writer import Planned, ShardWriter, file_name

SIZE = 130  # bytes; tensors a and b, c, and d to f fill a shard each
FILES = [file_name(i, 3) for i in (1, 2, 3)]
SHAPES = {
    "a": ("F32", (3, 5)),
    "b": ("BF16", (7,)),
    "c": ("F8_E4M3", (64, 2)),
    "d": ("I32", ()),
    "e": ("F32", (0, 4)),
    "f": ("F32", (31,)),
}


def planned(shapes=SHAPES):
    return [Planned(name, dtype, shape) for name, (dtype, shape) in shapes.items()]


def values(name, shapes=SHAPES):
    """Bytes that depend on the name; every bit pattern is a value."""
    dtype, shape = shapes[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, num_bytes, np.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def write(folder, shapes=SHAPES, max_shard_bytes=SIZE, **settings):
    ShardWriter(folder, planned(shapes), max_shard_bytes, **settings).write(lambda name: values(name, shapes))
    return folder


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def same(array, expected):
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()
