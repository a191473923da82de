"""Text files: one document per file of a folder; a single file is cut at line ends."""

from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.data.documents import Document, Problems

BLOCKS_PER_FILE = 1000  # a single text file is cut into about so many documents, so that a hash can split it
SHORTEST_BLOCK = 4096  # bytes: a document shorter than a context teaches little


def read_text(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the whole file as one document."""
    try:
        content = path.read_bytes()
        yield Document(name, content.decode("utf-8"), len(content))
    except UnicodeDecodeError as error:
        problems.report(f"{path} is not UTF-8 text (byte {error.start})")
    except OSError as error:
        problems.report(f"{path} cannot be read: {error.strerror}")


def read_blocks(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Cut one text file into documents at line ends."""
    try:
        size = max(SHORTEST_BLOCK, path.stat().st_size // BLOCKS_PER_FILE)
        with path.open("rb") as file:
            first_line = 1
            while lines := file.readlines(size):
                block = b"".join(lines)
                try:
                    yield Document(f"{name}:{first_line}", block.decode("utf-8"), len(block))
                except UnicodeDecodeError as error:
                    problems.report(
                        f"{path} is not UTF-8 text (line {first_line + block.count(b'\n', 0, error.start)})"
                    )
                first_line += len(lines)
    except OSError as error:
        problems.report(f"{path} cannot be read: {error.strerror}")
