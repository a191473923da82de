"""The parts of a checkpoint that are JSON: they are stored with a checksum, and read without Orbax."""

import json
import zlib
from pathlib import Path
from typing import Any

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
