"""ArrayRecord files of token ids: one document per record, little-endian int32 without BOS and EOS.

A record does not say of which dtype its bytes are, and NumPy's default is int64. So the ids are looked at: int64 ids
read as int32 have a 0 in every odd place, which no corpus of int32 ids has throughout.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.data.documents import Document, Problems
from deepseek_jax.data.extras import optional_library
from deepseek_jax.inputs import shown

REMEDY = "write np.asarray(ids, '<i4').tobytes()"
# int32 ids of a file that settle its dtype: odd places, all 0. In a text of 1% such ids the chance is 1e-8.
FEWEST_ODD_PLACES = 4
MOST_RECORDS = 10_000  # that are looked at for the dtype


def read_array_record(name: str, path: Path, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield the ids of each record, int32."""
    module = optional_library("array_record.python.array_record_module", "array_record")
    broken = (OSError, RuntimeError, ValueError, IndexError, TypeError)  # what the C++ side and its binding raise
    try:
        reader = module.ArrayRecordReader(str(path))
        count = reader.num_records()
    except broken as error:
        return problems.report(
            f"{shown(path)} is not an ArrayRecord file, or its name is not UTF-8: {shown(str(error))}"
        )
    if not count:  # the reader also finds no records in a file of another kind
        return problems.report(f"{shown(path)} has no records: it is empty, cut off, or not an ArrayRecord file")
    share = path.stat().st_size // count
    record = 0
    try:
        if _has_int64(reader.read([record])[0] for record in range(min(count, MOST_RECORDS))):
            return problems.report(f"{shown(path)} has ids of 8 bytes (int64), not int32; {REMEDY}")
        for record in range(count):
            content = reader.read([record])[0]
            if len(content) % 4:
                problems.report(
                    f"{shown(path)} record {record} has {len(content)} bytes, not a whole number of int32 token ids;"
                    f" {REMEDY}"
                )
            else:
                yield Document(f"{name}:{record}", np.frombuffer(content, "<i4"), share)
    except broken as error:
        return problems.report(f"{shown(path)} cannot be read from record {record} on: {error}")
    return None


def id_fault(ids: np.ndarray, vocab_size: int) -> str | None:
    """Return what is wrong with int32 ids of which some are not in the vocabulary, and the remedy; None if all are."""
    if not len(ids) or (ids.min() >= 0 and ids.max() < vocab_size):
        return None
    wrong = int(ids.min() if ids.min() < 0 else ids.max())
    fault = f"has token id {wrong} and the vocabulary ends at {vocab_size - 1}"
    for dtype, name in ((">i4", "big-endian int32"), ("<u2", "uint16"), ("<i8", "int64")):
        content = ids.astype("<i4").tobytes()
        if len(content) % np.dtype(dtype).itemsize == 0:
            others = np.frombuffer(content, dtype)
            if others.min() >= 0 and others.max() < vocab_size:
                return f"{fault}; its bytes look like {name}: {REMEDY}"
    return f"{fault}; set data.tokenizer to the tokenizer.json that made these ids"


def _has_int64(contents: Iterator[bytes]) -> bool:
    """Return whether records hold int64 ids: read as int32, every odd place is 0."""
    num_places, any_even = 0, False
    for content in contents:
        if len(content) % 4:
            continue  # reported when it is read
        ids = np.frombuffer(content, "<i4")
        if len(ids) % 2 or ids[1::2].any():
            return False
        num_places += len(ids) // 2
        any_even |= bool(ids[::2].any())
    return num_places >= FEWEST_ODD_PLACES and any_even
