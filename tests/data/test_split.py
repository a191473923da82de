"""Which documents are held out: by content alone, near the wanted share of the bytes, and never none or all."""

import hashlib
import json

import numpy as np
import pytest

from deepseek_jax.config import Source
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.sources import read_documents
from deepseek_jax.data.split import heldout_keys, is_heldout, longest_document, read_source, train_texts
from tests.support.array_records import write_array_record

FRACTION = 0.02


def split(config, source=0):
    """Return (texts to train on, texts held out) of one source."""
    below, parts = heldout_keys(config)[source], ([], [])
    for document in read_source(config.data.sources[source], config.data, Problems("refuse")):
        parts[is_heldout(document.digest(), below)].append(document.content)
    return parts


def share(parts) -> float:
    held, all_of_it = (sum(len(text) for text in texts) for texts in (parts[1], parts[0] + parts[1]))
    return held / all_of_it


def book(number: int, num_bytes: int) -> str:
    digits = np.random.default_rng(number).bytes(num_bytes).hex()
    return "\n".join(digits[i : i + 40] for i in range(0, num_bytes, 40))[: num_bytes - 1] + "\n"


def write(folder, texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def test_the_split_depends_on_content_alone():
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(1000)]
    assert 70 <= sum(is_heldout(digest, 2**64 // 10) for digest in digests) <= 130  # 100, standard deviation 9.5
    assert all(is_heldout(digest, 2**64 // 5) for digest in digests if is_heldout(digest, 2**64 // 10))
    assert not any(is_heldout(digest, 0) for digest in digests)
    assert all(is_heldout(digest, 2**64) for digest in digests)


def test_stdlib_is_split_by_whole_files_and_the_hash_alone(make_config):
    for fraction in (FRACTION, 0.5):
        config = make_config("stdlib", heldout_fraction=fraction)
        assert heldout_keys(config) == [int(fraction * 2**64)]
    (source,) = config.data.sources
    assert longest_document(source, 0.0005) == 2**20
    whole = next(d for d in read_documents(source, "text", Problems("refuse")) if len(d.content) > 150_000)
    assert whole in read_source(source, config.data, Problems("refuse"))


@pytest.mark.parametrize(
    "sizes",
    [[300_000], [85_000] * 2, [900_000] * 3, [20_000], [3_000] * 3, [150_000] + [2_000] * 50],
    ids=lambda sizes: f"{len(sizes)}x{sizes[0]}",
)
@pytest.mark.parametrize("fraction", [FRACTION, 0.2])
def test_few_and_large_files_are_held_out_near_the_wanted_share(tmp_path, make_config, sizes, fraction):
    texts = {f"{i}.txt": book(0, max(sizes))[i : i + size] for i, size in enumerate(sizes)}
    parts = split(make_config(write(tmp_path / "corpus", texts), heldout_fraction=fraction))
    assert sorted(sum(map(len, part)) for part in parts)[0] > 0
    assert sum(len(text) for part in parts for text in part) == sum(map(len, texts.values()))
    smallest = max(4200, sum(sizes) // 1000) / sum(sizes)  # a document, as a share of all
    assert share(parts) <= max(3.0 * fraction, fraction + 3 * smallest)


def test_a_folder_with_one_file_is_that_file(tmp_path, make_config):
    for size in (20_000, 300_000):
        folder = write(tmp_path / "corpus", {"book.txt": book(1, size)})
        alone, inside = make_config(folder / "book.txt"), make_config(folder)
        read = [
            list(read_source(config.data.sources[0], config.data, Problems("refuse"))) for config in (alone, inside)
        ]
        assert read[0] == read[1] and len(read[0]) > 3
        assert heldout_keys(alone) == heldout_keys(inside)


def test_a_text_of_one_line_is_split(tmp_path, make_config):
    """text8, and a small text: at 0.2 all of it was held out, at 0.02 nothing."""
    for size in (30_000, 400_000):
        path = tmp_path / "text8"
        path.write_text(book(2, size).replace("\n", " "))
        for fraction in (FRACTION, 0.2, 0.6):
            parts = split(make_config(path, heldout_fraction=fraction))
            assert all(parts) and share(parts) == pytest.approx(fraction, abs=5_000 / size + 0.1)


def test_a_new_file_moves_no_other_document_and_copies_share_a_split(tmp_path, make_config):
    texts = {f"{i}.txt": book(i, 250_000) for i in range(3)} | {f"s{i}.txt": book(100 + i, 3_000) for i in range(90)}
    folder = write(tmp_path / "corpus", texts)
    before = split(make_config(folder, heldout_fraction=0.1))
    write(folder, {"copy.txt": texts["1.txt"], "new.txt": book(7, 300_000)})
    after = split(make_config(folder, heldout_fraction=0.1))
    for old, new in zip(before, after, strict=True):
        assert set(old) <= set(new) and len(new) > len(old)
    assert not set(after[0]) & set(after[1])


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
def test_a_huge_record_is_cut_and_a_long_one_among_many_is_not(tmp_path, make_config, kind):
    def records(*lengths):
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps({"text": book(i, n)}) + "\n" for i, n in enumerate(lengths)))
        else:
            write_array_record(path, [(np.arange(n // 4, dtype="<i4") + i).tobytes() for i, n in enumerate(lengths)])
        config = make_config(path, heldout_fraction=FRACTION)
        return config, [
            len(document.content) * (1 if kind == "jsonl" else 4)
            for document in read_source(config.data.sources[0], config.data, Problems("refuse"))
        ]

    config, sizes = records(3_000_000)
    assert sum(sizes) == 3_000_000 and 8_000 < max(sizes) < 30_000
    assert all(split(config))
    config, sizes = records(*[60_000] * 60)
    assert sizes == [60_000] * 60
    config, sizes = records(*[1_000] * 50, 20_000)
    assert sizes[:50] == [1_000] * 50 and 4 <= len(sizes[50:]) <= 5


def test_bounds_of_the_longest_document(tmp_path, make_config):
    def longest(size, fraction=FRACTION):
        with (tmp_path / "sparse.jsonl").open("wb") as file:
            file.truncate(size)
        return longest_document(make_config(tmp_path / "sparse.jsonl").data.sources[0], fraction)

    assert longest(1) == longest(400_000) == 8_192
    assert longest(1_000_000) == 32_768
    assert longest(10**9) == longest(10**13) == 2**20
    assert longest(100_000, 0.0) == longest(100_000, 1.0) == 2**20


@pytest.mark.parametrize("texts", [{"a.txt": "one short poem\n"}, {"a.txt": "the same\n", "b.txt": "the same\n"}])
def test_too_little_text_is_refused_with_what_is_needed(tmp_path, make_config, texts):
    config = make_config(write(tmp_path / "corpus", texts))
    with pytest.raises(ValueError, match=r"too little text .*corpus' \d+ bytes, in one document .*beyond 8,192 bytes"):
        heldout_keys(config)
    with pytest.raises(ValueError, match="too little text"):
        list(train_texts(config))


def test_in_a_mixture_one_document_is_trained_on(tmp_path, make_config):
    write(tmp_path / "poem", {"a.txt": "one short poem\n"})
    write(tmp_path / "many", {f"{i}.txt": f"text {i}" for i in range(50)})
    config = make_config(tmp_path / "poem", tmp_path / "many")
    assert split(config, 0) == (["one short poem\n"], [])
    assert all(split(config, 1))


def test_two_short_documents_are_one_of_each(tmp_path, make_config):
    folder = write(tmp_path / "corpus", {"a.txt": "one", "b.txt": "two"})
    for fraction in (0.001, 0.999):
        assert [len(part) for part in split(make_config(folder, heldout_fraction=fraction))] == [1, 1]


def _documents(count):
    return [Document(f"name {i}", f"text {i}", 0) for i in range(count)]


def test_a_tokenizer_is_trained_on_the_train_split_only(tmp_path, make_config):
    for document in _documents(50):
        (tmp_path / document.name).write_text(document.content)
    config = make_config(tmp_path, heldout_fraction=0.3)
    texts = set(train_texts(config))
    below = int(0.3 * 2**64)
    assert heldout_keys(config) == [below]
    assert texts == {document.content for document in _documents(50) if not is_heldout(document.digest(), below)}
    assert len(texts) < 50
    with pytest.raises(ValueError, match="heldout_fraction = 1 leaves nothing to train on"):
        list(train_texts(make_config(tmp_path, heldout_fraction=1.0)))


def test_a_tokenizer_sees_of_each_source_what_its_weight_asks_for(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr("deepseek_jax.data.split.TOKENIZER_CHARACTERS", 400)
    folders = [write(tmp_path / letter, {f"{i}.txt": letter * 10 for i in range(40)}) for letter in "ab"]
    sources = tuple(Source(path=str(folder), weight=weight) for folder, weight in zip(folders, (3.0, 1.0), strict=True))
    texts = [*train_texts(make_config(*folders, heldout_fraction=0.0).with_(data={"sources": sources}))]
    assert texts == ["a" * 10] * 30 + ["b" * 10] * 10
