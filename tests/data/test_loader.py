"""The loader: complete epochs, exact positions, disjoint processes, mixtures."""

import hashlib
import json
import random

import numpy as np
import pytest

from deepseek_jax.data import pipeline
from deepseek_jax.data.bpe import byte_tokenizer, train_bpe
from deepseek_jax.data.heldout import heldout_batches
from deepseek_jax.data.pipeline import make_train_loader
from deepseek_jax.data.token_cache import open_corpus
from tests.data.test_examples import CONVERSATIONS, TOKENIZER, Encoded


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rows(batches) -> list[tuple]:
    """Rows as hashable tuples of all that a batch has of them."""
    names = ("tokens_BS", "targets_BS", "positions_BS", "segment_ids_BS", "loss_weights_BS")
    return [
        tuple(np.concatenate(row).tolist())
        for batch in batches
        for row in zip(*(batch[name] for name in names), strict=True)
    ]


# SHA-256 of the batches below, made by the code of 623a50f, and the position after them.
GOLDEN = {
    False: "89e13f3e07b4b7a504d011aae180f0b97245cdf012ac227f128e8668f73abfc1",
    True: "eaf692a33cfed67cf9ffb4ddde6d942006040284bac17a0ec76deb76ca2528ea",
}
GOLDEN_POSITION = {
    "windows": {"next_index": 4},
    "row": 33,
    "made_from": {
        "corpus": "e53db324efaf50f264d277a3c05e1b2a33b57bb83678776eac146ca149501908",
        "tokenizer": "5079eda8341d7409e4ff47972bcfbd0ed19416652e063ae508d129145932fe0d",
        "seed": 0,
        "weights": [1.0, 1.0],
        "heldout_fraction": 0.2,
        "sequence_length": 64,
        "fim_rate": 0.3,
        "split_rate": 0.3,
    },
}


