"""Tables with a column of texts: Parquet, and Arrow as `datasets` saves it. One document per row."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_jax.data.documents import Document, Problems, is_too_long, other_field, too_long
from deepseek_jax.data.extras import optional_library
from deepseek_jax.inputs import shown

ROWS_AT_ONCE = 1024


class _NoColumn(Exception):
    """The table has no column of that name."""


def read_parquet(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield a document per row of a Parquet file."""
    parquet = optional_library("pyarrow.parquet")

    @contextlib.contextmanager
    def columns(raw: BinaryIO) -> Iterator[tuple[int, Iterable]]:
        with parquet.ParquetFile(raw) as file:
            _check_column(text_field, file.schema_arrow)
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field])
            yield file.metadata.num_rows, (batch.column(0) for batch in batches)

    yield from _read_columns(name, path, text_field, problems, columns)


def read_arrow(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield a document per row of an Arrow file: a stream, as `datasets` writes it, or the form with a footer."""

    @contextlib.contextmanager
    def columns(raw: BinaryIO) -> Iterator[tuple[int, Iterable]]:
        with open_arrow(raw) as (schema, batches):
            _check_column(text_field, schema)
            index = schema.names.index(text_field)
            yield 0, (batch.column(index) for batch in batches)

    yield from _read_columns(name, path, text_field, problems, columns)


@contextlib.contextmanager
def open_arrow(raw: BinaryIO) -> Iterator[tuple[Any, Iterable]]:
    """Open an Arrow file, a stream or the form with a footer; yield its schema and its batches of rows."""
    arrow = optional_library("pyarrow")
    has_footer = raw.read(6) == b"ARROW1"
    raw.seek(0)
    with arrow.ipc.open_file(raw) if has_footer else arrow.ipc.open_stream(raw) as reader:
        yield reader.schema, map(reader.get_batch, range(reader.num_record_batches)) if has_footer else reader


def _read_columns(name: str, path: Path, text_field: str, problems: Problems, columns) -> Iterator[Document]:
    """Yield the documents of the columns that `columns` opens."""
    arrow = optional_library("pyarrow")
    row = 0
    try:
        # pyarrow opens no path whose name is not UTF-8, but reads what is open
        with path.open("rb") as raw, columns(raw) as (num_rows, batches):
            size, position = path.stat().st_size, 0
            for column in batches:
                for text in _texts(arrow, column):
                    row += 1
                    if isinstance(text, str) and is_too_long(text):
                        problems.report(too_long(f"{shown(path)} row {row}"))
                    elif isinstance(text, str):
                        share = size // num_rows if num_rows else raw.tell() - position
                        position = raw.tell()
                        yield Document(f"{name}:{row}", text, share)
                    else:
                        problems.report(f"{shown(path)} row {row} has {shown(repr(text))} in {text_field!r}, not text")
    except _NoColumn as error:
        names, remedy = error.args
        problems.report(f"{shown(path)} has no column text_field = {text_field!r} (it has {shown(str(names))}){remedy}")
    except MemoryError:
        problems.report(f"{shown(path)} is damaged after row {row}, or needs more memory than there is")
    except (OSError, arrow.ArrowException) as error:
        problems.report(f"{shown(path)} cannot be read after row {row}: {error}")


def _check_column(text_field: str, schema: Any) -> None:
    if text_field not in schema.names:
        texts = {field.name: "" for field in schema if "string" in str(field.type)}
        raise _NoColumn(schema.names, other_field(texts, text_field))


def _texts(arrow: Any, column: Any) -> Iterator[Any]:
    """Yield the values of a column as Python objects; a text that is not UTF-8 stays bytes."""
    kind = column.type
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        # A damaged offset would be read outside the file. As bytes: a text that is not UTF-8 is only its row.
        as_bytes = column.cast(arrow.binary() if arrow.types.is_string(kind) else arrow.large_binary())
        as_bytes.validate(full=True)
        for value in as_bytes:
            content = value.as_py()
            try:
                yield content if content is None else content.decode("utf-8")
            except UnicodeDecodeError:
                yield content
    else:
        column.validate(full=True)
        yield from column.to_pylist()
