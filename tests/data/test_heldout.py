"""Every held-out byte counts once, whatever the batch, the length and the number of processes."""

import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.heldout import heldout_batches
from deepseek_jax.data.token_cache import open_corpus


@pytest.fixture
def heldout_texts(work, make_config, corpus_folder, bpe):
    (documents,) = open_corpus(make_config(corpus_folder), bpe, work).heldout
    return [bpe.decode(documents[i]) for i in range(len(documents))]


def weighted_targets(batches) -> np.ndarray:
    return np.concatenate([batch["targets_BS"][batch["loss_weights_BS"] > 0] for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("sequence_length", [3, 64, 100_000])
def test_every_byte_is_a_target_once(work, make_config, corpus_folder, bpe, heldout_texts, sequence_length, batch_size):
    config = make_config(corpus_folder, sequence_length=sequence_length)
    held_out = heldout_batches(config, bpe, work, batch_size)
    batches = list(held_out)
    targets = weighted_targets(batches)
    assert len(batches) == len(held_out)
    assert {batch["tokens_BS"].shape for batch in batches} == {(batch_size, sequence_length)}
    assert held_out.num_bytes == bpe.num_bytes_V[targets].sum() == sum(len(text.encode()) for text in heldout_texts)
    assert held_out.num_tokens == len(targets)
    assert (targets == bpe.eos).sum() == len(heldout_texts)
    assert bpe.bos not in targets
    read = [bpe.decode(part) for part in np.split(targets, np.flatnonzero(targets == bpe.eos) + 1)[:-1]]
    assert sorted(read) == sorted(heldout_texts)
    assert [text.encode() for text in read] == list(held_out.texts())


@pytest.mark.parametrize("mask", [False, True])
def test_inputs_are_the_tokens_before_the_targets(work, make_config, corpus_folder, bpe, mask):
    for batch in heldout_batches(make_config(corpus_folder, mask_documents=mask, reset_positions=mask), bpe, work, 4):
        tokens, targets, segments = batch["tokens_BS"], batch["targets_BS"], batch["segment_ids_BS"]
        starts = tokens[:, 1:] == bpe.bos
        padding = segments == 0
        assert (tokens[:, 1:] == targets[:, :-1])[~starts & ~padding[:, 1:]].all()
        assert (targets[:, :-1][starts] == bpe.eos).all()
        np.testing.assert_array_equal(padding, batch["loss_weights_BS"] == 0)
        np.testing.assert_array_equal(
            np.diff(segments, axis=1)[~padding[:, 1:]], (starts if mask else 0 * starts)[~padding[:, 1:]]
        )
        assert (segments[:, 0][~padding[:, 0]] == 1).all()
        assert (
            (batch["positions_BS"][:, 1:][starts] == 0).all()
            if mask
            else (batch["positions_BS"] == np.arange(64)).all()
        )


def test_a_limited_evaluation_is_the_start_of_the_whole(work, make_config, corpus_folder, bpe):
    config = make_config(corpus_folder)
    whole, part = heldout_batches(config, bpe, work, 4), heldout_batches(config, bpe, work, 4, num_batches=5)
    assert len(part) == 5 < len(whole)
    for expected, batch in zip(whole, part, strict=False):
        assert all(np.array_equal(expected[name], batch[name]) for name in batch)
    targets = weighted_targets(part)
    assert part.num_tokens == len(targets) == 5 * 4 * 64
    assert part.num_bytes == bpe.num_bytes_V[targets].sum() == sum(map(len, part.texts()))
    assert heldout_batches(config, bpe, work, 4, num_batches=1000).num_bytes == whole.num_bytes


def test_iterating_again_and_over_processes_gives_the_same(work, make_config, corpus_folder, bpe):
    config = make_config(corpus_folder)
    whole = heldout_batches(config, bpe, work, 6)
    parts = [heldout_batches(config, bpe, work, 6, process_index=i, process_count=3) for i in range(3)]
    for _ in range(2):
        for expected, *shares in zip(whole, *parts, strict=True):
            for name, array in expected.items():
                np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), array)
    assert {part.num_bytes for part in parts} == {whole.num_bytes}


def test_held_out_text_is_never_trained_on(work, make_config, corpus_folder, bpe, heldout_texts):
    (train,) = open_corpus(make_config(corpus_folder), bpe, work).train
    assert {bpe.decode(train[i]) for i in range(len(train))}.isdisjoint(heldout_texts)


def test_several_sources_are_all_held_out(tmp_path, make_config, corpus_folder, bpe, heldout_texts):
    (tmp_path / "other.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(100)))
    held_out = heldout_batches(make_config(corpus_folder, tmp_path / "other.jsonl"), bpe, tmp_path, 4)
    texts = [text.decode() for text in held_out.texts()]
    others = [text for text in texts if text.startswith("document ")]
    assert set(texts) - set(others) == set(heldout_texts)
    assert 5 <= len(others) <= 40


def test_each_source_is_measured_alone_and_batches_are_shared_out_by_weight(tmp_path, make_config, corpus_folder, bpe):
    (tmp_path / "other.jsonl").write_text("".join(f'{{"text": "document {i} {"x" * 500}"}}\n' for i in range(400)))
    (tmp_path / "poem.txt").write_text("one short document: nothing of it is held out")
    paths = {corpus_folder: 3.0, tmp_path / "other.jsonl": 1.0, tmp_path / "poem.txt": 5.0}
    sources = tuple({"path": str(path), "weight": weight} for path, weight in paths.items())
    whole = heldout_batches(make_config(sources=sources), bpe, tmp_path, 4)
    for part, path in zip(whole.parts[:2], paths, strict=False):
        (alone,) = heldout_batches(make_config(path), bpe, tmp_path, 4).parts
        assert (part.num_tokens, part.num_bytes) == (alone.num_tokens, alone.num_bytes)
        assert list(part.texts()) == list(alone.texts())
    assert (whole.parts[2].num_rows, whole.parts[2].num_bytes, list(whole.parts[2])) == (0, 0, [])
    assert whole.num_bytes == sum(map(len, whole.texts())) and len(list(whole)) == len(whole)
    limited = heldout_batches(make_config(sources=sources), bpe, tmp_path, 4, num_batches=8)
    assert [len(part) for part in limited.parts] == [6, 2, 0]
    assert [len(part) for part in heldout_batches(make_config(sources=sources), bpe, tmp_path, 4, 1).parts] == [1, 1, 0]
    assert whole.mean([1.0, 2.0, None]) == 1.25
    (alone,) = heldout_batches(make_config(corpus_folder), bpe, tmp_path, 4).parts
    assert alone.weight == 1.0


def test_an_empty_held_out_split_is_refused(work, make_config, corpus_folder, bpe):
    with pytest.raises(ValueError, match="none of 40 documents is held out at data.heldout_fraction = 0.0; raise it"):
        heldout_batches(make_config(corpus_folder, heldout_fraction=0.0), bpe, work, 4)
    with pytest.raises(ValueError, match="a batch of 5 sequences does not divide over 2 processes"):
        heldout_batches(make_config(corpus_folder), byte_tokenizer(), work, 5, process_count=2)
