"""JSON files: one document per line, or per item of one array.

`.jsonl` and `.ndjson` hold lines. `.json` is a name for both forms, so the content decides: if its first line is a
whole JSON value and not a list, every line is a document; else the file is one value, a list of documents or a single
one.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.data.compression import DecompressionError, open_file
from deepseek_jax.data.documents import LONGEST_TEXT, Document, Problems, other_field
from deepseek_jax.inputs import shown

READ_AT_ONCE = 1 << 20  # bytes
LONGEST_LINE = LONGEST_TEXT  # bytes
LONGEST_SKIP = 1 << 30  # bytes of one line that are read only to find its end; beyond them the file is given up
LARGEST_VALUE = 1 << 28  # bytes of a .json file that is one value and must be parsed whole


class LongLineError(Exception):
    """No line end in `LONGEST_LINE + LONGEST_SKIP` bytes."""


def read_json_lines(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield a document per line, from a file that may be compressed."""
    position = 0
    for number, value, end in line_values(path, problems):
        text = _text_of(value, text_field, f"{shown(path)} line {number}", problems)
        if text is not None:
            before, position = position, end
            yield Document(f"{name}:{number}", text, position - before)


def line_values(path: Path, problems: Problems) -> Iterator[tuple[int, Any, int]]:
    """Yield the number of each line that is a JSON value, the value, and how many bytes of the file were read."""
    number, file = 0, shown(path)
    try:
        with open_file(path) as (content, raw):
            for number, line in enumerate(lines(content.read), 1):
                if line is None:
                    problems.report(f"{file} line {number} is longer than {LONGEST_LINE} bytes; cut such a document")
                elif line.strip():
                    try:
                        value = json.loads(line)
                    except ValueError as error:  # broken JSON, bytes that are not UTF-8
                        problems.report(f"{file} line {number} is not JSON text ({error})")
                    except RecursionError:
                        problems.report(f"{file} line {number} is JSON that is nested too deeply")
                    else:
                        yield number, value, raw.tell()
    except LongLineError:
        problems.report(
            f"{file} line {number + 1} is longer than {LONGEST_LINE + LONGEST_SKIP} bytes; it and what follows"
            " it cannot be read"
        )
    except DecompressionError as error:
        problems.report(f"{file} cannot be read after line {number}: {error}")
    except OSError as error:
        problems.report(f"{file} cannot be read after line {number}: {error.strerror}")


def read_json(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents of a `.json` file that may be compressed, in whichever form it has them."""
    value = whole_value(path)
    if value is None:
        yield from read_json_lines(name, path, text_field, problems)
        return
    if isinstance(value, str):
        problems.report(f"{shown(path)} {value}")
        return
    records = value if isinstance(value, list) else [value]
    share = path.stat().st_size // max(1, len(records))
    for number, record in enumerate(records, 1):
        where = f"{shown(path)} item {number}" if isinstance(value, list) else shown(path)
        text = _text_of(record, text_field, where, problems)
        if text is not None:
            yield Document(f"{name}:{number}", text, share)


def lines(read: Callable[[int], bytes]) -> Iterator[bytes | None]:
    """Yield the lines of a stream without their ends, and None for one of more than `LONGEST_LINE` bytes.

    What came before a fault is yielded before `read`'s exception is raised.

    Raises:
        LongLineError: a line goes on for `LONGEST_SKIP` more bytes.
    """
    parts: list[bytes] = []  # of the line whose end was not read yet
    length, fault = 0, None
    while fault is None:
        try:
            chunk = read(READ_AT_ONCE)
        except (DecompressionError, OSError) as error:
            chunk, fault = b"", error
        if not chunk:
            break
        first, *others = chunk.split(b"\n")
        length += len(first)
        if length <= LONGEST_LINE:
            parts.append(first)
        elif length > LONGEST_LINE + LONGEST_SKIP:
            raise LongLineError
        else:
            parts.clear()
        if others:
            yield b"".join(parts) if length <= LONGEST_LINE else None
            yield from others[:-1]
            parts, length = [others[-1]], len(others[-1])
    if length and fault is None:
        yield b"".join(parts) if length <= LONGEST_LINE else None
    if fault is not None:
        # The last line may be whole (bytes after the last stream) or a part. A part of a JSON object is no JSON.
        if length <= LONGEST_LINE and _is_json(b"".join(parts)):
            yield b"".join(parts)
        raise fault


def whole_value(path: Path) -> list | dict | str | None:
    """Return the one value of a `.json` file, None if its lines are values, or a text that says what is wrong."""
    try:
        with open_file(path) as (content, _):
            first, second = itertools.islice(itertools.chain(filter(_is_filled, lines(content.read)), (b"", b"")), 2)
        if first is None or (_is_json(first) and not first.lstrip().startswith(b"[")):
            return None
        with open_file(path) as (content, _):
            text = b"".join(_chunks(content.read, LARGEST_VALUE))
    except (DecompressionError, OSError, LongLineError):
        return None  # reading the lines meets it too, and says where
    if len(text) > LARGEST_VALUE:
        return (
            f"is one JSON value of more than {LARGEST_VALUE} bytes; write one document per line: jq -c '.[]' old.json >"
            " new.jsonl"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None if _is_json(second or b"") else f"has neither one JSON value per line nor one in all ({error})"
    return value if isinstance(value, list | dict) else None


def _chunks(read: Callable[[int], bytes], limit: int) -> Iterator[bytes]:
    """Yield what `read` gives, at most one chunk beyond `limit` bytes."""
    length = 0
    while length <= limit and (chunk := read(READ_AT_ONCE)):
        length += len(chunk)
        yield chunk


def _is_filled(line: bytes | None) -> bool:
    return line is None or bool(line.strip())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _text_of(record, text_field: str, where: str, problems: Problems) -> str | None:
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        try:
            text.encode()  # JSON can spell half a character ("\\ud800"), which no tokenizer takes
        except UnicodeEncodeError as error:
            return problems.report(f"{where} is not JSON text ({error})")
        return text
    has = f"keys {shown(str(sorted(record)))}" if isinstance(record, dict) else f"a {type(record).__name__}"
    remedy = other_field(record, text_field) if isinstance(record, dict) else ""
    return problems.report(f"{where} has no text under text_field = {text_field!r} (it has {has}){remedy}")
