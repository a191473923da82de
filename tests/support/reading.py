"""Reads a source as the tests of the readers do."""

import json
from pathlib import Path

from deepseek_jax.config import Source
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.sources import read_documents

TEXTS = ["one\n", "zwei é", "三"]


def read(
    path: Path | str, on_error: str = "refuse", text_field: str = "text", source_field: str = ""
) -> tuple[list[Document], Problems]:
    problems = Problems(on_error)
    source = Source(path=str(path), weight=1.0, text_field=source_field)
    return list(read_documents(source, text_field, problems)), problems


def contents(path: Path | str, **settings) -> list:
    return [document.content for document in read(path, **settings)[0]]


def skipping(path: Path | str) -> tuple[list, list[str]]:
    """Return the contents of the documents that are left, and what was said about the others."""
    documents, problems = read(path, on_error="skip")
    assert problems.count == len(problems.messages)
    return [document.content for document in documents], problems.messages


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "x"}).encode() + b"\n" for text in texts)
