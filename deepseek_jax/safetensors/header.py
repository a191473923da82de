"""The header of a safetensors file.

A file is 8 bytes (the length of the header, little-endian), a header in JSON and the tensors' bytes:

    {"__metadata__": {"format": "pt"},
     "model.norm.weight": {"dtype": "BF16", "shape": [7168], "data_offsets": [0, 14336]},
     ...}
"""

import collections
import dataclasses
import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from deepseek_jax.inputs import regular_file, shown

DTYPES = {  # by the names that safetensors gives them
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
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
REMEDY = "download or convert the file again"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor's bytes are. `offset` counts from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> list[Entry]:
    """Return a file's entries in the order of their offsets.

    Raises:
        ValueError: it is no regular file, the header cannot be understood, or its tensors do not cover the file's
            bytes exactly.
    """
    where = shown(str(file))
    with regular_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{where} ({size} bytes) is truncated or no safetensors file: its header would have {length} bytes;"
                f" {REMEDY}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
        metadata = header.pop("__metadata__", {})
        if any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than strings")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"the header of {where} cannot be understood ({shown(str(error))}): {REMEDY}") from error
    entries = [_parse(name, fields, file, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    end = 8 + length
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise ValueError(
                f"{where}: {shown(entry.name)} {kind} (it starts at byte {entry.offset}, the one before ends at {end}):"
                f" {REMEDY}"
            )
        end += entry.num_bytes
        if end > size:
            raise ValueError(
                f"{where} is truncated: it has {size} bytes, and {shown(entry.name)} ends at byte {end}; {REMEDY}"
            )
    if end < size:
        last = shown(entries[-1].name) if entries else "the header"
        raise ValueError(f"{where} has {size} bytes, but its last tensor ({last}) ends at byte {end}: {REMEDY}")
    return entries


def _parse(name: str, fields: object, file: Path, start: int) -> Entry:
    where = f"{shown(str(file))}: {shown(name)}"
    try:
        # type: ignore[index]
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("sizes and offsets must be integers >= 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is not described in the header (dtype, shape, data_offsets): {shown(repr(error))}; {REMEDY}"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{where} has the unknown dtype {shown(repr(dtype))}; known are {', '.join(DTYPES)}: convert it to one of"
            " them"
        )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise ValueError(
            f"{where} is {dtype} {shown(str(list(shape)))}, {num_bytes} bytes, but has {end - begin}: {REMEDY}"
        )
    return Entry(name, file, dtype, shape, start + begin, num_bytes)


def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a dict of the pairs of a JSON object (as `object_pairs_hook`), unless a key is there twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        name = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name} stands in it twice")
    return result
