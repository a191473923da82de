"""Where a tensor of a checkpoint lies in our weights, seen as matrices.

Every leaf is, on every device, [lead..., rows, columns]: layers, or layers and experts, then the dims that a weight
sums over, then its others. So `q_b_ANQ` [L, A, N, Q] is L matrices [A, (N Q)], `o_NHD` is [(N H), D], `gate_up_ED2F` is
L x E matrices [D, (2 F)] of which the tensor of the gate is the first F columns and that of the up projection the last;
a vector is one column.
"""

import math
from typing import NamedTuple

from deepseek_jax.huggingface.names import Tensor


class Held(NamedTuple):
    """What one shard of a leaf holds of a tensor's matrix (in the leaf's orientation), and where.

    Attributes:
        rows, columns: of the tensor's matrix.
        start: in the shard as matrices, one index per lead dim, then the row and the column.
    """

    rows: range
    columns: range
    start: tuple[int, ...]


def ranges_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    """Return what a shard at `index` of an array (as JAX gives it) holds of each dim."""
    return tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def held(tensor: Tensor, ranges: tuple[range, ...], shape: tuple[int, ...]) -> Held | None:
    """Return what a shard holds of a tensor, or None if nothing.

    Args:
        tensor: of the table, or the scales of one.
        ranges: of the shard.
        shape: of the leaf.
    """
    lead = len(tensor.index)
    if any(i not in r for i, r in zip(tensor.index, ranges, strict=False)):
        return None
    split = lead + tensor.row_dims
    rows, columns = _flat(ranges[lead:split], shape[lead:split]), _flat(ranges[split:], shape[split:])
    num_columns = tensor.matrix_shape[1]
    offset = (tensor.half or 0) * num_columns  # of the tensor in the leaf's matrix
    first, last = max(columns.start - offset, 0), min(columns.stop - offset, num_columns)
    start = tuple(i - r.start for i, r in zip(tensor.index, ranges, strict=False))
    return Held(rows, range(first, last), (*start, 0, first + offset - columns.start))


def _flat(ranges: tuple[range, ...], shape: tuple[int, ...]) -> range:
    """The range of flattened dims of `shape` that `ranges` are, all whole but the first."""
    if not ranges:
        return range(1)
    size = math.prod(shape[1:])
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:], strict=True)):
        raise AssertionError(f"{ranges} of {shape}: only the first dim of rows or columns may be split")
    return range(ranges[0].start * size, ranges[0].stop * size)
