"""Needles in text: values of different kinds that a row shows, and asks for by their kind later.

A needle is one id that no text has. It says what kind it is, one of eight, and which of 16 values the row drew for that
kind. A question is another id for each kind. The needle of its kind is the only answer. A test row has a needle of each
kind, so that an answer must find its kind: any needle of the row is right once in eight, any value of the kind once in
16:

    ... text  b7  text  d2  text ... b?  b7  text ...
              shown     shown         asked: b7 must follow

So the task is to copy, over any distance. An earlier one had a key and its value in two ids, which asks for two heads
one behind the other; models of this size did not learn it (experiments/log.md).

In training every second row has needles between its text, and the others are text alone: where a row is short, needles
leave no running text. Only answers and text carry loss: what is shown is random. In the test the needle that is asked
for lies at some depth of the row, the other seven anywhere, and the question at its end.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.data.packing import Batch

KINDS = 8
VALUES = 16  # of each kind
QUESTIONS = 304 + np.arange(KINDS)  # ids beyond those of bytes and special tokens
NEEDLES = 320 + np.arange(KINDS * VALUES).reshape(KINDS, VALUES)
BLOCK = 4  # needles and questions lie in blocks of so many tokens
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
    """Return the batch with two to eight needles in every second row, which are shown or asked for 16 times together.

    The first row, the third and so on stay as they are. A needle's first place shows it, the others ask for it. Rows
    with few needles ask for each of them often.

    Raises:
        ValueError: there are no two rows, or a row has no place for so many needles.
    """
    rows = rows_of(batch)
    number_of_rows, length = batch["tokens_BS"].shape
    blocks = length // BLOCK
    if number_of_rows < 2 or blocks < 2 * KINDS:
        raise ValueError(
            f"{number_of_rows} rows of {length} tokens: needles take every second row, and {2 * KINDS * BLOCK} tokens"
            " of it; take more rows, or longer ones"
        )
    for tokens, weights in zip(rows.tokens[1::2], rows.weights[1::2], strict=True):
        kinds = rng.permutation(KINDS)[: rng.integers(2, KINDS + 1)]
        needles = draw(rng)
        order = rng.permutation(np.concatenate([kinds, rng.choice(kinds, 2 * KINDS - len(kinds))]))
        starts = np.sort(rng.choice(blocks, len(order), replace=False)) * BLOCK
        for place, (kind, start) in enumerate(zip(order, starts, strict=True)):
            if kind in order[:place]:
                tokens[start : start + 2] = QUESTIONS[kind], needles[kind]
                weights[start : start + 2] = 0.0, WEIGHT
            else:
                tokens[start], weights[start] = needles[kind], 0.0
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
        needles, asked = draw(rng), rng.integers(KINDS)
        others = rng.choice(np.delete(np.arange(blocks), place), KINDS - 1, replace=False)
        tokens[place * BLOCK] = needles[asked]
        tokens[others * BLOCK] = np.delete(needles, asked)
        tokens[-2:] = QUESTIONS[asked], needles[asked]
    return tokens_BS


def draw(rng: np.random.Generator) -> np.ndarray:
    """Return the needles of a row, one of each kind."""
    return NEEDLES[np.arange(KINDS), rng.integers(VALUES, size=KINDS)]
