"""Every kind of file gives the same documents, and what cannot be read is named."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from deepseek_jax.config import Source
from deepseek_jax.data.corpus_files import find_files
from deepseek_jax.data.documents import Problems
from deepseek_jax.data.sources import read_documents
from tests.support.array_records import write_array_record

TEXTS = ["one\n", "zwei é", "三"]


def read(path, on_error="refuse", text_field="text"):
    problems = Problems(on_error)
    return list(read_documents(Source(path=str(path), weight=1.0), text_field, problems)), problems


def jsonl(texts) -> bytes:
    return "\n".join(json.dumps({"id": 1, "text": text}) for text in texts).encode()


def test_the_same_texts_from_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "c.jsonl.zst").write_bytes(
        zstandard.compress(jsonl(TEXTS[:1])) + zstandard.compress(b"\n\n" + jsonl(TEXTS[1:]))
    )
    pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / "e").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "e" / f"{i}.txt").write_text(text, "utf-8")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e"):
        documents, _ = read(tmp_path / name)
        assert [document.content for document in documents] == TEXTS, name
    documents, _ = read(tmp_path)  # a folder may mix them
    assert [document.content for document in documents] == 5 * TEXTS
    assert [document.name for document in documents][:4] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl.gz:1"]
    assert [document.name for document in documents][-1] == "e/2.txt"


def test_token_ids_from_array_record(tmp_path):
    write_array_record(tmp_path / "ids.array_record", [np.array(ids, "<i4").tobytes() for ids in ([7, 8], [9])])
    documents, _ = read(tmp_path / "ids.array_record")
    assert [document.content.tolist() for document in documents] == [[7, 8], [9]]


def test_the_standard_library_is_text_and_in_order():
    source = Source(path="stdlib", weight=1.0)
    names = [file.name for file in find_files(source).files]
    assert names == sorted(names)
    assert {"json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)


def test_hidden_files_and_empty_documents_are_left_out(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".git/config", ".hidden", "empty.txt", "real.txt"):
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    documents, _ = read(tmp_path)
    assert [document.name for document in documents] == ["real.txt"]


def bad_inputs(folder):
    """(file name, bytes, what the message must say, documents left when skipping)."""
    good = jsonl(TEXTS)
    parquet = folder / "made.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), parquet)
    pq.write_table(pa.table({"content": ["a"]}), folder / "column.parquet")
    write_array_record(folder / "odd.array_record", [b"123456789", np.array([5], "<i4").tobytes()])
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    return [
        ("broken.jsonl", good + b'\n{"text": "half', "broken.jsonl line 4 is not JSON", 3),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n' + good, "latin.jsonl line 1 is not JSON", 3),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n' + good, "surrogate.jsonl line 1 is not JSON text", 3),
        (
            "field.jsonl",
            b'{"content": "x"}\n' + good,
            r"line 1 has no text under text_field = 'text' \(it has keys \['content'\]\): give .*text_field=content",
            3,
        ),
        ("number.jsonl", good + b"\n12", "number.jsonl line 4 has no text .* a int", 3),
        ("cut.jsonl.gz", gzip.compress(good)[:-12], "cut.jsonl.gz cannot be read after line", None),
        ("garbage.jsonl.zst", b"not zstandard at all", "garbage.jsonl.zst cannot be read after line 0", 0),
        ("latin.txt", b"caf\xe9", r"latin.txt is not UTF-8 text", 0),
        ("null.parquet", made["made.parquet"], "null.parquet row 2 has None in 'text', not text", 2),
        (
            "column.parquet",
            made["column.parquet"],
            r"has no column text_field = 'text' \(it has \['content'\]\): give --config.data.text_field=content",
            0,
        ),
        ("cut.parquet", made["made.parquet"][:-9], "cut.parquet cannot be read after row 0", 0),
        (
            "odd.array_record",
            made["odd.array_record"],
            "odd.array_record record 0 has 9 bytes, not a whole number of int32",
            1,
        ),
        ("garbage.array_record", b"garbage" * 100, "garbage.array_record has no records", 0),
    ]


@pytest.mark.parametrize("case", range(13))
def test_bad_items_are_named_then_refused_or_skipped(tmp_path, case):
    (tmp_path / "made").mkdir()
    name, content, message, left = bad_inputs(tmp_path / "made")[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message + r".*data\.on_error = 'skip'"):
        read(tmp_path / name)
    documents, problems = read(tmp_path / name, on_error="skip")
    assert problems.count == 1
    assert left is None or len(documents) == left


def test_a_text_file_that_is_not_utf8_names_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xff\n")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(line 3\)"):
        read(tmp_path / "a.txt")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so permission bits are no test
    with pytest.raises(ValueError, match="secret.txt cannot be read: Permission denied"):
        read(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return []

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(ValueError, match="cannot be listed: Permission denied; repair or remove it"):
        read(tmp_path)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match="data source '/nowhere' does not exist; name a folder, a file, a pattern"):
        read("/nowhere")
    with pytest.raises(ValueError, match="is an empty folder; put text"):
        read(tmp_path)
