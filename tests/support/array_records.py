"""ArrayRecord files."""

from collections.abc import Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter


def write_array_record(path: Path, records: Iterable[bytes]) -> None:
    """Write `records` to a new file."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
