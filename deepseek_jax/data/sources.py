"""Documents from the files that people have.

A source is the standard library of the running Python ("stdlib"), a folder, a file, a pattern, or a data set by name
("hf:..."): docs/data.md lists them all. The name of a file decides how it is read:

    *.jsonl, *.ndjson                    one document per line, under the source's text field
    *.json                               the same, or one list of documents: the content decides
    *.parquet, *.arrow                   one document per row, in the column of that name
    *.array_record, *.arrayrecord        one document per record: token ids as little-endian int32, without BOS and EOS
    anything else                        UTF-8 text: one document per file, or about 1000 if it is large (`text_files`)

JSON and .txt may be compressed: *.gz, *.bz2, *.xz, *.zst. Other compressed or binary files are refused by name.

Documents come in a fixed order: files by relative name, then lines, rows or records. `split` says which of them are
trained on.
"""

from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import Source
from deepseek_jax.data import hub
from deepseek_jax.data.array_records import read_array_record
from deepseek_jax.data.columns import read_arrow, read_parquet
from deepseek_jax.data.compressed_text import read_compressed_text
from deepseek_jax.data.corpus_files import STDLIB, File, files_to_read, find_files
from deepseek_jax.data.documents import CorpusError, Document, Problems
from deepseek_jax.data.extras import optional_library
from deepseek_jax.data.formats import format_of
from deepseek_jax.data.json_files import read_json, read_json_lines
from deepseek_jax.data.text_files import read_text
from deepseek_jax.inputs import shown

READERS = {
    "json lines": read_json_lines,
    "json": read_json,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "array_record": read_array_record,
}
LIBRARIES = {"parquet": ("pyarrow",), "arrow": ("pyarrow",), "array_record": ("array_record",)}


def check_source(source: Source) -> None:
    """Refuse a source before anything of it is read: that is not there, or needs a library that is not installed.

    Raises:
        CorpusError: as `find_files`, or with the remedy of the missing library.
    """
    if source.path.startswith(hub.PREFIX):
        hub.check_library(source.path)
        return
    for name in sorted({library for file in find_files(source).files for library in _libraries(file)}):
        optional_library(name)


def num_bytes(source: Source) -> int:
    """Return the bytes of the files of `source`; 0 for a data set by name.

    Raises:
        CorpusError: as `find_files`.
    """
    return 0 if source.path.startswith(hub.PREFIX) else sum(file.size for file in find_files(source).files)


def source_key(source: Source) -> Any:
    """Return what the documents of `source` depend on, for JSON: names, sizes and times of its files, or a commit.

    Raises:
        CorpusError: as `find_files`, or the Hub does not tell the commit.
    """
    if source.path.startswith(hub.PREFIX):
        return [source.path, source.text_field, hub.revision_key(source.path)]
    files = [(file.name, file.size, file.changed) for file in find_files(source).files]
    return [source.path == STDLIB, source.text_field, files]


def read_documents(source: Source, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents of `source` in their fixed order, except empty ones.

    `text_field` is for sources that name none of their own. The few files of "stdlib" that are not UTF-8 are left out
    too: its tests have them on purpose, and the user cannot repair them.

    Raises:
        CorpusError: an item cannot be read and `problems` refuses it, or the whole source cannot be read.
    """
    text_field = source.text_field or text_field
    problems = Problems("skip") if source.path == STDLIB else problems
    for document in _read_source(source, text_field, problems):
        if len(document.content):
            yield document


def _libraries(file: File) -> tuple[str, ...]:
    return LIBRARIES.get(format_of(file.name).kind, ()) + (("zstandard",) if file.name.lower().endswith(".zst") else ())


def _read_source(source: Source, text_field: str, problems: Problems) -> Iterator[Document]:
    if source.path.startswith(hub.PREFIX):
        yield from hub.read_hub(source.path, text_field, problems)
        return
    for file in files_to_read(source, problems):
        yield from _read_file(file, text_field, problems)


def _read_file(file: File, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents of a file. An error of a class that its reader does not know names the file, too."""
    form = format_of(file.name)
    if form.fault:
        if file.size:  # an empty file holds no document, whatever its name
            problems.report(f"{shown(file.path)} {form.fault}")
        return
    read = READERS.get(form.kind) or (read_compressed_text if form.compressed else read_text)
    try:
        yield from read(file.name, file.path, text_field, problems)
    except (CorpusError, MemoryError):
        raise
    except Exception as error:
        problems.report(f"{shown(file.path)} cannot be read: {type(error).__name__}: {error}")
