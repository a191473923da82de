"""Documents from the files that people have.

A source is the standard library of the running Python ("stdlib"), a folder, or a file. The name of a file decides how
it is read:

    *.jsonl, *.jsonl.gz, *.jsonl.zst     one document per line, under the key `data.text_field`
    *.parquet                            one document per row, in the column `data.text_field`
    *.array_record, *.arrayrecord        one document per record: token ids as little-endian int32, without BOS and EOS
    anything else                        UTF-8 text: one document per file, or about 1000 if it is large (`text_files`)

Documents come in a fixed order: files by relative name, then lines, rows or records. `split` says which of them are
trained on.
"""

import gzip
import importlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import Source
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.text_files import LARGEST_WHOLE_FILE, read_text

STDLIB = "stdlib"
NOT_STDLIB = {"site-packages", "dist-packages"}  # folders in that of the standard library which are not part of it


def list_files(source: Source) -> list[tuple[str, Path]]:
    """Return (relative name, path) of every file of `source`, sorted by name.

    Hidden files and folders, sockets and broken links are left out.

    Raises:
        ValueError: the path does not exist, cannot be listed, or holds no file.
    """
    root = Path(sysconfig.get_path("stdlib") if source.path == STDLIB else source.path)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise ValueError(f"data source {source.path!r} does not exist; name a folder, a file, or 'stdlib'")
    left_out = NOT_STDLIB if source.path == STDLIB else set()
    files = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name != "__pycache__" and name not in left_out
        ]
        paths = [Path(folder) / name for name in names if not name.startswith(".")]
        paths = [path for path in paths if path.is_file() and (source.path != STDLIB or _is_stdlib_source(path))]
        files += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not files:
        raise ValueError(
            f"data source {source.path!r} is an empty folder; put text, .jsonl, .parquet or .array_record files there"
        )
    return sorted(files)


def read_documents(source: Source, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents of `source` in their fixed order, except empty ones.

    The few files of "stdlib" that are not UTF-8 are left out too: its tests have them on purpose, and the user cannot
    repair them.

    Raises:
        ValueError: an item cannot be read and `problems` refuses it.
    """
    problems = Problems("skip") if source.path == STDLIB else problems
    for name, path in list_files(source):
        read = _reader(path)
        for document in read(name, path, text_field, problems):
            if len(document.content):
                yield document


def _is_stdlib_source(path: Path) -> bool:
    return path.suffix == ".py" and path.stat().st_size <= LARGEST_WHOLE_FILE  # the rest are generated tables


def _refuse_folder(error: OSError) -> None:
    raise ValueError(
        f"corpus folder {error.filename} cannot be listed: {error.strerror}; check its permissions"
    ) from error


def _reader(path: Path):
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _read_jsonl
    if name.endswith(".parquet"):
        return _read_parquet
    if name.endswith((".array_record", ".arrayrecord")):
        return _read_array_record
    return read_text


def _read_jsonl(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    zstandard = _extra("zstandard") if path.suffix.lower() == ".zst" else None
    broken = (OSError, EOFError, zlib.error) + ((zstandard.ZstdError,) if zstandard else ())
    number = position = 0
    try:
        with path.open("rb") as raw:
            for number, line in enumerate(_lines(path, raw, zstandard), 1):
                if not line.strip():
                    continue
                text = _json_text(line, text_field, f"{path} line {number}", problems)
                if text is not None:
                    yield Document(f"{name}:{number}", text, raw.tell() - position)
                    position = raw.tell()
    except broken as error:
        problems.report(f"{path} cannot be read after line {number}: {error}")


def _lines(path: Path, raw: io.BufferedReader, zstandard: Any) -> Iterator[bytes]:
    if zstandard:
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def _json_text(line: bytes, text_field: str, where: str, problems: Problems) -> str | None:
    try:
        record = json.loads(line)
        text = record.get(text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            text.encode()  # JSON can spell half a character ("\\ud800"), which no tokenizer takes
            return text
    except ValueError as error:  # broken JSON, bytes that are not UTF-8, half a character
        return problems.report(f"{where} is not JSON text ({error})")
    has = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
    return problems.report(f"{where} has no text under data.text_field = {text_field!r} (it has {has})")


def _read_parquet(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    parquet, arrow = _extra("pyarrow.parquet"), _extra("pyarrow")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                return problems.report(
                    f"{path} has no column data.text_field = {text_field!r} (it has {file.schema_arrow.names})"
                )
            share = path.stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(text, str):
                        yield Document(f"{name}:{row}", text, share)
                    else:
                        problems.report(f"{path} row {row} has {text!r} in {text_field!r}, not text")
    except (OSError, arrow.ArrowException) as error:
        problems.report(f"{path} cannot be read after row {row}: {error}")
    return None


def _read_array_record(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    module = _extra("array_record.python.array_record_module", "array_record")
    broken = (OSError, RuntimeError, ValueError, IndexError)  # what the C++ side raises
    try:
        reader = module.ArrayRecordReader(str(path))
        count = reader.num_records()
    except broken as error:
        return problems.report(f"{path} is not an ArrayRecord file: {error}")
    if not count:  # the reader also finds no records in a file of another kind
        return problems.report(f"{path} has no records: it is empty, cut off, or not an ArrayRecord file")
    for record in range(count):
        try:
            content = reader.read([record])[0]
        except broken as error:
            return problems.report(f"{path} cannot be read from record {record} on: {error}")
        if len(content) % 4:
            problems.report(f"{path} record {record} has {len(content)} bytes, not a whole number of int32 token ids")
        else:
            yield Document(f"{name}:{record}", np.frombuffer(content, "<i4"), path.stat().st_size // count)
    return None


def _extra(module: str, package: str | None = None) -> Any:
    """Import a module of the [data] extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        raise ValueError(
            f"reading this corpus needs {package}; install it with: pip install 'deepseek-jax[data]'"
        ) from error
