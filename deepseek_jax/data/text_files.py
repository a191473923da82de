"""Text files: a file is one document; a large one is cut at line ends into about a thousand.

A cut depends on the file alone, not on its neighbours. A line that is longer than two blocks (text8 is one line of
100 MB) is cut too: after the last space of a block, or between two characters if there is no space.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.data.documents import Document, Problems

# In bytes. A larger file is cut; as one document it could be most of a 2% held-out split.
LARGEST_WHOLE_FILE = 200_000
BLOCKS_PER_FILE = 1000  # a large text is cut into about so many documents, so that a hash can split it
SHORTEST_BLOCK = 4096  # bytes: a document shorter than a context teaches little
LARGEST_BLOCK = 2**19  # bytes: a document is one call of the tokenizer, which takes 0.1 to 0.2 GB of memory per MB


class Block(NamedTuple):
    """A part of a text."""

    place: str  # the number of its first line from 1, with "+<bytes>" if it begins inside that line
    line: int
    content: bytes


def read_text(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the file as one document, or a large one in blocks.

    A file that does not begin as UTF-8 is left out whole; further on, a block that is not UTF-8 is.
    """
    try:
        with path.open("rb") as file:
            start = file.read(LARGEST_WHOLE_FILE + 1)
            if len(start) <= LARGEST_WHOLE_FILE:
                blocks = iter([Block("", 1, start)] if start else [])
            else:
                file.seek(0)
                blocks = cut_text(file, block_size(path.stat().st_size))
            yield from block_documents(name, path, blocks, problems)
    except OSError as error:
        problems.report(f"{path} cannot be read: {error.strerror}")


def block_documents(name: str, path: Path, blocks: Iterable[Block], problems: Problems) -> Iterator[Document]:
    """Yield the blocks of a file as documents. Without a first block that is UTF-8 the others are not tried."""
    for block in blocks:
        try:
            text = block.content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = block.line + block.content.count(b"\n", 0, error.start)
            problems.report(f"{path} is not UTF-8 text (line {line})")
            if block.place in ("", "1"):
                return
            continue
        yield Document(f"{name}:{block.place}" if block.place else name, text, len(block.content))


def block_size(num_bytes: int) -> int:
    """Return the size in bytes of the blocks that a text of `num_bytes` is cut into."""
    return min(max(SHORTEST_BLOCK, num_bytes // BLOCKS_PER_FILE), LARGEST_BLOCK)


def cut_text(file: io.BufferedIOBase, size: int) -> Iterator[Block]:
    """Yield UTF-8 text in blocks: whole lines until they have more than `size` bytes, or a piece of a long line.

    No block has more than 3 * `size` bytes.
    """
    parts, place, first_line, num_bytes = [], "1", 1, 0
    line, offset = 1, 0
    for piece in _pieces(file, size):
        if not parts:
            place, first_line = f"{line}+{offset}" if offset else str(line), line
        parts.append(piece)
        num_bytes += len(piece)
        ends = piece.endswith(b"\n")
        line, offset = (line + 1, 0) if ends else (line, offset + len(piece))
        if num_bytes > size or not ends:
            yield Block(place, first_line, b"".join(parts))
            parts, num_bytes = [], 0
    if parts:
        yield Block(place, first_line, b"".join(parts))


def _pieces(file: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    """Yield the lines; one of more than 2 * `size` bytes in pieces of at most `size`, and a longer last one."""
    line = b""
    while True:
        if not line.endswith(b"\n"):
            line += file.readline(2 * size + 1 - len(line))
        if not line:
            return
        if len(line) <= 2 * size:  # complete
            yield line
            line = b""
            continue
        end = line.rfind(b" ", size // 2, size) + 1 or _character_start(line, size)
        yield line[:end]
        line = line[end:]


def _character_start(text: bytes, index: int) -> int:
    """Return the last place up to `index` where a UTF-8 character begins."""
    return next((i for i in range(index, index - 4, -1) if text[i] & 0xC0 != 0x80), index)
