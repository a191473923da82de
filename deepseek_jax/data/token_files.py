"""The files of a token cache: ids of documents, written once and mapped, and the checksums that tell damage.

    <source>-<split>.ids.bin      the ids of all documents
    <source>-<split>.ends.npy     where each document ends in it
    <source>-<split>.bytes.npy    how many UTF-8 bytes each document has
    about.json                    the rest, with a checksum of every `CHUNK_BYTES` of every file and one of itself

Opening a cache checks about.json, the size of every file, and `MOST_CHUNKS` chunks spread evenly over all files: every
byte of a cache of up to 1 GiB, a part of a larger one. That takes about a second at most.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json

ABOUT = "about.json"
CHUNK_BYTES = 4 << 20
MOST_CHUNKS = 256


class Documents:
    """The documents of one source and split, mapped from disk: a sequence of arrays of ids without BOS and EOS."""

    def __init__(self, stem: Path, dtype: np.dtype):
        """Open the three files of `stem`."""
        self.ends = np.load(f"{stem}.ends.npy", mmap_mode="r")
        self.num_bytes = np.load(f"{stem}.bytes.npy", mmap_mode="r")
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0
        # an empty file cannot be mapped
        self._ids = np.memmap(f"{stem}.ids.bin", dtype, "r") if self.num_tokens else np.zeros(0, dtype)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids of one document, int32."""
        start = int(self.ends[index - 1]) if index else 0
        return np.asarray(self._ids[start : int(self.ends[index])], np.int32)


class Writer(contextlib.AbstractContextManager):
    """Writes the files that `Documents` opens; they are complete when the context ends without an error."""

    def __init__(self, stem: Path, dtype: np.dtype):
        """Write ids as `dtype` into the three files of `stem`."""
        self._stem, self._dtype = stem, dtype
        self._lengths: list[int] = []
        self._num_bytes: list[int] = []

    def __enter__(self):
        self._file = open(f"{self._stem}.ids.bin", "wb")
        return self

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append a document of so many UTF-8 bytes."""
        self._file.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(len(ids))
        self._num_bytes.append(num_bytes)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._lengths)

    def __exit__(self, kind, *error):
        if kind is not None:  # the folder is removed; a second error would hide the first
            with contextlib.suppress(OSError):
                self._file.close()
            return
        self._file.close()
        np.save(f"{self._stem}.ends.npy", np.cumsum(self._lengths, dtype=np.int64))
        np.save(f"{self._stem}.bytes.npy", np.array(self._num_bytes, np.int64))


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write about.json of a folder whose other files are complete."""
    files = {path.name: _checksums(path) for path in sorted(folder.iterdir())}
    about = about | {"files": files}
    write_atomically(folder / ABOUT, json.dumps(about | {"check": _check(about)}, indent=1))


def open_about(folder: Path) -> dict[str, Any]:
    """Return the content of about.json after the checks above.

    Raises:
        ValueError: a file is missing or is not what was written.
    """
    about = read_json(folder / ABOUT)
    check = about.pop("check", None)
    if check != _check(about):
        raise ValueError(f"{folder / ABOUT} is not what was written")
    for name, (size, _) in about["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or has not its {size} bytes")
    chunks = [(name, i) for name, (_, sums) in about["files"].items() for i in range(len(sums))]
    for i in np.unique(np.linspace(0, len(chunks) - 1, min(len(chunks), MOST_CHUNKS)).astype(int)):
        name, number = chunks[i]
        with (folder / name).open("rb") as file:
            file.seek(number * CHUNK_BYTES)
            if zlib.crc32(file.read(CHUNK_BYTES)) != about["files"][name][1][number]:
                raise ValueError(f"{folder / name} is not what was written (near byte {number * CHUNK_BYTES})")
    return about


def _checksums(path: Path) -> tuple[int, list[int]]:
    with path.open("rb") as file:
        return path.stat().st_size, [zlib.crc32(chunk) for chunk in _chunks(file)]


def _chunks(file) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _check(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
