"""Which slice of a checkpoint's tensor a device holds, and where in its shard of our weights.

Every leaf, and every shard of it, is seen as [lead..., rows, columns]. The lead dims are layers, or layers and experts;
the rows are the dims that a product sums over, the columns the others. So `q_b_ANQ` [L, A, N, Q] is L matrices
[A, (N Q)] and `o_NHD` L matrices [(N H), D]. `gate_up_ED2F` is L x E matrices [D, (2 F)]: the gate's tensor is their
first F columns, the up projection's the last F. A vector is one column.
"""

import math
from typing import NamedTuple

from deepseek_jax.huggingface.names import Tensor


class Overlap(NamedTuple):
    """The part of a tensor's matrix (in the leaf's orientation) that one shard of the leaf holds.

    Attributes:
        rows, columns: of the tensor's matrix.
        start: where they begin in the shard as matrices: one index per lead dim, then the row and the column.
    """

    rows: range
    columns: range
    start: tuple[int, ...]


def index_ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    """Return the range of each dim of an array that a shard holds; `index` is the shard's, as JAX gives it."""
    return tuple(range(*dim.indices(size)) for dim, size in zip(index, shape, strict=True))


def find_overlap(tensor: Tensor, ranges: tuple[range, ...], shape: tuple[int, ...]) -> Overlap | None:
    """Return the part of a tensor that a shard holds, None if it holds nothing of it.

    Args:
        tensor: of the table, or the scales of one.
        ranges: what the shard holds of each dim of the leaf.
        shape: of the leaf.
    """
    lead = len(tensor.index)
    if any(i not in r for i, r in zip(tensor.index, ranges, strict=False)):
        return None
    split = lead + tensor.row_dims
    rows, columns = _flat(ranges[lead:split], shape[lead:split]), _flat(ranges[split:], shape[split:])
    num_columns = tensor.matrix_shape[1]
    offset = (tensor.half or 0) * num_columns  # where the tensor's columns begin in the leaf's matrix
    first, last = max(columns.start - offset, 0), min(columns.stop - offset, num_columns)
    start = tuple(i - r.start for i, r in zip(tensor.index, ranges, strict=False))
    return Overlap(rows, range(first, last), (*start, 0, first + offset - columns.start))


def _flat(ranges: tuple[range, ...], shape: tuple[int, ...]) -> range:
    """Return `ranges` of dims as one range of the flattened dims; only the first dim may be split."""
    if not ranges:
        return range(1)
    size = math.prod(shape[1:])
    if any(len(r) != n for r, n in zip(ranges[1:], shape[1:], strict=True)):
        raise AssertionError(f"{ranges} of {shape}: only the first dim of rows or columns may be split")
    return range(ranges[0].start * size, ranges[0].stop * size)
