"""Which stored bytes differ between two sets of weights of one model: what merged adapters change of a checkpoint.

`Changes.values` counts codes. Of a tensor in FP8 a code can stay while its scale, and so its number, changes; and a
code can change with the scale while the number hardly does. Scales are in `Changes.changed`, which counts bytes.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Model
from deepseek_jax.huggingface.contents import num_bytes
from deepseek_jax.huggingface.names import tensors
from deepseek_jax.huggingface.stored_tensors import StoredTensors
from deepseek_jax.parameters import Weights


class Changes(NamedTuple):
    """Counts over the tensors of a checkpoint, scales with their weight.

    Attributes:
        tensors: that were written anew; the others are the same arrays.
        bytes: that these take.
        changed: of `bytes`, those that differ.
        values: of the elements of these tensors, those whose stored codes differ; scales are not counted.
        elements: that these tensors have.
    """

    tensors: int
    bytes: int
    changed: int
    values: int
    elements: int


def changes(before: Weights, after: Weights, model: Model, fp8: bool) -> Changes:
    """Count what differs in the tensors whose leaves are other arrays in `after`.

    Args:
        before, after: weights of `model`; leaves that did not change are the same objects.
        model: of both.
        fp8: the form of the files, as of `huggingface.save.save`.
    """
    stored = [StoredTensors(weights, model, fp8) for weights in (before, after)]
    total = np.zeros(5, np.int64)
    for tensor in tensors(model):
        leaves = [_leaf(weights, tensor.leaf) for weights in (before, after)]
        if tensor.copied or leaves[0] is leaves[1]:
            continue
        (old, old_scales), (new, new_scales) = (each.stored(tensor.name, *each.fetch(tensor.name)) for each in stored)
        differ = _bytes(old) != _bytes(new)
        total += (1, differ.size, differ.sum(), differ.reshape(new.size, -1).any(1).sum(), new.size)
        if old_scales is not None and new_scales is not None:
            differ = _bytes(old_scales) != _bytes(new_scales)
            total += (0, differ.size, differ.sum(), 0, 0)
    return Changes(*total.tolist())


def changed_line(before: Weights, after: Weights, model: Model, fp8: bool) -> str:
    """Say what merged adapters change of the stored bytes; arguments as of `changes`."""
    found, total = changes(before, after, model, fp8), num_bytes(model, fp8)
    return (
        f"merged adapters: {found.tensors:,} tensors with {found.bytes:,} of {total:,} bytes are new; {found.changed:,}"
        f" bytes differ from the base's, and {found.values:,} of {found.elements:,} {'codes' if fp8 else 'values'}"
    )


def _leaf(weights: Weights, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, weights._asdict())


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
