"""Write a folder of safetensors, tensor by tensor, so that an interrupted conversion goes on where it stopped.

Names, dtypes and shapes are known before the first byte is written: `plan` divides them over files, and that fixes
every header. Then each file is

    streamed to <file>.partial-..., its SHA-256 computed on the way -> fsync -> renamed -> recorded in conversion.json

and after the last one the index is written. `Shards` refuses a folder that has shards and no index, so that nobody
loads half a checkpoint. conversion.json (`record`) has a digest of the plan: a folder is continued only with the same
tensors, files and source.

Tensors lie in a file in the order of the plan. The format allows no padding between them. Some readers map files and
need aligned tensors: for these, plan no wide dtype behind an odd number of bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from deepseek_jax.files import replacing, write_all
from deepseek_jax.locks import locked
from deepseek_jax.safetensors.folder import INDEX, RECORD
from deepseek_jax.safetensors.header import DTYPES
from deepseek_jax.safetensors.record import (
    PARTIAL,
    check_dtypes,
    check_folder,
    check_space,
    file_size,
    naming_full_disks,
    read_record,
    write_json,
)

_CHUNK_BYTES = 2**24  # written, hashed and reported at a time


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to write. `dtype` is safetensors' name for it, as in `header.DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name} has the unknown dtype {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.name == "__metadata__" or any(size < 0 for size in self.shape):
            raise ValueError(
                f"a tensor cannot be called {self.name!r} with shape {self.shape}: give it another name or shape"
            )

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plan(tensors: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Divide the tensors, in their order, over shards of at most `max_shard_bytes`; a larger tensor has its own."""
    if not tensors or max_shard_bytes < 1:
        raise ValueError(
            f"{len(tensors)} tensors cannot be divided over shards of {max_shard_bytes} bytes: at least 1 of each"
        )
    seen: set[str] = set()
    shards: list[list[Planned]] = [[]]
    space_left = max_shard_bytes
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name} is planned twice: give every tensor its own name")
        seen.add(tensor.name)
        if shards[-1] and tensor.num_bytes > space_left:
            shards.append([])
            space_left = max_shard_bytes
        shards[-1].append(tensor)
        space_left -= tensor.num_bytes
    return shards


def file_name(number: int, num_shards: int) -> str:
    """Return a shard's name, with as many digits as the released checkpoint has; `number` counts from 1."""
    return f"model-{number:05d}-of-{num_shards:06d}.safetensors"


class CancelledError(Exception):
    """A shard is given up because another one could not be written."""


