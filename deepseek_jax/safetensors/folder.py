"""Read a folder of safetensors, as on the Hugging Face Hub: one file, or many with an index.

model.safetensors.index.json says in which file each tensor lies: {"metadata": {"total_size": 14336}, "weight_map":
{name: file}}. `Shards` reads the index and all headers first, so that a missing, cut or foreign file is found within a
second and not after an hour.
"""

import collections
import json
import os
import re
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

import numpy as np

from deepseek_jax.inputs import read_bytes, shown
from deepseek_jax.safetensors import reader
from deepseek_jax.safetensors.header import REMEDY, Entry, read_header, refuse_duplicates

INDEX = "model.safetensors.index.json"
RECORD = "conversion.json"  # the record that `writer` keeps in a folder
MOST_NAMES = 5  # in a message
SHARD_NAME = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")


class Shards:
    """The tensors of a folder.

    Attributes:
        entries: by name, in the order of files and offsets.
        num_bytes: of all tensors.

    Raises:
        ValueError: the checkpoint is incomplete or damaged. The message names the tensor, the file and the remedy.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        weight_map, files = _files(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in files:
            for entry in read_header(file):
                if entry.name in self.entries:
                    other = self.entries[entry.name].file
                    files = f"{shown(str(other))} and in {shown(str(file))}"
                    raise ValueError(
                        f"tensor {shown(entry.name)} is in {files}: remove the file that does not belong here"
                    )
                self.entries[entry.name] = entry
        if weight_map is not None:
            _check_index(weight_map, self.entries, self.folder)
        self.num_bytes = sum(entry.num_bytes for entry in self.entries.values())

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, in memory of its own."""
        return reader.read(self._entry(name))

    def stream(self, names: Iterable[str], **options: int) -> Generator[reader.Chunk, None, None]:
        """Yield the rows of the tensors (`reader.read_chunks`); fastest in the order of `entries`."""
        return reader.read_chunks(
            [self._entry(name) for name in names], **{"chunk_bytes": reader.CHUNK_BYTES} | options
        )

    def equal(self, name: str, other: str) -> bool:
        """Return whether two tensors of one shape and dtype hold the same bytes."""
        first, second = self._entry(name), self._entry(other)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        with reader.Descriptor(second.file) as descriptor:
            buffer = reader.aligned(0)
            for chunk in self.stream([name]):
                start, size = chunk.first_row * (second.num_bytes // max(second.shape[0], 1)), chunk.values.nbytes
                buffer = buffer if buffer.size >= size else reader.aligned(size)
                descriptor.read(second, start, buffer[:size])
                same = np.array_equal(chunk.values.reshape(-1).view(np.uint8), buffer[:size])
                chunk.release()
                if not same:
                    return False
        return True

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(
                f"{shown(str(self.folder))} has no tensor {shown(name)}: choose one of its {len(self.entries)}"
                " `entries`"
            )
        return self.entries[name]


def compare(
    shards: Shards, expected: Mapping[str, tuple[str, tuple[int, ...]]], optional: frozenset[str] = frozenset()
) -> None:
    """Check that a folder holds exactly the tensors of a model.

    Args:
        shards: the folder.
        expected: dtype, by its name in `DTYPES`, and shape of each tensor by name.
        optional: names of tensors that may be absent, or present without being expected.

    Raises:
        ValueError: some are missing, superfluous, or of another shape or dtype. The message names the first few of each
            kind, with their files.
    """
    entries = shards.entries
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for name, (dtype, shape) in expected.items():
        if name not in entries:
            if name not in optional:
                problems["missing"].append(name)
            continue
        entry = entries[name]
        if entry.shape != tuple(shape):
            problems["of another shape"].append(
                f"{name} in {entry.file.name} has {list(entry.shape)}, should have {list(shape)}"
            )
        if entry.dtype != dtype:
            problems["of another dtype"].append(f"{name} in {entry.file.name} has {entry.dtype}, should have {dtype}")
    problems["extra"] = [
        f"{name} in {entries[name].file.name}" for name in entries if name not in expected and name not in optional
    ]
    lines = [f"  {len(names)} {kind}: {_shortened(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(
            "\n".join(
                [
                    f"{shown(str(shards.folder))} does not hold this model; choose its config, or another checkpoint:",
                    *lines,
                ]
            )
        )


def _files(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Return what the index says (None without one) and the files, sorted by name."""
    where, index = shown(str(folder)), shown(str(folder / INDEX))
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {where}: give the folder that holds the .safetensors files")
    present = {file.name for file in folder.glob("*.safetensors")}
    weight_map = _weight_map(folder / INDEX)
    if weight_map is None:
        parts = sorted(name for name in present if SHARD_NAME.fullmatch(name))
        if parts or (not present and (folder / RECORD).exists()):
            raise ValueError(
                f"{where} has {len(parts)} shards{f' ({_shortened(parts)})' if parts else ''} and no {INDEX}: the"
                " conversion or download is "
                "unfinished; run the same command again"
            )
        if not present:
            raise ValueError(
                f"{where} holds no .safetensors file: give the folder of a checkpoint in Hugging Face's format"
            )
        return None, sorted(folder / name for name in present)
    for name, file in weight_map.items():
        if file not in present:
            raise ValueError(
                f"{index} says that {shown(name)} is in {shown(file)}, which is absent: download or convert this file"
            )
    for file in sorted(present - set(weight_map.values())):
        names = [entry.name for entry in read_header(folder / file)]
        raise ValueError(
            f"{index} does not name {shown(file)}, which holds {_shortened(names)}: move this file elsewhere"
        )
    numbers = collections.defaultdict(set)
    for match in filter(None, map(SHARD_NAME.fullmatch, present)):
        numbers[int(match[2])].add(int(match[1]))
    for total, numbers_present in numbers.items():
        if absent := sorted(set(range(1, total + 1)) - numbers_present):
            raise ValueError(
                f"{where} lacks {len(absent)} of {total} shards (number {_shortened(absent)}): finish the conversion"
                " or download"
            )
    return weight_map, sorted(folder / name for name in present)


def _weight_map(index: Path) -> dict[str, str] | None:
    """Return the file of each tensor; "./name" is "name"."""
    if not os.path.lexists(index):
        return None
    text, where = read_bytes(index), shown(str(index))
    try:
        weight_map = json.loads(text, object_pairs_hook=refuse_duplicates)["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must map names to files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shown(repr(error))
        raise ValueError(
            f"{where} is no index of a checkpoint ({reason}): download it again, or delete it and convert again"
        ) from error
    weight_map = {name: file.removeprefix("./") for name, file in weight_map.items()}
    for name, file in weight_map.items():
        if "/" in file:
            raise ValueError(
                f"{where} says that {shown(name)} is in {shown(file)}: only files in the folder itself are read; put"
                " them there, and write their names alone into the index"
            )
    return weight_map


def _check_index(weight_map: dict[str, str], entries: dict[str, Entry], folder: Path) -> None:
    index = shown(str(folder / INDEX))
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            where = f"it is in {shown(entries[name].file.name)}" if name in entries else "no file has it"
            raise ValueError(
                f"{index} says that {shown(name)} is in {file}, which lacks it ({where}): {REMEDY}, and the index"
            )
    for name, entry in entries.items():
        if name not in weight_map:
            raise ValueError(
                f"{shown(str(entry.file))} holds {shown(name)}, which {index} does not name: {REMEDY}, and the index"
            )


def _shortened(names: list) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(shown(str(name)) for name in names[:MOST_NAMES]) + rest
