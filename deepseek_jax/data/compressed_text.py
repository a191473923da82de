"""Compressed text: the documents are those of the same file without its compression (`text_files`)."""

import io
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.data.compression import DecompressionError, open_file
from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.text_files import LARGEST_WHOLE_FILE, Block, block_documents, block_size, cut_text
from deepseek_jax.inputs import shown

READ_AT_ONCE = 1 << 20  # bytes


def read_compressed_text(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the text as one document, or a large one in blocks. Its size is known only when it was decompressed once.

    Of a damaged file the text before the fault is kept.
    """
    try:
        size, fault = _decompressed_size(path)
        if fault is not None:
            problems.report(f"{shown(path)} cannot be read after {size} bytes of text: {fault}")
        share = path.stat().st_size / max(1, size)
        with open_file(path) as (content, _):
            file = io.BufferedReader(_Start(content, size))
            if size <= LARGEST_WHOLE_FILE:
                blocks = iter([Block("", 1, file.read())])
            else:
                blocks = cut_text(file, block_size(size))
            for document in block_documents(name, path, blocks, problems):
                yield document._replace(num_file_bytes=int(document.num_file_bytes * share))
    except OSError as error:
        problems.report(f"{shown(path)} cannot be read: {error.strerror}")


class _Start(io.RawIOBase):
    """The first `size` bytes of a stream."""

    def __init__(self, stream: io.RawIOBase, size: int):
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._stream.readinto(memoryview(buffer)[: self._left]) if self._left else 0
        self._left -= count
        return count


def _decompressed_size(path: Path) -> tuple[int, DecompressionError | None]:
    """Return how many bytes can be decompressed, and what ends them too early."""
    size = 0
    with open_file(path) as (content, _):
        try:
            while chunk := content.read(READ_AT_ONCE):
                size += len(chunk)
        except DecompressionError as error:
            return size, error
    return size, None
