"""The parts of a checkpoint that are JSON: they are stored with a checksum, and read without Orbax."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
from absl import logging

from deepseek_jax.inputs import read_json

FILE_NAME = "metadata"  # Orbax's name for an item of JSON
LONGEST_REASON = 240  # characters of a foreign error message


def seal(payload: Any) -> dict[str, Any]:
    """Return `payload` with its checksum, to be stored."""
    return {"payload": payload, "crc32": _crc32(payload)}


def read_sealed(folder: Path) -> Any:
    """Return the payload of a stored item.

    Raises:
        ValueError: it is missing, damaged or not JSON.
    """
    sealed = read_json(folder / FILE_NAME)
    if sealed.keys() != {"payload", "crc32"} or _crc32(sealed["payload"]) != sealed["crc32"]:
        raise ValueError(f"checksum of the item {folder.name!r} differs")
    return sealed["payload"]


def check_names(record: dict[str, Any], asked: Any, whole: bool = False) -> None:
    """Refuse a checkpoint that does not hold the arrays that are asked for: each must be there, and none besides.

    Args:
        record: of the checkpoint; `fingerprints` has the path of every array.
        asked: the state, or some of its top entries. Of an entry that is asked for, all arrays must be.
        whole: all top entries must be asked for, too.

    Raises:
        ValueError: the message names the arrays that are missing, and those that are left over.
    """
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(asked)}
    entries = tuple(f"[{name!r}]" for name in asked)
    stored = {path for path in record["fingerprints"] if whole or path.startswith(entries)}
    found = {"lacks": paths - stored, "has, and the config has not,": stored - paths}
    parts = [f"{verb} {', '.join(sorted(some)[:3])} ({len(some)} in all)" for verb, some in found.items() if some]
    if parts:
        raise ValueError(
            f"the checkpoint of step {record['step']} {'; it '.join(parts)}; continue with the config and the version"
            " of the code that wrote it"
        )


def warn_of_changes(stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Warn of each part of the environment that differs from the recorded one."""
    for key in here:
        if stored.get(key) != here[key]:
            logging.warning(
                "the checkpoint was written with %s = %s, this process has %s: the arrays are equal, the run that"
                " follows need not be",
                *(key, stored.get(key), here[key]),
            )


def reason(error: Exception) -> str:
    """Return the part of an error that a person can use.

    TensorStore prints its whole specification, and says at the end what went wrong.
    """
    text = str(error) or repr(error)
    before_spec = text.split(" [tensorstore_spec=")[0].split(" [os_error_code=")[0].split("\n")[0]
    return before_spec if len(before_spec) <= LONGEST_REASON else "... " + before_spec[-LONGEST_REASON:]


def _crc32(payload: Any) -> int:
    return zlib.crc32(json.dumps(payload, sort_keys=True).encode())
