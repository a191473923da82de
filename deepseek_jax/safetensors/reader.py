"""Read tensors in pieces, ahead of their use, with threads and a fixed number of buffers.

A piece is some rows of one tensor: a host holds a few MB of the largest, and several threads work on it. Files are read
with preadv into buffers that are used again and again, not mapped: pages of a mapping come one fault at a time and stay
charged to the process, and to touch fresh memory costs as much as to copy a file out of the kernel's cache.
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

from deepseek_jax.safetensors.header import AGAIN, DTYPES, Entry

PIECE_BYTES = 2**24  # the experts of DeepSeek-V3 are one piece each
NUM_BUFFERS = 16
NUM_THREADS = 4

_ALIGNMENT = 64  # bytes; what JAX on a CPU needs to take an array without copying it
_READ_BYTES = 2**24  # of one system call; the kernel would stop at 2 GiB


class Piece(NamedTuple):
    """`values` are rows of a tensor, from `first_row` on; all of a scalar. Call `release` when they have been used:
    they vanish then.
    """

    name: str
    first_row: int
    values: np.ndarray
    release: Callable[[], None]


def pieces(
    entries: Sequence[Entry], piece_bytes: int, num_buffers: int = NUM_BUFFERS, num_threads: int = NUM_THREADS
) -> Generator[Piece, None, None]:
    """Yield every row of the tensors, in order.

    Args:
        entries: what to read.
        piece_bytes: the largest piece, unless one row is larger.
        num_buffers: pieces that are being read, wait to be taken, or are in use. Who keeps them all without a release
            waits for ever.
        num_threads: that read. They end when the iterator is closed.

    Raises:
        ValueError: a file is shorter than it was, or an argument is not at least 1; OSError: it cannot be read. Raised
            where the piece would have been taken.
    """
    if min(piece_bytes, num_buffers, num_threads) < 1:
        raise ValueError(
            f"piece_bytes ({piece_bytes}), num_buffers ({num_buffers}) and num_threads ({num_threads}) must be at"
            " least 1"
        )
    return _read_ahead(entries, piece_bytes, num_buffers, num_threads)


def row_ranges(entry: Entry, piece_bytes: int) -> list[range]:
    """Return the rows of each piece. Pieces have as many where that makes them no less than half as large as they may
    be.
    """
    rows = entry.shape[0] if entry.shape else 1
    most = max(1, min(rows, piece_bytes * rows // max(entry.num_bytes, 1)))
    size = next((n for n in range(most, most // 2, -1) if rows % n == 0), most)
    return [range(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def read(entry: Entry) -> np.ndarray:
    """Return a tensor in memory of its own."""
    buffer = aligned(entry.num_bytes)
    with Descriptor(entry.file) as descriptor:
        descriptor.read(entry, 0, buffer)
    return _typed(buffer, entry, entry.shape)


def aligned(num_bytes: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """Return bytes that JAX on a CPU takes over without copying them."""
    memory = make(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


class Descriptor(contextlib.AbstractContextManager):
    """A file open for reading, closed at the latest when the last job that reads it is done."""

    def __init__(self, file: Path):
        self._number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self, *_) -> None:
        """Close it; once is enough."""
        number, self._number = getattr(self, "_number", -1), -1
        if number >= 0:
            os.close(number)

    __exit__ = __del__ = close

    def read(self, entry: Entry, start: int, into: np.ndarray) -> None:
        """Fill `into` from the tensor's byte `start` on.

        Raises:
            ValueError: the file ends before; OSError: it cannot be read. Both name tensor and file.
        """
        at = 0
        while at < into.size:
            try:
                count = os.preadv(self._number, [into[at : at + _READ_BYTES]], entry.offset + start + at)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} while reading {entry.name}", str(entry.file)) from error
            if count == 0:
                raise ValueError(
                    f"{entry.file} ends within {entry.name}; it was cut after its header was read: {AGAIN}"
                )
            at += count


def _typed(buffer: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    dtype = DTYPES[entry.dtype]
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _read_ahead(
    entries: Sequence[Entry], piece_bytes: int, num_buffers: int, num_threads: int
) -> Generator[Piece, None, None]:
    free: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
    for _ in range(num_buffers):
        free.put(None)  # made when it is first taken
    reading: collections.deque[Future[Piece]] = collections.deque()
    opened = weakref.WeakSet[Descriptor]()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pieces")

    def fill(descriptor: Descriptor, entry: Entry, rows: range, buffer: np.ndarray | None) -> Piece:
        row_bytes = entry.num_bytes // entry.shape[0] if entry.shape and entry.shape[0] else entry.num_bytes
        size = len(rows) * row_bytes
        if buffer is None or buffer.size < size:
            buffer = aligned(size if size > piece_bytes else piece_bytes)
        descriptor.read(entry, rows.start * row_bytes, buffer[:size])
        shape = (len(rows), *entry.shape[1:]) if entry.shape else ()
        return Piece(entry.name, rows.start, _typed(buffer, entry, shape), lambda: free.put(buffer))

    try:
        file, descriptor = None, None
        for entry in entries:
            if entry.file != file:
                file, descriptor = entry.file, Descriptor(entry.file)
                opened.add(descriptor)
            for rows in row_ranges(entry, piece_bytes):
                while reading and (free.empty() or reading[0].done()):
                    yield reading.popleft().result()
                reading.append(pool.submit(fill, descriptor, entry, rows, free.get()))
        while reading:
            yield reading.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in opened:  # those that an exception's traceback holds
            descriptor.close()
