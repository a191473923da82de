"""Needles are shown before they are asked for, only answers carry their weight, and a test asks for the right one."""

import numpy as np
import pytest

from experiments.studies import needles


def text_batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of text, all the same byte."""
    ids = np.full((rows, length), 65)
    return {"tokens_BS": ids, "targets_BS": ids.copy(), "loss_weights_BS": np.ones((rows, length), np.float32)}


def test_an_answer_repeats_the_needle_of_its_kind():
    batch = needles.train_batch(text_batch(64, 64), np.random.default_rng(0))
    tokens_BS, weights_BS = needles.rows_of(batch)
    for tokens, weights in zip(tokens_BS[1::2], weights_BS[1::2], strict=True):
        shown, asked = {}, 0
        for place in np.flatnonzero(tokens != 65):
            if tokens[place] in needles.QUESTIONS:
                assert weights[place] == 0.0 and weights[place + 1] == needles.WEIGHT
                kind = tokens[place] - needles.QUESTIONS[0]
                assert tokens[place + 1] == shown[kind] and shown[kind] in needles.NEEDLES[kind]
                asked += 1
            elif weights[place] != needles.WEIGHT:
                kind = np.flatnonzero((tokens[place] == needles.NEEDLES).any(axis=1)).item()
                assert weights[place] == 0.0 and kind not in shown
                shown[kind] = tokens[place]
        assert 2 <= len(shown) <= needles.KINDS
        assert len(shown) + asked == 2 * needles.KINDS
        assert (weights[(tokens == 65)][1:] == 1.0).all()  # text carries loss; the first token of a row is no target


def test_every_second_row_is_running_text():
    """Needles leave one token in four of a row of 64: text in bits per byte is learned from the other rows."""
    batch = needles.train_batch(text_batch(8, 64), np.random.default_rng(0))
    for name, array in text_batch(8, 64).items():
        np.testing.assert_array_equal(batch[name][::2], array[::2])
    is_text = batch["tokens_BS"] == 65
    assert is_text.mean() > 0.5 and not is_text[1::2].all(axis=1).any()
    with pytest.raises(ValueError, match="1 rows of 64 tokens: needles take every second row, and 64 tokens"):
        needles.train_batch(text_batch(1, 64), np.random.default_rng(0))
    with pytest.raises(ValueError, match="take more rows, or longer ones"):
        needles.train_batch(text_batch(8, 60), np.random.default_rng(0))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_asked_for_lies_at_its_depth(depth):
    rows_BS = needles.test_rows(np.full((8, 128), 65), np.random.default_rng(0), depth)
    for tokens in rows_BS:
        places = np.flatnonzero(np.isin(tokens[:-2], needles.NEEDLES))
        assert len(places) == needles.KINDS
        kinds = [np.flatnonzero((tokens[place] == needles.NEEDLES).any(axis=1)).item() for place in places]
        assert sorted(kinds) == list(range(needles.KINDS))  # one answer
        place = round(depth * (128 // needles.BLOCK - 2)) * needles.BLOCK
        assert tokens[place] == tokens[-1]
        assert tokens[-2] == needles.QUESTIONS[kinds[places.tolist().index(place)]]
