"""Read a folder of safetensors, as on the Hugging Face Hub: one file, or many with an index.

A file is 8 bytes (the length of the header, little-endian), a header in JSON and the tensors' bytes:

    {"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "BF16", "shape": [7168], "data_offsets": [0, 14336]}, ...}

and model.safetensors.index.json says in which file each tensor lies: {"metadata": {"total_size": 14336}, "weight_map": {name: file}}.

`Shards` reads the index and all headers, so that whatever is missing, cut or foreign is found in a second and not after an hour.
Tensors are read with preadv into memory of their own, not mapped: pages of a mapping are read one fault at a time, and stay charged to
the process. `read_all` reads ahead with threads, within a budget of bytes; in the order of `entries` it reads each file from front to back.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import weakref
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {  # what safetensors calls each dtype
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_RANGE_BYTES = 2**24  # what one thread reads at a time
_ALIGNMENT = 64  # bytes; what JAX on a CPU needs to take an array without copying it
_AGAIN = "download or convert the file again"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies. `offset` counts from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Shards:
    """The tensors of a folder.

    `entries` is ordered by (file, offset); `metadata` merges that of all files (the first wins); `num_bytes` is the sum over the tensors.

    Raises:
        ValueError: the folder is no complete and sound checkpoint; says which tensor and file, and what to do.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        weight_map, files = _files(self.folder)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            entries, metadata = read_header(file)
            for entry in entries:
                if entry.name in self.entries:
                    other = self.entries[entry.name].file
                    raise ValueError(f"tensor {entry.name} is in {other} and in {file}: remove the file that does not belong here")
                self.entries[entry.name] = entry
            self.metadata = metadata | self.metadata
        if weight_map is not None:
            _check_index(weight_map, self.entries, self.folder)
        self.num_bytes = sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, in its own memory and dtype."""
        entry = self._entry(name)
        buffer = _buffer(entry.num_bytes)
        with contextlib.closing(_Descriptor(entry.file)) as descriptor:
            _fill(descriptor, entry, buffer, 0)
        return _typed(buffer, entry)

    def read_all(
        self, names: Iterable[str], in_flight_bytes: int = 2**29, num_threads: int = 4
    ) -> Generator[tuple[str, np.ndarray], None, None]:
        """Return an iterator over (name, tensor) in the order of `names`, which threads read ahead.

        Tensors that are being read or wait to be taken never hold more than `in_flight_bytes`, unless a single one does. A large tensor
        is read in parts by several threads. What fails to be read raises where it is taken. Closing the iterator ends the threads.
        """
        if in_flight_bytes < 1 or num_threads < 1:
            raise ValueError(f"in_flight_bytes ({in_flight_bytes}) and num_threads ({num_threads}) must be at least 1")
        return _read_ahead([self._entry(name) for name in names], in_flight_bytes, num_threads)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.folder} has no tensor {name}: choose one of its {len(self.entries)} `entries`")
        return self.entries[name]


def compare(shards: Shards, expected: Mapping[str, tuple[str, tuple[int, ...]]], optional: frozenset[str] = frozenset()) -> None:
    """Check that the folder holds the `expected` tensors: name -> (dtype, shape), dtypes by safetensors' names as in `DTYPES`.

    Those in `optional` may be absent, or be there without being expected.

    Raises:
        ValueError: lists missing and extra tensors, wrong shapes and wrong dtypes, each with the first few names and their files.
    """
    entries = shards.entries
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, (dtype, shape) in expected.items():
        if name not in entries:
            if name not in optional:
                found["missing"].append(name)
            continue
        entry = entries[name]
        if entry.shape != tuple(shape):
            found["of another shape"].append(f"{name} in {entry.file.name} has {list(entry.shape)}, should have {list(shape)}")
        if entry.dtype != dtype:
            found["of another dtype"].append(f"{name} in {entry.file.name} has {entry.dtype}, should have {dtype}")
    found["extra"] = [f"{name} in {entries[name].file.name}" for name in entries if name not in expected and name not in optional]
    lines = [f"  {len(names)} {kind}: {_first(names)}" for kind, names in found.items() if names]
    if lines:
        raise ValueError("\n".join([f"{shards.folder} does not hold this model; choose its config, or another checkpoint:", *lines]))


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """Return a file's entries by offset, and its metadata; check that they cover its bytes exactly."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{file} ({size} bytes) is truncated or no safetensors file: its header would have {length} bytes; {_AGAIN}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than strings")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"the header of {file} cannot be understood ({error}): {_AGAIN}") from error
    entries = [_parse(name, fields, file, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise ValueError(f"{file}: {entry.name} {kind} (it starts at byte {entry.offset}, the one before ends at {end}): {_AGAIN}")
        end += entry.num_bytes
        if end > size:
            raise ValueError(f"{file} is truncated: it has {size} bytes, and {entry.name} ends at byte {end}; {_AGAIN}")
    if end < size:
        last = entries[-1].name if entries else "the header"
        raise ValueError(f"{file} has {size} bytes, but its last tensor ({last}) ends at byte {end}: {_AGAIN}")
    return entries, metadata


def _parse(name: str, fields: object, file: Path, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]  # type: ignore[index]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("sizes and offsets must be integers >= 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: the header does not describe {name} (dtype, shape, data_offsets): {error!r}; {_AGAIN}") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{file}: {name} has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}: convert it to one of them")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise ValueError(f"{file}: {name} is {dtype} {list(shape)}, {num_bytes} bytes, but has {end - begin}: {_AGAIN}")
    return Entry(name, file, dtype, shape, start + begin, num_bytes)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name} stands in it twice")
    return result


def _files(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Return the index (None without one) and the files, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the folder that holds the .safetensors files")
    there = {file.name for file in folder.glob("*.safetensors")}
    weight_map = _weight_map(folder / INDEX)
    if weight_map is None:
        parts = sorted(name for name in there if SHARD_NAME.fullmatch(name))
        if parts or (not there and (folder / "conversion.json").exists()):
            raise ValueError(
                f"{folder} has {len(parts)} shards{f' ({_first(parts)})' if parts else ''} and no {INDEX}: the conversion or download is "
                "unfinished; run the same command again"
            )
        if not there:
            raise ValueError(f"{folder} holds no .safetensors file: give the folder of a checkpoint in Hugging Face's format")
        return None, sorted(folder / name for name in there)
    for name, file in weight_map.items():
        if file not in there:
            raise ValueError(f"{folder / INDEX} says that {name} is in {file}, which is absent: download or convert this file")
    for file in sorted(there - set(weight_map.values())):
        names = [entry.name for entry in read_header(folder / file)[0]]
        raise ValueError(f"{folder / INDEX} does not name {file}, which holds {_first(names)}: move this file elsewhere")
    numbers = collections.defaultdict(set)
    for match in filter(None, map(SHARD_NAME.fullmatch, there)):
        numbers[int(match[2])].add(int(match[1]))
    for total, have in numbers.items():
        if absent := sorted(set(range(1, total + 1)) - have):
            raise ValueError(f"{folder} lacks {len(absent)} of {total} shards (number {_first(absent)}): finish the conversion or download")
    return weight_map, sorted(folder / name for name in there)


def _weight_map(index: Path) -> dict[str, str] | None:
    if not index.exists():
        return None
    try:
        weight_map = json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must map names to files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of a checkpoint ({error!r}): download it again, or delete it and convert again") from error
    return weight_map


def _check_index(weight_map: dict[str, str], entries: dict[str, Entry], folder: Path) -> None:
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            where = f"it is in {entries[name].file.name}" if name in entries else "no file has it"
            raise ValueError(f"{folder / INDEX} says that {name} is in {file}, which lacks it ({where}): {_AGAIN}, and the index")
    for name, entry in entries.items():
        if name not in weight_map:
            raise ValueError(f"{entry.file} holds {name}, which {folder / INDEX} does not name: {_AGAIN}, and the index")


def _first(names: list, count: int = 5) -> str:
    return ", ".join(map(str, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


class _Descriptor:
    """A file open for reading, closed at the latest when the last job that reads it is done."""

    def __init__(self, file: Path):
        self.number = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        number, self.number = getattr(self, "number", -1), -1
        if number >= 0:
            os.close(number)

    __del__ = close


def _buffer(num_bytes: int) -> np.ndarray:
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


def _typed(buffer: np.ndarray, entry: Entry) -> np.ndarray:
    return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _fill(descriptor: _Descriptor, entry: Entry, part: np.ndarray, start: int) -> None:
    """Read `part`, which starts at the tensor's byte `start`."""
    at = 0
    while at < part.size:
        try:
            count = os.preadv(descriptor.number, [part[at : at + _RANGE_BYTES]], entry.offset + start + at)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while reading {entry.name}", str(entry.file)) from error
        if count == 0:
            raise ValueError(f"{entry.file} ends within {entry.name}; it was cut after its header was read: {_AGAIN}")
        at += count


def _read_ahead(entries: list[Entry], in_flight_bytes: int, num_threads: int) -> Generator[tuple[str, np.ndarray], None, None]:
    waiting = collections.deque(entries)
    reading: collections.deque[tuple[Entry, np.ndarray, list[Future]]] = collections.deque()
    in_flight = 0
    file, descriptor = None, None
    opened = weakref.WeakSet[_Descriptor]()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="shards")
    try:
        while waiting or reading:
            while waiting and (not reading or in_flight + waiting[0].num_bytes <= in_flight_bytes):
                entry = waiting.popleft()
                if entry.file != file:
                    file, descriptor = entry.file, _Descriptor(entry.file)
                    opened.add(descriptor)
                buffer = _buffer(entry.num_bytes)
                starts = range(0, entry.num_bytes, _RANGE_BYTES)
                jobs = [pool.submit(_fill, descriptor, entry, buffer[at : at + _RANGE_BYTES], at) for at in starts]
                reading.append((entry, buffer, jobs))
                in_flight += entry.num_bytes
                del buffer
            in_flight -= reading[0][0].num_bytes
            yield _finished(*reading.popleft())  # no reference stays here
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in opened:  # those that an exception's traceback holds
            descriptor.close()


def _finished(entry: Entry, buffer: np.ndarray, jobs: list[Future]) -> tuple[str, np.ndarray]:
    for job in jobs:
        job.result()
    return entry.name, _typed(buffer, entry)
