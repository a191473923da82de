"""Which files of a source are read, and what happens to everything else that can lie in a folder."""

import gzip
import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.config import Source
from deepseek_jax.data.corpus_files import check_apart, find_files
from deepseek_jax.data.documents import CorpusError
from deepseek_jax.data.sources import source_key
from tests.support.reading import TEXTS, contents, lines, read, skipping


def names(path) -> list[str]:
    return [file.name for file in find_files(Source(path=str(path), weight=1.0)).files]


def put(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_beside_a_data_set_are_left_out_and_said(tmp_path, caplog):
    """Case 15: a downloaded data set brings a README, a licence and JSON about itself."""
    put(tmp_path, a__jsonl=lines(TEXTS), README__md="about " * 1000, LICENSE="terms " * 1000, dataset_infos__json="{}")
    put(tmp_path, notes__rst="short", b__txt="beside them", settings__json="{}")
    assert contents(tmp_path) == [*TEXTS, "beside them"]
    assert "5 files of another kind are left out, for example LICENSE" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    pq.write_table(pa.table({"text": TEXTS * 1000}), tmp_path / "p.parquet")
    assert names(tmp_path) == ["b.txt", "p.parquet"]


def test_a_folder_of_text_is_text(tmp_path):
    put(tmp_path, a__py="x = 1\n" * 9, README__md="words", LICENSE="words", package__json='{"name": "x"}')
    assert names(tmp_path) == ["LICENSE", "README.md", "a.py"]  # JSON is never trained on as it is
    (tmp_path / "a.py").unlink()
    (tmp_path / "package.json").unlink()
    assert names(tmp_path) == ["LICENSE", "README.md"]


def test_json_files_among_themselves_are_read(tmp_path):
    put(
        tmp_path, a__json=lines(TEXTS), b__json=json.dumps([{"text": "x"}]), README__md="words", dataset_info__json="{}"
    )
    assert contents(tmp_path) == [*TEXTS, "x"]


def test_more_bytes_left_out_than_read_is_refused(tmp_path):
    put(tmp_path, fixture__jsonl=lines(TEXTS), a__py="x = 1\n" * 1000)
    with pytest.raises(ValueError, match=r"1 files such as fixture.jsonl and 1 .* such as a.py, which"):
        names(tmp_path)
    assert names(f"{tmp_path}/**/*.py") == ["a.py"]


def test_patterns(tmp_path):
    for folder in ("en", "de/old"):
        (tmp_path / folder).mkdir(parents=True)
        for i in (0, 1):
            (tmp_path / folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines([f"{folder} {i}"])))
    put(tmp_path / "en", notes__txt="x")
    assert contents(f"{tmp_path}/en/*.jsonl.gz") == ["en 0", "en 1"]
    assert names(f"{tmp_path}/**/0.jsonl.gz") == ["de/old/0.jsonl.gz", "en/0.jsonl.gz"]
    assert names(f"{tmp_path}/*/[0-9].jsonl.gz") == ["0.jsonl.gz", "1.jsonl.gz"]
    put(tmp_path / "en", **{"a[1]__txt": "brackets"})
    assert contents(tmp_path / "en" / "a[1].txt") == ["brackets"]  # a file of that name comes first
    with pytest.raises(ValueError, match=r"data source '.*\.csv' matches no file; name a folder, a file, or another"):
        names(f"{tmp_path}/*.csv")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", "x.zip is a .zip file, which is not read; make .jsonl, .parquet or .txt of it"),
        ("x.tar.gz", r"x.tar.gz is compressed, and its name does not say what is inside; call it \*.jsonl.gz or"),
        ("x.gz", "x.gz is compressed, and its name does not say what is inside"),
        ("train.bin", "train.bin is a .bin file, which is not read"),
        ("x.parquet.gz", "x.parquet.gz is a compressed .parquet file, which is not read; decompress it"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"plain")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=message):
            read(path)
        assert skipping(path)[0] == []


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    """Case 09: the content has no fault."""
    put(tmp_path, **{"caf\udce9__txt": "x", "caf\udce9__jsonl": lines(TEXTS), "a__txt": "a"})
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "p")
    (tmp_path / "p").rename(tmp_path / "caf\udce9.parquet")
    documents, _ = read(tmp_path)
    assert [document.name for document in documents][:2] == ["a.txt", "caf\\xe9.jsonl:1"]
    assert len(documents) == 8
    assert all(document.name.encode() for document in documents)
    json.dumps(source_key(Source(path=str(tmp_path), weight=1.0))).encode()