@pytest.mark.parametrize("masked", [False, True])
def test_batches_and_positions_stay_what_they_were(tmp_path, make_config, small_windows, masked):
    """A run that is under way continues with the rows it would have seen: not a bit of them may change."""
    texts = ["".join(f"def f{j}(x):\n    return [x, {i * j}];\n\n" for j in range(1 + i * 7 % 45)) for i in range(30)]
    for i, text in enumerate(texts):
        path = tmp_path / ("first" if i % 3 else "second") / f"{i:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    settings = {"fim_rate": 0.3, "split_rate": 0.3, "mask_documents": masked, "reset_positions": masked}
    config = make_config(tmp_path / "first", tmp_path / "second", **settings)
    loader = make_train_loader(config, train_bpe(texts, 400), tmp_path / "work")
    digest = hashlib.sha256()
    for size in (3, 64, 240):
        for name, array in sorted(loader.next_batch(size).items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    assert digest.hexdigest() == GOLDEN[masked]
    assert loader.state() == GOLDEN_POSITION


@pytest.mark.parametrize("mask", [False, True])
def test_every_token_once_per_epoch(work, make_config, corpus_folder, bpe, mask):
    # the corpus is smaller than a window: a window is an epoch
    config = make_config(corpus_folder, mask_documents=mask)
    loader = make_train_loader(config, bpe, work)
    corpus = open_corpus(config, bpe, work)
    documents = [[bpe.bos, *corpus.train[0][i], bpe.eos] for i in range(len(corpus.train[0]))]
    expected = np.sort(np.concatenate(documents))
    for _ in range(3):
        loader.next_batch(1)
        tokens, segments, _ = loader._window
        num_rows = len(tokens)
        np.testing.assert_array_equal(np.sort(tokens[segments > 0]), expected)
        loader.next_batch(num_rows - 1)


def test_epochs_and_seeds_differ_and_repeat(work, make_config, corpus_folder, bpe):
    def first_rows(seed, **data):
        loader = make_train_loader(make_config(corpus_folder, seed=seed, **data), bpe, work)
        batch = loader.next_batch(1)
        num_rows = len(loader._window.tokens)
        return rows([batch, loader.next_batch(num_rows - 1)]), rows([loader.next_batch(num_rows)])

    first, second = first_rows(0, fim_rate=1.0)
    assert (first, second) == first_rows(0, fim_rate=1.0)
    assert len(set(first) & set(second)) < 0.5 * len(first)  # documents are cut anew; some rows lie before both cuts
    first, second = first_rows(0)
    assert first != second
    # the same documents in another order: whole rows come again
    assert len(set(first) & set(second)) > 0.5 * len(first)
    assert first_rows(0)[0] != first_rows(1)[0]


def test_neighbouring_rows_come_from_different_documents(tmp_path, make_config):
    """One document fills most of a window; its rows must not fill most of a batch."""
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(chr(ord("a") + i) * (8000 if i == 0 else 400))
    tokenizer = byte_tokenizer()
    loader = make_train_loader(
        make_config(tmp_path, sequence_length=32, heldout_fraction=0.0), tokenizer, tmp_path / "work"
    )
    is_long = [(loader.next_batch(10)["tokens_BS"][:, 5] == tokenizer.encode("a")[0]).sum() for _ in range(40)]
    assert max(is_long) < 10
    assert min(is_long) > 0


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_resumed_equals_uninterrupted(work, make_config, corpus_folder, bpe, small_windows, prefetch, seed):
    config = make_config(corpus_folder, fim_rate=0.3, split_rate=0.3, prefetch=prefetch, mask_documents=bool(seed % 2))
    rng = random.Random(seed)
    sizes = [rng.choice([1, 2, 5, 16, 64]) for _ in range(30)]  # a batch ramp, and windows crossed at every offset
    stop = rng.randrange(len(sizes))
    loader = make_train_loader(config, bpe, work)
    for size in sizes[:stop]:
        loader.next_batch(size)
    position = json.loads(json.dumps(loader.state()))
    expected = [loader.next_batch(size) for size in sizes[stop:]]
    resumed = make_train_loader(config, bpe, work)
    resumed.restore(position)
    for size, batch in zip(sizes[stop:], expected, strict=True):
        assert equal(resumed.next_batch(size), batch)
    assert resumed.state() == loader.state()
    assert loader.state()["windows"]["next_index"] > 3
    loader.restore(position)  # back, with windows in flight
    assert equal(loader.next_batch(sizes[stop]), expected[0])


def test_batch_sizes_do_not_change_the_rows(work, make_config, corpus_folder, bpe, small_windows):
    config = make_config(corpus_folder)
    one, other = (make_train_loader(config, bpe, work) for _ in range(2))
    assert rows(one.next_batch(size) for size in (3, 64, 13)) == rows(other.next_batch(size) for size in (40, 20, 20))


@pytest.mark.parametrize("counts", [(8, 4, 2, 6, 1), (1, 2)], ids=["corpus", "conversations"])
def test_another_number_of_processes_continues_the_same_rows(
    counts, work, make_config, corpus_folder, bpe, small_windows
):
    """From eight processes to four, two, six and one, each from the position that any of those before it says."""
    config = make_config(corpus_folder)

    def make(examples, **share):
        if 8 in counts:
            return make_train_loader(config, bpe, work, **share)
        return pipeline.make_loader(config, TOKENIZER, examples, **share)

    whole = make(CONVERSATIONS)
    position = whole.state()
    for count in counts:
        parts = [make(Encoded(), process_index=i, process_count=count) for i in range(count)]
        for part in parts:
            part.restore(position)
        for _ in range(2):
            assert rows(part.next_batch(24) for part in parts) == rows([whole.next_batch(24)])
        positions = [json.loads(json.dumps(part.state())) for part in parts]
        assert all(each == whole.state() for each in positions)
        position = positions[-1]
    assert position["windows"]["next_index"] > 1
    with pytest.raises(ValueError, match="a batch of 6 sequences does not divide over 4 processes"):
        make(CONVERSATIONS, process_count=4).next_batch(6)


def test_a_position_in_other_data_is_refused(work, make_config, corpus_folder, bpe):
    position = make_train_loader(make_config(corpus_folder), bpe, work).state()
    with pytest.raises(ValueError, match=r"seed was 0, is 1; sequence_length was 64, is 32"):
        make_train_loader(make_config(corpus_folder, seed=1, sequence_length=32), bpe, work).restore(position)
    with pytest.raises(ValueError, match="tokenizer was"):
        make_train_loader(make_config(corpus_folder), byte_tokenizer(), work).restore(position)


def test_a_position_holds_where_the_corpus_moved_with_other_times(tmp_path, make_config, corpus_folder, bpe):
    """Content counts, not the path; the weights stay bound."""
    loader = make_train_loader(make_config(corpus_folder), bpe, tmp_path)
    loader.next_batch(5)
    for path in corpus_folder.iterdir():
        (tmp_path / "scratch" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "scratch" / path.name).write_bytes(path.read_bytes())
    moved = make_train_loader(make_config(tmp_path / "scratch"), bpe, tmp_path)
    moved.restore(loader.state())
    assert equal(moved.next_batch(7), loader.next_batch(7))
    sources = ({"path": str(tmp_path / "scratch"), "weight": 2.0},)
    with pytest.raises(ValueError, match=r"weights was \[1.0\], is \[2.0\]"):
        make_train_loader(make_config(sources=sources), bpe, tmp_path).restore(loader.state())


def test_mixture_weights_count_tokens(tmp_path, make_config, bpe, small_windows):
    """Two sources whose documents differ in length by a factor of 30, told apart by their letters."""
    for name, letter, length in (("short", "a", 40), ("long", "b", 1200)):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{letter} " * (length + i))
    sources = ({"path": str(tmp_path / "short"), "weight": 3.0}, {"path": str(tmp_path / "long"), "weight": 1.0})
    config = make_config(sources=sources, sequence_length=32)
    tokenizer = byte_tokenizer()
    tokens = np.concatenate([make_train_loader(config, tokenizer, tmp_path).next_batch(2000)["tokens_BS"]])
    a, b = ((tokens == tokenizer.encode(letter)[0]).sum() for letter in "ab")
    assert a / (a + b) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("count", "size"), [(1, 85_000), (2, 85_000), (3, 240_000)])
