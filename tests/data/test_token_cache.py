"""Tokenised once, complete or absent, nothing lost on the way, and damage noticed."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.data import token_cache, token_files
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.token_cache import open_corpus
from tests.support.array_records import write_array_record


def texts_of(corpus, tokenizer) -> list[str]:
    """All documents of both splits, sorted."""
    return sorted(
        tokenizer.decode(documents[i]) for split in corpus[:2] for documents in split for i in range(len(documents))
    )


def test_the_cache_holds_the_corpus(tmp_path, make_config, corpus_folder, bpe):
    corpus = open_corpus(make_config(corpus_folder), bpe, tmp_path)
    files = [path.read_text("utf-8") for path in corpus_folder.iterdir()]
    assert texts_of(corpus, bpe) == sorted(files)
    assert 0 < len(corpus.heldout[0]) < len(corpus.train[0])
    assert sum(int(documents.num_bytes.sum()) for split in corpus[:2] for documents in split) == sum(
        len(text.encode()) for text in files
    )


def test_a_failed_writer_adds_nothing(tmp_path):
    with pytest.raises(ValueError, match="first"), token_files.Writer(tmp_path / "0-train", np.uint16) as writer:
        writer.add(np.arange(3), 3)
        raise ValueError("first")
    assert [path.name for path in tmp_path.iterdir()] == ["0-train.ids.bin"]


def test_it_is_written_once(tmp_path, make_config, corpus_folder, bpe, monkeypatch):
    first = open_corpus(make_config(corpus_folder), bpe, tmp_path)
    monkeypatch.setattr(token_cache, "_write", lambda *_: pytest.fail("tokenised again"))
    again = open_corpus(make_config(corpus_folder, sequence_length=128, fim_rate=0.5), bpe, tmp_path)
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.train[0][3], first.train[0][3])


def test_a_changed_corpus_is_tokenised_again(tmp_path, make_config, bpe):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("first\n")
    first = open_corpus(make_config(folder, heldout_fraction=0.0), bpe, tmp_path)
    (folder / "a.txt").write_text("other\n")  # of the same size
    second = open_corpus(make_config(folder, heldout_fraction=0.0), bpe, tmp_path)
    assert texts_of(second, bpe) == ["other\n"]
    assert second.digest != first.digest


def test_another_tokenizer_has_its_own_ids(tmp_path, make_config, corpus_folder, bpe):
    corpora = [open_corpus(make_config(corpus_folder), tokenizer, tmp_path) for tokenizer in (bpe, byte_tokenizer())]
    assert texts_of(corpora[0], bpe) == texts_of(corpora[1], byte_tokenizer())
    assert corpora[0].digest == corpora[1].digest


def test_the_digest_knows_names_and_contents_only(tmp_path, make_config, bpe):
    def digest(name, text):
        folder = tmp_path / f"corpus {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(text)
        return open_corpus(make_config(folder, heldout_fraction=0.0), bpe, tmp_path / "work").digest

    assert digest("a", "x") == digest("a", "x")
    assert len({digest("a", "x"), digest("b", "x"), digest("a", "y")}) == 3


def test_a_failure_leaves_nothing(tmp_path, make_config, corpus_folder, bpe, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        open_corpus(make_config(corpus_folder), bpe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path, make_config, corpus_folder, bpe):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = token_cache.socket.gethostname()
    dead, alive = (tmp_path / f"tokens-0.partial-{host}-{pid}" for pid in (child.pid, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "0-train.ids.bin").write_bytes(b"half")
    open_corpus(make_config(corpus_folder), bpe, tmp_path)
    assert not dead.exists()
    assert alive.exists()


def test_the_second_of_two_processes_uses_what_the_first_wrote(tmp_path, make_config, corpus_folder, bpe, monkeypatch):
    config, write = make_config(corpus_folder), token_cache._write

    def overtaken(config, tokenizer, folder):
        monkeypatch.setattr(token_cache, "_write", write)
        monkeypatch.setattr(token_cache.os, "getpid", lambda: 1)
        open_corpus(config, tokenizer, tmp_path)
        monkeypatch.undo()
        write(config, tokenizer, folder)

    monkeypatch.setattr(token_cache, "_write", overtaken)
    assert len(open_corpus(config, bpe, tmp_path).train[0])
    assert [path.name.count("partial") for path in tmp_path.iterdir()] == [0]


def test_skipped_items_are_counted_and_logged(tmp_path, make_config, bpe, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n{"text": "fine"}\nworse\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        open_corpus(make_config(tmp_path / "a.jsonl"), bpe, tmp_path / "work")
    corpus = open_corpus(make_config(tmp_path / "a.jsonl", on_error="skip"), bpe, tmp_path / "work")
    assert texts_of(corpus, bpe) == ["fine", "good"]
    assert corpus.num_skipped == 2
    assert "line 4 is not JSON" in corpus.skipped[1]
    assert "2 items of the corpus were skipped" in caplog.text


@pytest.mark.parametrize("wrong", [262, -1])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, make_config, wrong):
    records = [np.array(ids, "<i4").tobytes() for ids in ([6, 7], [8, wrong])]
    write_array_record(tmp_path / "ids.array_record", records)
    config = make_config(tmp_path / "ids.array_record", tokenizer="byte")
    with pytest.raises(ValueError, match=f"record:1 has token id {wrong} .* ends at 261; set data.tokenizer"):
        open_corpus(config, byte_tokenizer(), tmp_path / "work")


def test_sources_without_documents_or_weight_are_refused(tmp_path, make_config, bpe):
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(ValueError, match="blank.txt' holds no readable document"):
        open_corpus(make_config(tmp_path / "blank.txt"), bpe, tmp_path / "work")
    with pytest.raises(ValueError, match="weight = 0 of 'stdlib' must be positive and finite"):
        make_config(sources=({"path": "stdlib", "weight": 0.0},))


def test_a_corpus_under_another_path_is_not_tokenised_again(tmp_path, make_config, corpus_folder, bpe, monkeypatch):
    """As on the scratch disk of each job; copied with its times."""
    first = open_corpus(make_config(corpus_folder), bpe, tmp_path / "work")
    shutil.copytree(corpus_folder, tmp_path / "scratch")  # copies times, too
    monkeypatch.setattr(token_cache, "_write", lambda *_: pytest.fail("tokenised again"))
    assert open_corpus(make_config(tmp_path / "scratch"), bpe, tmp_path / "work").digest == first.digest


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def negative(path):
    ends = np.load(path)
    ends[0] = -5
    np.save(path, ends)


def edit(path):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"digest": "0" * 64}))


def remove(path):
    path.unlink()


DAMAGE = [(harm, name) for name in ("0-train.ids.bin", "0-heldout.ends.npy") for harm in (flip, zero, cut, remove)]
DAMAGE += [(negative, "0-train.ends.npy"), (flip, "0-train.bytes.npy")]
DAMAGE += [(harm, "about.json") for harm in (edit, flip, zero, cut, remove)]


@pytest.mark.parametrize(("harm", "name"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_cache_is_named_and_made_again(tmp_path, make_config, bpe, caplog, harm, name):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}\n" * 3)
    config = make_config(tmp_path)
    expected = open_corpus(config, bpe, tmp_path / ".work")
    ids = [expected.train[0][i].tolist() for i in range(len(expected.train[0]))]
    (folder,) = (tmp_path / ".work").iterdir()
    harm(folder / name)
    corpus = open_corpus(config, bpe, tmp_path / ".work")
    assert f"token cache {folder} is damaged and is made again" in caplog.text and name in caplog.text
    assert corpus.digest == expected.digest
    assert [corpus.train[0][i].tolist() for i in range(len(corpus.train[0]))] == ids
    assert list((tmp_path / ".work").iterdir()) == [folder]
    caplog.clear()
    open_corpus(config, bpe, tmp_path / ".work")
    assert not caplog.text


def test_an_empty_folder_in_the_place_of_a_cache_is_made_again(tmp_path, make_config, corpus_folder, bpe):
    open_corpus(make_config(corpus_folder), bpe, tmp_path)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    folder.mkdir()
    assert len(open_corpus(make_config(corpus_folder), bpe, tmp_path).train[0])


def test_a_large_cache_is_checked_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "CHUNK_BYTES", 16)
    monkeypatch.setattr(token_files, "MOST_CHUNKS", 10)
    (tmp_path / "ids").write_bytes(bytes(16 * 100))
    token_files.seal(tmp_path, {})
    found = 0
    for chunk in range(100):
        content = bytearray(16 * 100)
        content[16 * chunk] = 1
        (tmp_path / "ids").write_bytes(content)
        try:
            token_files.open_about(tmp_path)
        except ValueError as error:
            assert f"near byte {16 * chunk}" in str(error)
            found += 1
    assert found == 10


@pytest.mark.parametrize("num_cores", [1, 4])
def test_ctrl_c_leaves_no_folder_and_no_process(tmp_path, make_config, corpus_folder, bpe, monkeypatch, num_cores):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setattr(token_cache, "SMALL_CORPUS", 0)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    add, count = token_files.Writer.add, iter(range(100))

    def interrupted(self, ids, num_bytes):
        if next(count) == 5:
            raise KeyboardInterrupt
        add(self, ids, num_bytes)

    monkeypatch.setattr(token_files.Writer, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(make_config(corpus_folder), bpe, tmp_path)
    assert not list(tmp_path.iterdir())
    assert bool(started) == (num_cores > 1) and all(process.poll() is not None for process in started)


def test_what_a_killed_process_of_this_number_left_is_in_no_ones_way(tmp_path, make_config, corpus_folder, bpe):
    """Containers number their processes anew: the first of two runs may have had our number."""
    open_corpus(make_config(corpus_folder), bpe, tmp_path)
    (folder,) = tmp_path.iterdir()
    folder.rename(token_cache._partial(folder))
    open_corpus(make_config(corpus_folder), bpe, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