def test_what_is_no_regular_file(tmp_path, monkeypatch):
    put(tmp_path, a__txt="a")
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("/nowhere", tmp_path / "broken.jsonl")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes
    server.bind("socket")
    texts, messages = skipping(tmp_path)
    server.close()
    assert texts == ["a"]
    said = "\n".join(messages)
    for fault in (
        "fifo is a FIFO, not a regular file",
        "socket is a socket, not a regular file",
        "loop cannot be read: Too many levels of symbolic links",
        "broken.jsonl cannot be read: No such file or directory",
    ):
        assert fault in said
    assert len(messages) == 4
    with pytest.raises(ValueError, match=r"broken.jsonl cannot be read: .*data\.on_error = 'skip'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "data source '/dev/zero' is a device; name a folder or a regular file"),
        ("/proc/self/mem", "/proc/self/mem cannot be read: Input/output error"),
        ("x" * 10_000, "it is too long or has a NUL"),
        ("x" * 1000, "cannot be read: File name too long; name another path"),
        ("a\0b", "it is too long or has a NUL"),
        ("gs://bucket/x", "gs://bucket/x is an address; only paths of this machine work"),
        ("~/no such folder", "data source '~/no such folder' does not exist; name a folder"),
        ("", "is empty; name a folder or a file"),
    ],
)
def test_paths_that_are_no_corpus(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert len(str(caught.value)) < 600


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "corpus").mkdir()
    put(tmp_path / "store", a__txt="a")
    os.symlink(tmp_path / "store", tmp_path / "corpus" / "linked")
    os.symlink(tmp_path / "corpus", tmp_path / "store" / "back")
    assert names(tmp_path / "corpus") == ["linked/a.txt"]


def test_a_folder_or_file_that_may_not_be_looked_at(tmp_path, monkeypatch):
    """Root may look at everything, so permission bits are no test. On Python 3.14 `Path.is_file` says False there."""
    put(tmp_path, a__txt="a", b__txt="b")
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    texts, (message,) = skipping(tmp_path)
    assert texts == ["a"] and "b.txt cannot be read: Permission denied" in message


def test_a_text_field_of_its_own(tmp_path):
    put(tmp_path, a__jsonl=b'{"content": "x", "text": "y"}\n')
    assert contents(tmp_path, source_field="content") == ["x"]
    assert contents(tmp_path) == ["y"]
    keys = [source_key(Source(path=str(tmp_path), weight=1.0, text_field=field)) for field in ("", "content")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("source", "workdir", "is_read"),
    [
        ("", "run", True),
        ("", "", True),
        ("", "deep/er/run", True),
        ("", ".run", False),
        ("", "../run", False),
        ("text", "run", False),
        ("**/*.jsonl", "deep/run", True),
        ("*/*.json*", "run", True),
        ("*.txt", "run", False),
        ("text/a.txt", "text", False),
    ],
)
def test_a_workdir_that_the_source_would_read_is_refused(tmp_path, source, workdir, is_read):
    """The run's own files became text, and the corpus another one with every step."""
    (tmp_path / "corpus" / "text").mkdir(parents=True)
    (tmp_path / "corpus" / "text" / "a.txt").write_text("a")
    named = Source(path=str(tmp_path / "corpus" / source), weight=1.0)
    if is_read:
        with pytest.raises(CorpusError, match="would read the run's own files; choose a --workdir elsewhere"):
            check_apart(named, tmp_path / "corpus" / workdir)
    else:
        check_apart(named, tmp_path / "corpus" / workdir)
