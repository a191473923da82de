"""Whole records from the files that people have: JSON objects and rows of tables, such as conversations.

`sources` gives the text under one field; this gives every field, as nested lists and dicts. Objects of a table have no
empty fields: a table does not say which of them the writer left out. The same files
are read, in the same order, and an item that cannot be read is refused or skipped in the same way:

    *.jsonl, *.ndjson       one record per line        compressed too: *.gz, *.bz2, *.xz, *.zst
    *.json                  the same, or one list of records: the content decides
    *.parquet, *.arrow      one record per row
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import Source
from deepseek_jax.data import hub
from deepseek_jax.data.columns import ROWS_AT_ONCE, open_arrow
from deepseek_jax.data.corpus_files import files_to_read
from deepseek_jax.data.documents import CorpusError, Problems
from deepseek_jax.data.extras import optional_library
from deepseek_jax.data.formats import format_of
from deepseek_jax.data.json_files import line_values, whole_value
from deepseek_jax.inputs import shown


class Record(NamedTuple):
    """A record, and where it is for messages: "chats.jsonl line 3"."""

    where: str
    value: dict[str, Any]


def read_records(source: Source, problems: Problems) -> Iterator[Record]:
    """Yield the records of a source in their fixed order.

    Raises:
        CorpusError: the source does not exist or has files without records, or an item cannot be read and `problems`
            refuses it.
    """
    if source.path.startswith(hub.PREFIX):
        raise CorpusError(
            f"data source {shown(source.path)!r} is a data set by name; download its .parquet or .jsonl files and name"
            " their folder"
        )
    for file in files_to_read(source, problems):
        form = format_of(file.name)
        read = READERS.get(form.kind)
        if form.fault or read is None:
            fault = form.fault or "holds text without fields; make .jsonl or .parquet of it"
            problems.report(f"{shown(file.path)} {fault}")
            continue
        yield from _sound(read(file.path, problems), problems)


def _sound(records: Iterator[Record], problems: Problems) -> Iterator[Record]:
    """Yield the records that are objects of whole characters: JSON can spell half of one, which no tokenizer takes."""
    for record in records:
        if not isinstance(record.value, dict):
            problems.report(f"{record.where} is a {type(record.value).__name__}; make it an object with named fields")
            continue
        try:
            json.dumps(record.value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            problems.report(f"{record.where} is not text ({error})")
        except RecursionError:
            problems.report(f"{record.where} is nested too deeply")
        else:
            yield record


def _read_json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    for number, value, _ in line_values(path, problems):
        yield Record(f"{shown(path)} line {number}", value)


def _read_json(path: Path, problems: Problems) -> Iterator[Record]:
    value = whole_value(path)
    if value is None:
        yield from _read_json_lines(path, problems)
    elif isinstance(value, str):
        problems.report(f"{shown(path)} {value}")
    elif isinstance(value, dict):
        yield Record(shown(path), value)
    else:
        for number, item in enumerate(value, 1):
            yield Record(f"{shown(path)} item {number}", item)


def _read_parquet(path: Path, problems: Problems) -> Iterator[Record]:
    parquet = optional_library("pyarrow.parquet")
    with path.open("rb") as raw, _damage_named(path, problems), parquet.ParquetFile(raw) as file:
        yield from _rows(path, file.iter_batches(batch_size=ROWS_AT_ONCE))


def _read_arrow(path: Path, problems: Problems) -> Iterator[Record]:
    with path.open("rb") as raw, _damage_named(path, problems), open_arrow(raw) as (_, batches):
        yield from _rows(path, batches)


def _rows(path: Path, batches: Any) -> Iterator[Record]:
    row = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged offset would be read outside the file
        for value in batch.to_pylist():
            row += 1
            yield Record(f"{shown(path)} row {row}", {name: _given(item) for name, item in value.items()})


def _given(value: Any) -> Any:
    """Return a value without the empty fields that a table gives to each of a column's objects if any has them.

    In a table the parameters of one tool would be empty parameters of all others, and be in their prompts.
    """
    match value:
        case dict():
            return {key: _given(item) for key, item in value.items() if item is not None}
        case list():
            return [_given(item) for item in value]
    return value


@contextlib.contextmanager
def _damage_named(path: Path, problems: Problems) -> Iterator[None]:
    """Report what pyarrow says of a damaged file, with its name."""
    arrow = optional_library("pyarrow")
    try:
        yield
    except (OSError, MemoryError, UnicodeDecodeError, arrow.ArrowException) as error:
        problems.report(f"{shown(path)} cannot be read: {shown(str(error))}")


READERS = {"json lines": _read_json_lines, "json": _read_json, "parquet": _read_parquet, "arrow": _read_arrow}
