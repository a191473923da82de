"""Data sets by name, with `datasets` and the Hub played by a few lines: neither is installed here."""

import json
import sys
from types import SimpleNamespace

import pytest

from deepseek_jax.config import Source
from deepseek_jax.data import hub
from deepseek_jax.data.sources import check_source, source_key
from deepseek_jax.data.token_cache import open_corpus
from tests.support.reading import read, skipping

COMMIT = "0123456789" * 4


@pytest.fixture
def library(monkeypatch):
    """Plays `datasets` and the Hub; returns what was asked of them, and the rows to answer with."""
    asked, rows, state = [], [], {"commit": COMMIT}

    def load_dataset(name, configuration, *, split, revision, streaming):
        asked.append((name, configuration, split, revision, streaming))
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    def dataset_info(name, revision, timeout):
        if state["commit"] is None:
            raise ConnectionError("no network\n" + "at all " * 100)
        return SimpleNamespace(sha=state["commit"])

    api = SimpleNamespace(dataset_info=dataset_info)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
    hub._commit.cache_clear()
    yield SimpleNamespace(asked=asked, rows=rows, state=state)
    hub._commit.cache_clear()


def test_rows_are_streamed_from_the_commit(library):
    library.rows += [{"text": "a", "id": 1}, {"text": ""}, {"text": "b"}]
    documents, _ = read("hf:allenai/c4:en:train")
    assert [(document.name, document.content) for document in documents] == [
        ("allenai/c4:1", "a"),
        ("allenai/c4:3", "b"),
    ]
    assert library.asked == [("allenai/c4", "en", "train", COMMIT, True)]
    read("hf:roneneldan/TinyStories@" + "f" * 40 + ":train")
    assert library.asked[1] == ("roneneldan/TinyStories", None, "train", "f" * 40, True)


def test_rows_without_text_are_items_and_a_broken_network_is_not(library):
    library.rows += [{"text": "a"}, {"text": None}, {"text": "b"}]
    texts, (message,) = skipping("hf:x/y:train")
    assert texts == ["a", "b"]
    assert "hf:x/y:train row 2 has no text under text_field = 'text' (it has keys ['text'])" in message
    library.rows[:] = [{"n": 1, "id": "7", "content": "some text"}, {"text": "a"}]
    assert skipping("hf:x/y:train")[1][0].endswith("['content', 'id', 'n']): give --config.data.text_field=content")
    library.rows.append(ConnectionError("reset\x1b[31m by peer"))
    with pytest.raises(ValueError, match=r"train cannot be read after row 2: .*reset\\x1b.* start a"):
        skipping("hf:x/y:train")


def test_the_key_is_the_commit(library):
    source = Source(path="hf:x/y:train", weight=1.0)
    first = source_key(source)
    assert source_key(source) == first
    library.state["commit"] = "f" * 40
    assert source_key(source) == first  # one process asks once
    hub._commit.cache_clear()
    assert source_key(source) != first
    hub._commit.cache_clear()
    library.state["commit"] = None
    with pytest.raises(
        ValueError, match=r"the Hub does not tell the commit of .*'x/y': ConnectionError: no network\\n"
    ) as e:
        source_key(source)
    assert "hf:NAME@COMMIT:SPLIT" in str(e.value) and len(str(e.value)) < 500
    json.dumps(source_key(Source(path=f"hf:x/y@{COMMIT}:train", weight=1.0)))  # needs no network


def test_the_key_of_a_local_folder_is_its_files(tmp_path, library):
    (tmp_path / "a.jsonl").write_text("{}")
    source = Source(path=f"hf:{tmp_path}:train", weight=1.0)
    first = source_key(source)
    (tmp_path / "a.jsonl").write_text("{} ")
    assert source_key(source) != first
    read(source.path)
    assert library.asked == [(str(tmp_path), None, "train", None, True)]


def test_a_corpus_is_made_of_it(tmp_path, library, make_config, bpe):
    library.rows += [{"text": f"document {i}"} for i in range(100)]
    corpus = open_corpus(make_config("hf:x/y:train"), bpe, tmp_path)
    assert len(corpus.train[0]) + len(corpus.heldout[0]) == 100


@pytest.mark.parametrize("path", ["hf:", "hf:x", "hf:x:", "hf::train", "hf:x@:train", "hf:a:b:c:d"])
def test_other_forms_are_refused(path, library):
    with pytest.raises(ValueError, match=r"must be hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT"):
        check_source(Source(path=path, weight=1.0))


def test_without_the_library_nothing_begins(monkeypatch, tmp_path, make_config, bpe):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for use in (lambda: read(f"hf:x/y@{COMMIT}:train"), lambda: check_source(Source(path="hf:x/y:train", weight=1.0))):
        with pytest.raises(ValueError, match="reading this corpus needs datasets; install it .* pip install datasets"):
            use()
    for name, content in (("a.parquet", b""), ("a.jsonl.zst", b"")):
        (tmp_path / name).write_bytes(content)
        for module in ("pyarrow", "zstandard"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"needs (pyarrow|zstandard); install it in the clone"):
            open_corpus(make_config(tmp_path / name, on_error="skip"), bpe, tmp_path / "work")
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