def test_few_and_large_files_are_trained_on_and_held_out(tmp_path, make_config, count, size):
    """A folder of one text, of two, and of large ones: all were an OverflowError, or held out one whole book."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(count):
        lines = np.random.default_rng(i).bytes(size).hex()
        (corpus / f"volume {i}.txt").write_text("\n".join(lines[j : j + 99] for j in range(0, size, 100)))
    config, tokenizer = make_config(corpus), byte_tokenizer()
    loader = make_train_loader(config, tokenizer, tmp_path)
    assert loader.next_batch(4)["loss_weights_BS"].all()
    held_out = heldout_batches(config, tokenizer, tmp_path, 4)
    assert 0.04 < held_out.num_bytes / (count * size) < 0.35  # of 20, 40 and 180 documents


def test_windows_of_one_document_are_endless(tmp_path, make_config, corpus_folder, bpe, monkeypatch):
    """Documents longer than two thirds of a window, as of a huge corpus: Grain's endless sequences overflow there."""
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 1)
    monkeypatch.setattr(pipeline, "WINDOW_ROWS", 1)
    config = make_config(corpus_folder)
    loader = make_train_loader(config, bpe, tmp_path)
    num_documents = len(open_corpus(config, bpe, tmp_path).train[0])
    loader.next_batch(1000)
    assert loader.state()["windows"]["next_index"] > num_documents


def test_a_source_without_training_documents_is_refused(work, make_config, corpus_folder, bpe):
    with pytest.raises(ValueError, match="no document in the train split; .* lower data.heldout_fraction"):
        make_train_loader(make_config(corpus_folder, heldout_fraction=1.0), bpe, work)


def test_a_workdir_in_its_own_corpus_is_refused_at_the_door(make_config, corpus_folder):
    with pytest.raises(ValueError, match="choose a --workdir elsewhere"):
        pipeline.check_data(make_config(corpus_folder), corpus_folder / "run")
    pipeline.check_data(make_config(corpus_folder), None)


def test_a_sequence_too_short_for_mtp_is_refused(make_config):
    with pytest.raises(ValueError, match="sequence_length = 2 is too short: 1 MTP layers need at least 3"):
        make_config("unused", sequence_length=2)
