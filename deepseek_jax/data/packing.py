"""Best-fit packing of documents into rows, and batches made of rows.

A row holds S + 1 tokens: its inputs are the first S, its targets the last S. Joining all documents and cutting every
S + 1 tokens would truncate almost every document. Best-fit packing (Ding et al. 2024, arXiv 2404.10830) cuts only
documents longer than a row: whole rows come off their front. Then each piece, the longest first, goes into the fullest
row that still has room for it. Every token is in exactly one row.

Example with S + 1 = 6 and documents A (9 tokens, BOS and EOS included), B (4) and C (2):

    pieces   A0..A5 (a whole row)   A6 A7 A8   B0 B1 B2 B3   C0 C1
    placed   B opens row 1 (room 2);  A6..A8 does not fit there and opens row 2 (room 3);
             C fits rows 1 and 2: 1 is fuller

    row 1            B0 B1 B2 B3 C0 C1          row 2            A6 A7 A8  .  .  .
    inputs           B0 B1 B2 B3 C0             inputs           A6 A7 A8  .  .
    targets          B1 B2 B3 C0 C1             targets          A7 A8  .  .  .
    segments          1  1  1  1  2             segments          1  1  1  0  0
    weights, masked   1  1  1  0  1             weights           1  1  0  0  0
    positions, reset  0  1  2  3  0             positions, reset  0  1  2  0  1

These are the weights of examples that came without. Given weights (`examples`) move with their tokens and stand where
the table has a 1.

B3 is B's EOS. With `mask_documents` its position has no target in B, so its weight is 0. Without the mask the row is
one stream of text, as in the report's pre-training: every token is a target, all segments are 1, and C0 (a BOS) is
predicted from B3.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import Data
from deepseek_jax.data.examples import Example

Batch = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Packed rows; every array is [rows, S + 1]."""

    tokens: np.ndarray  # int32 ids; `pad` where nothing is
    segments: np.ndarray  # int32: 1, 2, ... for a row's pieces, 0 for padding
    weights: np.ndarray  # uint8 or float32: of each token as a target; 0 for padding


def pack(examples: Sequence[Example], row_length: int, pad: int) -> Rows:
    """Pack examples into rows of `row_length` tokens."""
    pieces = [piece for example in examples for piece in _cut(example, row_length)]
    rows = best_fit([len(piece.ids) for piece in pieces], row_length)
    dtypes = {piece.weights.dtype for piece in pieces if piece.weights is not None}
    tokens = np.full((len(rows), row_length), pad, np.int32)
    segments = np.zeros((len(rows), row_length), np.int32)
    weights = np.zeros((len(rows), row_length), np.result_type(np.uint8, *dtypes))
    for r, row in enumerate(rows):
        start = 0
        for segment, p in enumerate(row, 1):
            piece = pieces[p]
            end = start + len(piece.ids)
            tokens[r, start:end] = piece.ids
            segments[r, start:end] = segment
            weights[r, start:end] = 1 if piece.weights is None else piece.weights
            start = end
    return Rows(tokens, segments, weights)


def _cut(example: Example, length: int) -> list[Example]:
    """Return the pieces of an example; all but the last have `length` tokens."""
    ids, weights = example
    parts = [slice(start, start + length) for start in range(0, len(ids), length)]
    return [Example(ids[part], None if weights is None else weights[part]) for part in parts]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, the longest first, into the fullest row that has room for it; return the items of each row."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free length, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fullest = bisect.bisect_left(open_rows, (lengths[item], 0))
        if fullest < len(open_rows):
            free, row = open_rows.pop(fullest)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if free > lengths[item]:
            bisect.insort(open_rows, (free - lengths[item], row))
    return rows


def next_token_batch(rows: Rows, data: Data) -> Batch:
    """Return the batch of packed rows: B of them, one token longer than S."""
    tokens, segments, weights = rows
    weights_BS = weights[:, 1:]
    if data.mask_documents:
        weights_BS = weights_BS * (segments[:, 1:] == segments[:, :-1])
    return assemble(tokens[:, :-1], tokens[:, 1:], segments[:, :-1], weights_BS, data)


def assemble(
    tokens_BS: np.ndarray, targets_BS: np.ndarray, segments_BS: np.ndarray, weights_BS: np.ndarray, data: Data
) -> Batch:
    """Return the batch: int32 arrays and float32 loss weights; `segments_BS` counts documents, masked or not."""
    batch_size, sequence_length = tokens_BS.shape
    positions_BS = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), (batch_size, sequence_length))
    if data.reset_positions:
        positions_BS = positions_BS - _piece_starts(segments_BS)
    return {
        "tokens_BS": np.ascontiguousarray(tokens_BS, np.int32),
        "targets_BS": np.ascontiguousarray(targets_BS, np.int32),
        "positions_BS": np.ascontiguousarray(positions_BS, np.int32),
        "segment_ids_BS": np.ascontiguousarray(segments_BS if data.mask_documents else segments_BS > 0, np.int32),
        "loss_weights_BS": np.ascontiguousarray(weights_BS, np.float32),
    }


def _piece_starts(segments_BS: np.ndarray) -> np.ndarray:
    """Return for every position the position at which its piece starts."""
    starts_BS = np.zeros_like(segments_BS)
    changes_BS = segments_BS[:, 1:] != segments_BS[:, :-1]
    starts_BS[:, 1:] = np.where(changes_BS, np.arange(1, segments_BS.shape[1]), 0)
    return np.maximum.accumulate(starts_BS, axis=1)
