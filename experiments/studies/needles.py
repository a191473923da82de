"""Needles in text: keys with values that a row shows, and asks for later.

A needle is three ids that no text has: a mark, a key and its value, one of 32 that a row draws for each key anew. Where
mark and key come a second time, the value is the only answer. A test row has eight needles with different keys, so
that an answer must find its key; any value of the row is right once in eight, any of all values once in 32:

    ... text  ! k a  text  ! m b  text ... ! m  text ...
              shown        shown           asked: b must follow

In training every second row has needles between its text, and the others are text alone: where a row is short, needles
leave no running text (of 64 tokens one in four). Only answers and text carry loss: what is shown is random. In the test
the needle that is asked for lies at some depth of the row, the other seven anywhere, and the question at its end.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.data.packing import Batch

MARK = 300  # ids beyond those of bytes and special tokens
KEYS = np.arange(304, 336)
VALUES = np.arange(336, 368)
LENGTH = 3
BLOCK = 4  # needles lie in blocks of so many tokens
PER_ROW = 8
WEIGHT = 4.0  # of an answer, where a byte of text has 1


class Rows(NamedTuple):
    """Rows of one token more than a sequence, and how much each token counts as a target."""

    tokens: np.ndarray
    weights: np.ndarray


def rows_of(batch: Batch) -> Rows:
    """Return the rows that a batch was made of."""
    last = batch["targets_BS"][:, -1:]
    weights = np.concatenate([np.zeros_like(batch["loss_weights_BS"][:, :1]), batch["loss_weights_BS"]], axis=1)
    return Rows(np.concatenate([batch["tokens_BS"], last], axis=1), weights)


def train_batch(batch: Batch, rng: np.random.Generator) -> Batch:
    """Return the batch with two to eight needles in every second row, which together appear 16 times.

    The first row, the third and so on stay as they are. Where a needle appears for the first time it is shown, later it
    is asked for. Rows with few needles ask for each of them often.

    Raises:
        ValueError: there are no two rows, or a row has no place for so many needles.
    """
    rows = rows_of(batch)
    number_of_rows, length = batch["tokens_BS"].shape
    blocks = length // BLOCK
    if number_of_rows < 2 or blocks < 2 * PER_ROW:
        raise ValueError(
            f"{number_of_rows} rows of {length} tokens: needles take every second row, and {2 * PER_ROW * BLOCK} tokens"
            " of it; take more rows, or longer ones"
        )
    for tokens, weights in zip(rows.tokens[1::2], rows.weights[1::2], strict=True):
        number = rng.integers(2, PER_ROW + 1)
        needles = draw(rng)[:number]
        again = rng.integers(number, size=2 * PER_ROW - number)
        order = rng.permutation(np.concatenate([np.arange(number), again]))
        starts = np.sort(rng.choice(blocks, len(order), replace=False)) * BLOCK
        for place, (which, start) in enumerate(zip(order, starts, strict=True)):
            tokens[start : start + LENGTH] = needles[which]
            weights[start : start + LENGTH] = 0.0
            if which in order[:place]:
                weights[start + LENGTH - 1] = WEIGHT
    return batch | {
        "tokens_BS": rows.tokens[:, :-1],
        "targets_BS": rows.tokens[:, 1:],
        "loss_weights_BS": rows.weights[:, 1:],
    }


def test_rows(text_BS: np.ndarray, rng: np.random.Generator, depth: float) -> np.ndarray:
    """Return rows of text with eight needles; that at `depth` (0 to 1) is asked for at their end: the last token."""
    tokens_BS = text_BS.copy()
    blocks = tokens_BS.shape[1] // BLOCK - 1
    place = round(depth * (blocks - 1))
    for tokens in tokens_BS:
        needles = draw(rng)
        others = rng.choice(np.delete(np.arange(blocks), place), PER_ROW - 1, replace=False)
        for block, needle in zip((place, *others), needles, strict=True):
            tokens[block * BLOCK : block * BLOCK + LENGTH] = needle
        tokens[-LENGTH:] = needles[0]
    return tokens_BS


def draw(rng: np.random.Generator) -> np.ndarray:
    """Return the needles of a row: marks, different keys, values that may be the same."""
    keys = rng.choice(KEYS, PER_ROW, replace=False)
    return np.stack([np.full(PER_ROW, MARK), keys, rng.choice(VALUES, PER_ROW)], axis=1)
