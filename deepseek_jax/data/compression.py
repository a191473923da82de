"""Compressed files as streams: gzip, bzip2, xz and Zstandard, read alike.

A file is one stream of its format or several in a row, with zeros after the last, which tapes and object stores add. A
stream that stops before its end mark is a fault, also where the library beneath would call that the end of the file.
The compressed bytes are fed in small portions, so a file that expands a thousandfold needs little memory.
"""

import bz2
import contextlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.data.extras import optional_library

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# Compressed bytes per portion. Zstandard expands at most 32,768 times (4 bytes become a block of 128 KiB), gzip 1032
# times: 64 and 16 MiB. The other two take the limit of their output instead.
PORTIONS = {".gz": 16384, ".bz2": 16384, ".xz": 16384, ".zst": 2048}
MOST_OUTPUT = 1 << 20  # bytes
LARGEST_WINDOW = 1 << 31  # bytes that a Zstandard decoder keeps: zstd --long=31, the most that its decoders allow


class DecompressionError(Exception):
    """The compressed bytes are damaged, cut off, or of another format."""


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[io.RawIOBase, io.RawIOBase]]:
    """Open a file that may be compressed, as its suffix says.

    Yields its content, and the file on the disk, whose `tell` is the position of a progress bar. Neither is buffered.
    Reading the content raises DecompressionError, after everything that could be decompressed was returned.

    Raises:
        OSError: the file cannot be opened.
        CorpusError: the library for its compression is not installed.
    """
    suffix = path.suffix.lower()
    with path.open("rb", buffering=0) as raw:
        yield (_Decompressed(raw, suffix) if suffix in SUFFIXES else raw), raw


class _Decompressed(io.RawIOBase):
    """The content of a compressed file."""

    def __init__(self, raw: io.RawIOBase, suffix: str):
        self._raw, self._portion = raw, PORTIONS[suffix]
        self._start, self._broken = _decoder(suffix)
        self._limit = (MOST_OUTPUT,) if suffix in (".bz2", ".xz") else ()
        self._stream: Any = None  # the decoder of the stream that is being read
        self._num_streams = 0
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return self.readall()
        while not self._output:
            if self._stream is None and not self._begin():
                return b""
            self._output = memoryview(self._decompress())
        content, self._output = bytes(self._output[:size]), self._output[size:]
        return content

    def _begin(self) -> bool:
        """Start the next stream; return False at the end of the file."""
        while not self._input:
            self._input = self._raw.read(self._portion)
            if not self._input:
                if not self._num_streams:
                    raise DecompressionError("it is empty, which no compressed file is")
                return False
            if self._num_streams:
                self._input = self._input.lstrip(b"\0")
        self._stream = self._start()
        return True

    def _decompress(self) -> bytes:
        stream = self._stream
        if getattr(stream, "needs_input", True) and not self._input:
            self._input = self._raw.read(self._portion)
            if not self._input:
                raise DecompressionError("it is cut off inside a compressed stream")
        compressed, self._input = self._input, b""
        try:
            output = stream.decompress(compressed, *self._limit)
        except self._broken as error:
            raise DecompressionError(self._cause(error)) from error
        except MemoryError as error:
            raise DecompressionError(
                f"there is too little memory to decompress it; a window of zstd --long=31 takes {LARGEST_WINDOW} bytes"
            ) from error
        if stream.eof:
            self._stream, self._num_streams = None, self._num_streams + 1
            self._input = stream.unused_data.lstrip(b"\0")
        return output

    def _cause(self, error: Exception) -> str:
        if "too much memory" in str(error):
            return (
                f"its Zstandard window is larger than {LARGEST_WINDOW} bytes, the most memory that a decoder gives it;"
                " compress it again with zstd --long=31 or less"
            )
        return f"{error} (after {self._num_streams} complete streams)" if self._num_streams else str(error)


def _decoder(suffix: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """Return what starts the decoder of a stream, and what such a decoder raises for damaged bytes."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(31), (zlib.error,)  # 31: with gzip's header and checksum
    if suffix == ".bz2":
        return bz2.BZ2Decompressor, (OSError, EOFError, ValueError)
    if suffix == ".xz":
        return lzma.LZMADecompressor, (lzma.LZMAError, EOFError)
    zstandard = optional_library("zstandard")
    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj, (zstandard.ZstdError,)
