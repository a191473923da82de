"""The record of a conversion, conversion.json: which shards are finished, and whether a folder may be written into.

    {"plan": "3f1c...",
     "dtypes": ["BF16", "F32", "F8_E4M3"],
     "num_shards": 163,
     "shards": {"model-00001-of-000163.safetensors": {"sha256": "9ab0...", "bytes": 5234139343}, ...}}

`plan` is a digest of tensors, files and source (`writer.ShardWriter`). `dtypes` may be absent.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deepseek_jax.files import PARTIAL_MARK, write_atomically
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.locks import LOCK
from deepseek_jax.safetensors.folder import INDEX, RECORD

# The names of files that a killed process leaves behind: of shards, record and index, and of what lies beside them.
PARTIAL = re.compile(rf"[\w.-]+{re.escape(PARTIAL_MARK)}.+-\d+-\d+")
_READ_BYTES = 2**24  # hashed and reported at a time


def check_target(folder: str | os.PathLike[str], num_bytes: int, dtypes: Iterable[str] = ()) -> None:
    """Refuse a folder that cannot take `num_bytes`, or holds a conversion in other dtypes, before the work begins.

    Raises:
        ValueError: it is a file, or holds something else; OSError: the disk has too little space for the rest.
    """
    folder, written = Path(folder), 0
    check_folder(folder)
    if os.path.lexists(folder / RECORD):
        record = read_record(folder)
        check_dtypes(folder, record, dtypes)
        written = sum(shard["bytes"] for shard in record["shards"].values())
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(parent):
        raise ValueError(f"{shown(str(parent))} is a file: choose a folder that can be made")
    check_space(parent, num_bytes - written)


def check_dtypes(folder: Path, record: dict, dtypes: Iterable[str]) -> None:
    """Refuse to continue a conversion whose record names other dtypes."""
    before, now = record.get("dtypes"), sorted(set(dtypes))
    if isinstance(before, list) and now and before != now:
        raise ValueError(
            f"{shown(str(folder))} holds a conversion in another precision ({shown(', '.join(map(str, before)))}) than"
            f" this one ({', '.join(now)}): give that --precision, choose another folder, or delete this one"
        )


def verify(folder: str | os.PathLike[str], on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Compute the SHA-256 of every shard anew and compare it with the record.

    Raises:
        ValueError: shards are damaged or absent (the message names them), or the conversion is unfinished.
    """
    folder = Path(folder)
    record = read_record(folder)
    damaged = []
    for file, expected in record["shards"].items():
        if file_size(folder / file) != expected["bytes"] or _sha256(folder / file, on_bytes) != expected["sha256"]:
            damaged.append(file)
    if damaged:
        raise ValueError(
            f"damaged or absent in {shown(str(folder))}: {shown(', '.join(damaged))}; delete these files and convert"
            " into the same folder again"
        )
    if len(record["shards"]) < record["num_shards"] or not (folder / INDEX).exists():
        raise ValueError(
            f"{folder} has {len(record['shards'])} of {record['num_shards']} shards, or no index: run the conversion"
            " again"
        )


def read_record(folder: Path) -> dict:
    """Return the record in a folder.

    Raises:
        ValueError: it is missing, or describes something else.
    """
    try:
        record = read_json(folder / RECORD)
    except ValueError as error:
        raise ValueError(f"{error}; or delete the folder and convert again") from error
    shards = record.get("shards")
    known = isinstance(record.get("plan"), str) and isinstance(record.get("num_shards"), int)
    if not known or not isinstance(shards, dict) or not all(map(_is_shard, shards.items())):
        raise ValueError(
            f"{shown(str(folder / RECORD))} does not describe a conversion (plan, num_shards, and a sha256 and bytes"
            " of every shard): delete the folder and convert again"
        )
    return record


def _is_shard(item: tuple[str, object]) -> bool:
    file, shard = item
    if "/" in file or not isinstance(shard, dict):
        return False
    return isinstance(shard.get("sha256"), str) and isinstance(shard.get("bytes"), int)


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file atomically; a full disk is named as in `naming_full_disks`."""
    text = json.dumps(content, indent=2) + "\n"
    with naming_full_disks(path.name, path, len(text)):
        write_atomically(path, text)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds files and no record of a conversion."""
    where = shown(str(folder))
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{where} is a file: choose a folder")
    if not os.path.isdir(folder) or os.path.lexists(folder / RECORD):
        return
    names = {file.name for file in folder.iterdir()} - {LOCK}
    if files := sorted(shown(name) for name in names if not PARTIAL.fullmatch(name)):
        raise ValueError(f"{where} holds {', '.join(files[:5])} and no conversion: choose another folder or empty it")


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk on which fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"the missing shards need {needed} bytes and {free} are free: make room", str(folder)
        )


@contextlib.contextmanager
def naming_full_disks(what: str, path: Path, num_bytes: int) -> Iterator[None]:
    """If the disk is full, say so, with the file and what it still needs.

    Args:
        what: is being written.
        path: of the file.
        num_bytes: left to write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        message = (
            f"the disk is full at {what}: the rest of the file needs {num_bytes} bytes, {free} are free;"
            " make room and run again"
        )
        raise OSError(error.errno, message, str(path)) from error


def file_size(path: Path) -> int:
    """Return the bytes of a file; -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_READ_BYTES):
            sha256.update(chunk)
            on_bytes(len(chunk))
    return sha256.hexdigest()
