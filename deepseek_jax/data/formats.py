"""Which format a file has: its name decides.

Some names say nothing about how to read the content. Such a file is refused by name: compressed bytes, archives and
binary tables must never become text to train on.
"""

from typing import NamedTuple

from deepseek_jax.data.compression import SUFFIXES

# The last part of a name (after that of the compression) and its format.
FORMATS = {
    "jsonl": "json lines",
    "ndjson": "json lines",
    "json": "json",
    "parquet": "parquet",
    "arrow": "arrow",
    "array_record": "array_record",
    "arrayrecord": "array_record",
    "txt": "text",
    "text": "text",
    "md": "text",
}
COMPRESSIBLE = ("json lines", "json", "text")
TABLES = ("json lines", "json", "parquet", "arrow", "array_record")  # formats of many documents in a file
# What people keep beside a corpus or download for one, and what is text in none of its bytes.
UNREADABLE = {
    *("zip", "tar", "tgz", "tbz2", "txz", "7z", "rar", "lz4", "lz", "lzma", "lzo", "br", "z", "sz", "snappy"),
    *("bin", "idx", "npy", "npz", "h5", "hdf5", "pkl", "pickle", "pt", "pth", "ckpt", "safetensors", "gguf"),
    *("tfrecord", "tfrecords", "avro", "orc", "feather", "mds", "mdb", "db", "sqlite", "sqlite3", "warc"),
    *("xlsx", "xls", "docx", "doc", "pptx", "pdf", "epub", "djvu", "png", "jpg", "jpeg", "gif", "webp"),
    *("mp3", "mp4", "wav", "flac", "so", "dll", "exe", "o", "class", "jar", "whl", "pyc"),
}


class Format(NamedTuple):
    """The format of a file."""

    kind: str  # one of the values of FORMATS, or "" if it cannot be read
    compressed: bool
    fault: str  # why it cannot be read, with the remedy


def format_of(name: str) -> Format:
    """Return the format of a file of this name."""
    stem, _, suffix = name.lower().rpartition(".")
    if f".{suffix}" not in SUFFIXES:
        if suffix in UNREADABLE and stem:
            return Format("", False, f"is a .{suffix} file, which is not read; make .jsonl, .parquet or .txt of it")
        return Format(FORMATS.get(suffix, "text") if stem else "text", False, "")
    inner = stem.rpartition(".")[2] if "." in stem else ""
    kind = FORMATS.get(inner, "")
    if kind in COMPRESSIBLE:
        return Format(kind, True, "")
    if kind:
        return Format("", True, f"is a compressed .{inner} file, which is not read; decompress it")
    return Format(
        "",
        True,
        f"is compressed, and its name does not say what is inside; call it *.jsonl.{suffix} or *.txt.{suffix}, or"
        " decompress it",
    )
