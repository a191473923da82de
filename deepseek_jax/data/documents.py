"""What every reader yields, a `Document`, and what it does with an item that it cannot read: `Problems`."""

import hashlib
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.inputs import printable, shown

LONGEST_TEXT = 1 << 28  # bytes: 256 MiB; the largest documents of public corpora have a tenth of it
KEPT_MESSAGES = 20  # about skipped items; all items are counted


class CorpusError(ValueError):
    """A corpus that cannot be read, or an item of it that may not be left out."""


class Document(NamedTuple):
    """A text, or its token ids."""

    name: str  # relative file name, with the line, row or record
    content: str | np.ndarray
    num_file_bytes: int  # its share of the file, for a progress bar

    def digest(self) -> bytes:
        """SHA-256 of the content."""
        content = self.content
        return hashlib.sha256(
            content.encode() if isinstance(content, str) else content.astype("<i4").tobytes()
        ).digest()


class Problems:
    """Unreadable items: they are refused (CorpusError), or left out and counted."""

    def __init__(self, on_error: str):
        """`on_error` is "refuse" or "skip"."""
        self._on_error = on_error
        self.count = 0
        self.messages: list[str] = []

    def report(self, message: str) -> None:
        """Raise CorpusError with `message`, or note that the item is skipped."""
        message = printable(message)
        if self._on_error == "refuse":
            raise CorpusError(f"{message}; repair or remove it, or leave such items out with data.on_error = 'skip'")
        self.count += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)


def other_field(record: Mapping[str, Any], text_field: str) -> str:
    """Return the end of a message about a record without `text_field`: the flag that takes its longest text instead.

    It is empty if the record has the field, or no text at all.
    """
    texts = {key: len(value) for key, value in record.items() if isinstance(value, str)}
    if text_field in record or not texts:
        return ""
    longest = max(texts, key=lambda key: texts[key])
    return f": give {shown(shlex.quote(f'--config.data.text_field={longest}'))}"


def is_too_long(text: str) -> bool:
    """Return whether a text has more than `LONGEST_TEXT` bytes of UTF-8; readers report it with `too_long`."""
    return len(text) > LONGEST_TEXT or (4 * len(text) > LONGEST_TEXT and len(text.encode()) > LONGEST_TEXT)


def too_long(where: str) -> str:
    """Return the report of an item that is longer than `LONGEST_TEXT`."""
    return f"{where} is longer than {LONGEST_TEXT} bytes; cut such a document"
