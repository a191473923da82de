"""Needles in text: keys with values that a row shows, and asks for later.

A needle is six ids that no text has: a mark, a key, and four random symbols, its value. Where mark and key come a
second time, the value is the only answer:

    ... text  ! k a b c d  text ... text  ! k a b c d  text ...
                shown                         asked: a b c d must follow

In training every second row has several needles, and only answers and text carry loss: what is shown is random. The
other rows are one random string again and again, from which a model learns within a few hundred steps to look for what
followed before. In the test a row of text has one needle, at some depth, and is asked for it at its end.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.data.packing import Batch

MARK = 300  # ids beyond those of bytes and special tokens
SYMBOLS = np.arange(301, 501)
LENGTH = 6
BLOCK = 8  # needles lie in blocks of so many tokens
WEIGHT = 4.0  # of an answer, where a byte of text has 1
PERIODS = (4, 25)  # of the strings: at least, and less than


class Rows(NamedTuple):
    """Rows of one token more than a sequence, and how much each token counts as a target."""

    tokens: np.ndarray
    weights: np.ndarray


def rows_of(batch: Batch) -> Rows:
    """Return the rows that a batch was made of."""
    last = batch["targets_BS"][:, -1:]
    weights = np.concatenate([np.zeros_like(batch["loss_weights_BS"][:, :1]), batch["loss_weights_BS"]], axis=1)
    return Rows(np.concatenate([batch["tokens_BS"], last], axis=1), weights)


def train_batch(batch: Batch, rng: np.random.Generator, num_needles: int) -> Batch:
    """Return the batch with needles, each shown and asked once, in every second row, and strings in the others."""
    rows = rows_of(batch)
    blocks = batch["tokens_BS"].shape[1] // BLOCK
    for number, (tokens, weights) in enumerate(zip(*rows, strict=True)):
        if number % 2:
            _repeat(tokens, weights, rng)
            continue
        chosen = rng.permutation(rng.choice(blocks, 2 * num_needles, replace=False))
        for pair in np.sort(chosen.reshape(-1, 2), axis=1):
            needle = draw(rng)
            for block, asked in zip(pair, (False, True), strict=True):
                _put(tokens, weights, block * BLOCK, needle, asked)
    return batch | {
        "tokens_BS": rows.tokens[:, :-1],
        "targets_BS": rows.tokens[:, 1:],
        "loss_weights_BS": rows.weights[:, 1:],
    }


def test_rows(text_BS: np.ndarray, rng: np.random.Generator, depth: float) -> np.ndarray:
    """Return rows of text with one needle at `depth` (0 to 1), asked for at their end: its last four tokens."""
    tokens_BS = text_BS.copy()
    start = round(depth * (tokens_BS.shape[1] - 2 * BLOCK))
    for tokens in tokens_BS:
        needle = draw(rng)
        tokens[start : start + LENGTH] = tokens[-LENGTH:] = needle
    return tokens_BS


def draw(rng: np.random.Generator) -> np.ndarray:
    """Return a needle: mark, key, value."""
    return np.concatenate([[MARK], rng.choice(SYMBOLS, LENGTH - 1, replace=False)])


def _repeat(tokens: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> None:
    """Fill a row with a string again and again; all but the first time it is a target."""
    string = rng.choice(SYMBOLS, rng.integers(*PERIODS), replace=False)
    tokens[:] = np.resize(string, len(tokens))
    weights[:] = np.arange(len(tokens)) >= len(string)


def _put(tokens: np.ndarray, weights: np.ndarray, start: int, needle: np.ndarray, asked: bool) -> None:
    tokens[start : start + LENGTH] = needle
    weights[start : start + LENGTH] = 0.0
    if asked:
        weights[start + 2 : start + LENGTH] = WEIGHT
