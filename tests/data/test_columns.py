"""Parquet and Arrow: every kind of text column, and rows that are no text."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.data import documents
from tests.support.reading import TEXTS, contents, read, skipping


def bad_utf8() -> pa.Table:
    texts = pa.array([b"abc", b"\xff\xfe\xfd", b"def"], pa.binary())
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})


def write_stream(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_file(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {"a.parquet": lambda path, table: pq.write_table(table, path), "s.arrow": write_stream, "f.arrow": write_file}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column(tmp_path, name, kind):
    table = pa.table({"n": [1, 2, 3], "text": pa.array(TEXTS).cast(kind)})
    WRITERS[name](tmp_path / name, table)
    documents, _ = read(tmp_path / name)
    assert [document.content for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"{name}:{row}" for row in (1, 2, 3)]
    with pytest.raises(ValueError, match=rf"{name} has no column text_field = 'body' \(it has \['n', 'text'\]\)"):
        read(tmp_path / name, text_field="body")
    assert contents(tmp_path / name, source_field="text", text_field="body") == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_that_is_not_utf8_is_one_item(tmp_path, name):
    """Case 09: UnicodeDecodeError named neither file nor row."""
    WRITERS[name](tmp_path / name, bad_utf8())
    texts, (message,) = skipping(tmp_path / name)
    assert texts == ["abc", "def"]
    assert f"{name} row 2 has b'\\xff\\xfe\\xfd' in 'text', not text" in message


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_has_a_longest_length(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_TEXT", 8)
    WRITERS[name](tmp_path / name, pa.table({"text": ["12345678", "123456789", "1234567é", "123456é"]}))
    texts, messages = skipping(tmp_path / name)
    assert texts == ["12345678", "123456é"]
    assert all(f"row {row} is longer than 8 bytes" in message for row, message in zip((2, 3), messages, strict=True))


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_tables_name_their_file(tmp_path, name):
    """Bytes are flipped one at a time: whatever pyarrow raises, the message names the file, or texts come out."""
    table = pa.table({"text": [f"text number {i}" for i in range(20)]})
    WRITERS[name](tmp_path / name, table)
    content = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 60):
        damaged = content.copy()
        damaged[position] ^= rng.integers(1, 256)
        (tmp_path / name).write_bytes(damaged.tobytes())
        texts, messages = skipping(tmp_path / name)
        assert all(isinstance(text, str) for text in texts)
        assert all(name in message for message in messages)
    if name == "s.arrow":
        damaged = content.copy()
        damaged[4:8] = [0, 0, 0, 120]  # the length of the schema's message: 2 GB
        (tmp_path / name).write_bytes(damaged.tobytes())
        assert name in skipping(tmp_path / name)[1][0]
    (tmp_path / name).write_bytes(content[:-100].tobytes())
    assert name in skipping(tmp_path / name)[1][0]


def test_a_folder_that_datasets_saved(tmp_path):
    """The files of `save_to_disk` (datasets 5.2): its state.json names the shards; cache files of `map` are not."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for shard, texts in enumerate((TEXTS[:2], TEXTS[2:])):
            write_stream(tmp_path / split / f"data-0000{shard}-of-00002.arrow", pa.table({"text": texts}))
        write_stream(tmp_path / split / "cache-1b8e.arrow", pa.table({"text": ["not of the data set"]}))
        shards = [{"filename": f"data-0000{shard}-of-00002.arrow"} for shard in (0, 1)]
        (tmp_path / split / "state.json").write_text(json.dumps({"_data_files": shards, "_split": None}))
        (tmp_path / split / "dataset_info.json").write_text('{"description": ""}')
    assert contents(tmp_path / "train") == TEXTS
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"the splits \['test', 'train'\]; name one of them"):
        read(tmp_path)
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "../test/x"}]}')
    with pytest.raises(ValueError, match="names no _data_files; save the data set again"):
        read(tmp_path / "train")
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "data-9.arrow"}]}')
    with pytest.raises(ValueError, match="data-9.arrow cannot be read: No such file or directory"):
        read(tmp_path / "train")
