"""Every token in exactly one row, and no loss across documents."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.data.examples import Example
from deepseek_jax.data.packing import best_fit, next_token_batch, pack

PAD = -1


def documents(seed: int, count: int = 200, longest: int = 90) -> list[Example]:
    """Documents of consecutive numbers with a gap between documents: b follows a in a document exactly if b = a + 1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    starts = np.cumsum(lengths + 1) - lengths - 1
    return [Example(np.arange(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture
def data(make_config):
    def make(mask: bool, reset: bool = False):
        return dataclasses.replace(make_config("unused").data, mask_documents=mask, reset_positions=reset)

    return make


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("row_length", [2, 33, 64, 1000])
def test_every_token_is_in_exactly_one_row(seed, row_length):
    texts = documents(seed)
    tokens, segments, _ = pack(texts, row_length, PAD)
    assert tokens.shape[1] == row_length
    np.testing.assert_array_equal(np.sort(tokens[segments > 0]), np.sort(np.concatenate([text.ids for text in texts])))
    assert (tokens[segments == 0] == PAD).all()
    assert ((segments == 0)[:, :-1] <= (segments == 0)[:, 1:]).all()  # padding only at the end


@pytest.mark.parametrize("seed", range(3))
def test_a_segment_is_a_contiguous_piece_of_one_document(seed):
    tokens, segments, _ = pack(documents(seed), 33, PAD)
    follows = tokens[:, 1:] == tokens[:, :-1] + 1
    np.testing.assert_array_equal(
        follows & (segments[:, 1:] > 0), (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    )


def test_only_documents_longer_than_a_row_are_cut():
    texts = documents(0, longest=33)
    tokens, segments, _ = pack(texts, 33, PAD)
    pieces = [
        row[ids == segment].tolist()
        for row, ids in zip(tokens, segments, strict=True)
        for segment in range(1, ids.max() + 1)
    ]
    assert sorted(pieces) == [text.ids.tolist() for text in texts]


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([6, 3, 4, 2], 6) == [[0], [2, 3], [1]]
    assert best_fit([5, 1, 6], 6) == [[2], [0, 1]]
    assert best_fit([], 6) == []
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    rows = best_fit(lengths.tolist(), 64)
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert len(rows) <= 1.02 * lengths.sum() / 64  # Ding et al.: nearly nothing is lost


def test_the_example_in_the_docstring(data):
    a, b, c = np.arange(10, 19), np.arange(20, 24), np.arange(30, 32)
    rows = pack([Example(ids) for ids in (a, b, c)], 6, PAD)
    tokens, segments, _ = rows
    assert tokens.tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 30, 31], [16, 17, 18, PAD, PAD, PAD]]
    assert segments.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    masked = next_token_batch(rows, data(mask=True, reset=True))
    assert masked["tokens_BS"][1].tolist() == [20, 21, 22, 23, 30]
    assert masked["targets_BS"][1].tolist() == [21, 22, 23, 30, 31]
    assert masked["loss_weights_BS"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]
    assert masked["positions_BS"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert masked["segment_ids_BS"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 2], [1, 1, 1, 0, 0]]
    stream = next_token_batch(rows, data(mask=False))
    assert stream["loss_weights_BS"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert stream["positions_BS"].tolist() == 3 * [[0, 1, 2, 3, 4]]
    assert stream["segment_ids_BS"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_loss_stays_inside_documents_and_off_padding(data, mask, reset):
    batch = next_token_batch(pack(documents(0), 33, PAD), data(mask, reset))
    inputs, targets, weighted = batch["tokens_BS"], batch["targets_BS"], batch["loss_weights_BS"] > 0
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(weighted, (targets == inputs + 1) & (targets > 0) if mask else targets != PAD)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens_BS": "int32",
        "targets_BS": "int32",
        "positions_BS": "int32",
        "segment_ids_BS": "int32",
        "loss_weights_BS": "float32",
    }
    within = batch["segment_ids_BS"][:, 1:] == batch["segment_ids_BS"][:, :-1]
    assert (np.diff(batch["positions_BS"], axis=1)[within & mask] == 1).all()
    assert (batch["positions_BS"][:, 1:][~within] == 0).all() if mask and reset else True
