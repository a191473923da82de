"""Read tensors in chunks, ahead of their use, with threads and a fixed number of buffers.

A chunk is some rows of one tensor, so a host never holds more than a few MB of the largest tensor, and several threads
can work on it. Files are not mapped: the pages of a mapping come one fault at a time and stay charged to the process.
They are read with preadv, into buffers that are used again and again, because touching fresh memory costs as much as
copying a file out of the kernel's cache.
"""

import collections
import contextlib
import math
import os
import queue
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax.safetensors.header import DTYPES, REMEDY, Entry

CHUNK_BYTES = 2**24  # a matrix of an expert of DeepSeek-V3 is one chunk
NUM_BUFFERS = 16
NUM_THREADS = 4

_ALIGNMENT = 64  # bytes; with it JAX on a CPU takes an array without copying it
_READ_BYTES = 2**24  # per system call; the kernel would stop at 2 GiB


class Chunk(NamedTuple):
    """Some rows of a tensor, or a whole scalar.

    Attributes:
        name: of the tensor.
        first_row: of `values` in the tensor.
        values: the rows. They are valid until `release` is called.
        release: gives the buffer back; call it when the values have been used.
    """

    name: str
    first_row: int
    values: np.ndarray
    release: Callable[[], None]


def read_chunks(
    entries: Sequence[Entry], chunk_bytes: int, num_buffers: int = NUM_BUFFERS, num_threads: int = NUM_THREADS
) -> Generator[Chunk, None, None]:
    """Yield every row of the tensors, in order.

    Args:
        entries: the tensors to read.
        chunk_bytes: size of the largest chunk, unless one row is larger.
        num_buffers: how many chunks may be being read, waiting to be taken, or in use. A caller that keeps all of them
            without a release waits for ever.
        num_threads: how many threads read. They end when the iterator is closed.

    Raises:
        ValueError: an argument is less than 1, at once; or a file has become shorter, where its chunk would be taken.
        OSError: a file cannot be read, where its chunk would be taken.
    """
    if min(chunk_bytes, num_buffers, num_threads) < 1:
        raise ValueError(
            f"chunk_bytes ({chunk_bytes}), num_buffers ({num_buffers}) and num_threads ({num_threads}) must be at"
            " least 1"
        )
    return _read_ahead(entries, chunk_bytes, num_buffers, num_threads)


def row_ranges(entry: Entry, chunk_bytes: int) -> list[range]:
    """Return the rows of each chunk: equally many, if chunks are then at least half as large as they may be."""
    rows = entry.shape[0] if entry.shape else 1
    limit = max(1, min(rows, chunk_bytes * rows // max(entry.num_bytes, 1)))
    size = next((n for n in range(limit, limit // 2, -1) if rows % n == 0), limit)
    return [range(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def read(entry: Entry) -> np.ndarray:
    """Return a tensor in memory of its own."""
    buffer = aligned(entry.num_bytes)
    with Descriptor(entry.file) as descriptor:
        descriptor.read(entry, 0, buffer)
    return _typed(buffer, entry, entry.shape)


def aligned(num_bytes: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """Return `num_bytes` bytes where JAX on a CPU can use them without copying them."""
    memory = make(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


class Descriptor(contextlib.AbstractContextManager):
    """A file open for reading. It is closed at the latest when no job that reads it is left."""

    def __init__(self, file: Path):
        self._number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self, *_) -> None:
        """Close the file, if it is open."""
        number, self._number = getattr(self, "_number", -1), -1
        if number >= 0:
            os.close(number)

    __exit__ = __del__ = close

    def read(self, entry: Entry, start: int, into: np.ndarray) -> None:
        """Fill `into` with the bytes of the tensor from its byte `start` on.

        Raises:
            ValueError: the file ends before that; OSError: it cannot be read. Both name the tensor and the file.
        """
        done = 0
        while done < into.size:
            try:
                count = os.preadv(self._number, [into[done : done + _READ_BYTES]], entry.offset + start + done)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} while reading {entry.name}", str(entry.file)) from error
            if count == 0:
                raise ValueError(
                    f"{entry.file} ends within {entry.name}; it was cut after its header was read: {REMEDY}"
                )
            done += count


def _typed(buffer: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    dtype = DTYPES[entry.dtype]
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _read_ahead(
    entries: Sequence[Entry], chunk_bytes: int, num_buffers: int, num_threads: int
) -> Generator[Chunk, None, None]:
    free: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
    for _ in range(num_buffers):
        free.put(None)  # its memory is made when it is first used
    reading: collections.deque[Future[Chunk]] = collections.deque()
    opened = weakref.WeakSet[Descriptor]()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="chunks")

    def fill(descriptor: Descriptor, entry: Entry, rows: range, buffer: np.ndarray | None) -> Chunk:
        row_bytes = entry.num_bytes // entry.shape[0] if entry.shape and entry.shape[0] else entry.num_bytes
        size = len(rows) * row_bytes
        if buffer is None or buffer.size < size:
            buffer = aligned(size if size > chunk_bytes else chunk_bytes)
        descriptor.read(entry, rows.start * row_bytes, buffer[:size])
        shape = (len(rows), *entry.shape[1:]) if entry.shape else ()
        return Chunk(entry.name, rows.start, _typed(buffer, entry, shape), lambda: free.put(buffer))

    try:
        file, descriptor = None, None
        for entry in entries:
            if entry.file != file:
                file, descriptor = entry.file, Descriptor(entry.file)
                opened.add(descriptor)
            for rows in row_ranges(entry, chunk_bytes):
                while reading and (free.empty() or reading[0].done()):
                    yield reading.popleft().result()
                reading.append(pool.submit(fill, descriptor, entry, rows, free.get()))
        while reading:
            yield reading.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in opened:  # the traceback of an exception may hold some
            descriptor.close()