class ShardWriter:
    """A conversion into `folder`, begun or continued. A new folder is made, with a record that marks it.

    Args:
        folder: new, empty, or one that holds the same conversion unfinished.
        tensors: everything to write, in order.
        max_shard_bytes: of the tensors in one file.
        source: where the values come from, for example a checkpoint's path and step. Only the same source continues a
            conversion.

    Raises:
        ValueError: the folder holds something else, or a conversion of another plan.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Sequence[Planned],
        max_shard_bytes: int = 5_000_000_000,
        source: str = "",
    ):
        self.folder = Path(folder)
        shards = plan(tensors, int(max_shard_bytes))
        self._dtypes = sorted({tensor.dtype for tensor in tensors})
        self.shards = {file_name(i, len(shards)): shard for i, shard in enumerate(shards, 1)}
        self._headers = {file: header_bytes(shard) for file, shard in self.shards.items()}
        digest = hashlib.sha256(source.encode())
        for file, header in self._headers.items():
            digest.update(file.encode() + header)
        self.digest = digest.hexdigest()
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / RECORD).exists():
            self._finished()
        else:
            self._record_finished({})

    def num_bytes(self, file: str) -> int:
        """Return the size of a shard's file."""
        return len(self._headers[file]) + sum(tensor.num_bytes for tensor in self.shards[file])

    def missing(self) -> list[str]:
        """Return the files that `write` still has to write."""
        finished = self._finished()
        return [
            file
            for file in self.shards
            if file not in finished or file_size(self.folder / file) != finished[file]["bytes"]
        ]

    def write(
        self,
        get: Callable[[str], np.ndarray],
        on_bytes: Callable[[int], None] = lambda count: None,
        shards_at_once: int = 1,
    ) -> None:
        """Write the missing shards and the index. An interrupted write is continued by calling it again.

        Args:
            get: returns a tensor by name. It is called once for each, in the planned order within a shard, from as many
                threads as there are shards at once.
            on_bytes: called with the size of every chunk written, header included, by one thread at a time.
            shards_at_once: how many are written side by side. SHA-256 takes longest, and only one thread can compute
                that of a file.

        Raises:
            ValueError: a tensor has another dtype or shape than planned, or another process writes into the folder.
            OSError: the disk has too little space, before the first byte or later; finished shards stay.
        """
        lock, cancelled, failures = threading.Lock(), threading.Event(), []

        def report(count: int) -> None:
            with lock:
                on_bytes(count)

        def write_one(file: str) -> None:
            try:
                sha256 = self.write_shard(file, get, report, cancelled)
                with lock:
                    self.record({file: sha256})
            except CancelledError:
                pass
            except BaseException as error:
                failures.append(error)
                cancelled.set()

        with self.writing() as missing:
            with ThreadPoolExecutor(shards_at_once, thread_name_prefix="shards") as pool:
                try:
                    for job in [pool.submit(write_one, file) for file in missing]:
                        job.result()
                finally:  # also when this thread is interrupted
                    cancelled.set()
            if failures:
                raise failures[0]

    @contextlib.contextmanager
    def writing(self) -> Iterator[list[str]]:
        """Yield the missing shards. The caller writes and records them, and the index is written at the end.

        Raises:
            ValueError: another process writes into the folder; OSError: the disk has too little space.
        """
        with locked(self.folder):
            for file in self.folder.iterdir():
                if PARTIAL.fullmatch(file.name):
                    file.unlink()
            missing = self.missing()
            if missing:
                (self.folder / INDEX).unlink(missing_ok=True)
            check_space(self.folder, sum(map(self.num_bytes, missing)))
            yield missing
            if not (self.folder / INDEX).exists():
                total = sum(tensor.num_bytes for shard in self.shards.values() for tensor in shard)
                weight_map = {tensor.name: file for file, shard in self.shards.items() for tensor in shard}
                write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def record(self, sha256: Mapping[str, str]) -> None:
        """Note the SHA-256 of finished shards by file. Only one process may do so."""
        self._record_finished(
            self._finished() | {file: {"sha256": sha256[file], "bytes": self.num_bytes(file)} for file in sha256}
        )

    def _finished(self) -> dict[str, dict]:
        record = read_record(self.folder)
        if record["plan"] != self.digest:
            check_dtypes(self.folder, record, self._dtypes)
            what = "other tensors, shard sizes or source"
            raise ValueError(f"{self.folder} holds a conversion of {what}: choose another folder, or delete this one")
        return record["shards"]

    def _record_finished(self, shards: dict[str, dict]) -> None:
        write_json(
            self.folder / RECORD,
            {
                "plan": self.digest,
                "dtypes": self._dtypes,
                "num_shards": len(self.shards),
                "shards": dict(sorted(shards.items())),
            },
        )

    def write_shard(
        self, file: str, get: Callable[[str], np.ndarray], on_bytes: Callable[[int], None], cancelled: threading.Event
    ) -> str:
        """Write one file and return its SHA-256; the arguments are those of `write`.

        Raises:
            CancelledError: `cancelled` was set.
        """
        path, sha256 = self.folder / file, hashlib.sha256()
        with replacing(path) as descriptor:

            def append(what: str, data: memoryview, num_left: int) -> None:
                for start in range(0, len(data), _CHUNK_BYTES):
                    if cancelled.is_set():
                        raise CancelledError
                    chunk = data[start : start + _CHUNK_BYTES]
                    with naming_full_disks(what, path, num_left - start):
                        write_all(descriptor, chunk)
                    sha256.update(chunk)
                    on_bytes(len(chunk))

            num_left = self.num_bytes(file)
            append("the header", memoryview(self._headers[file]), num_left)
            num_left -= len(self._headers[file])
            for tensor in self.shards[file]:
                append(tensor.name, bytes_of(get(tensor.name), tensor), num_left)
                num_left -= tensor.num_bytes
            with naming_full_disks("the last tensors", path, self.num_bytes(file)):
                os.fsync(descriptor)
        return sha256.hexdigest()


def header_bytes(shard: Sequence[Planned]) -> bytes:
    """Return the length and the header, padded as by the safetensors library: tensors begin at a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.num_bytes
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(array: np.ndarray, tensor: Planned) -> memoryview:
    """Return the bytes of an array that has the dtype and the shape that were planned."""
    array = np.asarray(array)
    dtype = DTYPES[tensor.dtype]
    if array.dtype != dtype or array.shape != tuple(tensor.shape):
        raise ValueError(
            f"{tensor.name} is {array.dtype} {list(array.shape)}, planned is {dtype} {list(tensor.shape)}: convert it"
            " first"
        )
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
