"""Which files of a source are read.

A source names a file, a folder with all that is in it, a pattern such as "data/**/*.jsonl.gz", or a folder saved by
`datasets`. In a folder

    hidden files and folders, and __pycache__     are left out
    files with many documents (.jsonl, .parquet)  are read, and .txt files beside them. Whatever else lies there
                                                  (README.md, LICENSE, dataset_infos.json) is left out, and said
    .json files beside other text (a repository)  are left out, and said; among themselves they are read
    other text                                    is read, if there is nothing but text

Where more bytes would be left out than read, the source is refused: a pattern then says which files are meant.
"""

import fnmatch
import glob
import logging
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.config import Source
from deepseek_jax.data.documents import CorpusError, Problems
from deepseek_jax.data.formats import TABLES, format_of
from deepseek_jax.data.text_files import LARGEST_WHOLE_FILE
from deepseek_jax.inputs import kind_of, local_path, read_json, shown

STDLIB = "stdlib"
NOT_STDLIB = {"site-packages", "dist-packages"}  # folders in that of the standard library which are not part of it
# Files about a corpus, not of it: stems of names in capitals, and whole names.
ABOUT_STEMS = {"README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG", "COPYING", "AUTHORS"}
# Files of a run that are text too, by which a pattern may take its workdir for a corpus.
RUN_NAMES = ("config.json", "metrics.jsonl", "log.txt", "tokenizer.json", "saved.json")
ABOUT_NAMES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "_success"}

log = logging.getLogger(__name__)


class File(NamedTuple):
    """A file of a source."""

    name: str  # relative to the source; bytes that are not UTF-8 as escapes
    path: Path
    size: int  # bytes
    changed: int  # time of the last change, nanoseconds


class CorpusFiles(NamedTuple):
    """The files of a source, sorted by name."""

    files: list[File]
    left_out: list[str]  # names of files that lie there and are not read
    faults: list[str]  # what cannot be looked at, each with its path


def find_files(source: Source) -> CorpusFiles:
    """Look for the files of a source on this machine.

    Raises:
        CorpusError: the path does not exist, cannot be listed, is of no readable kind, or holds no file.
    """
    if source.path == STDLIB:
        return CorpusFiles(sorted(_walk(Path(sysconfig.get_path("stdlib")), [], NOT_STDLIB)), [], [])
    try:
        root = local_path(source.path, "a path of data.sources")
    except ValueError as error:
        raise CorpusError(str(error)) from error
    named = f"data source {shown(source.path)!r}"
    try:
        status = os.stat(root)
    except FileNotFoundError:
        if glob.has_magic(str(root)):
            return _matching(named, str(root))
        raise CorpusError(f"{named} does not exist; name a folder, a file, a pattern, 'hf:...' or 'stdlib'") from None
    except OSError as error:
        raise CorpusError(f"{named} cannot be read: {error.strerror}; name another path, or repair this one") from error
    if stat.S_ISREG(status.st_mode):
        return CorpusFiles([_file(root.name, root, status)], [], [])
    if not stat.S_ISDIR(status.st_mode):
        raise CorpusError(f"{named} is {kind_of(status.st_mode)}; name a folder or a regular file")
    faults: list[str] = []
    found = sorted(_walk(root, faults))
    files, left_out = _select(found, named)
    if not files and not faults:
        raise CorpusError(f"{named} is an empty folder; put text, .jsonl, .parquet or .array_record files there")
    return CorpusFiles(files, left_out, sorted(faults))


def check_apart(source: Source, workdir: Path) -> None:
    """Refuse a workdir whose files the source would read: the corpus would change while the run goes on.

    Raises:
        CorpusError: the workdir lies in the source's folder, or the source's pattern matches files of a run there.
    """
    if source.path == STDLIB or source.path.startswith("hf:"):
        return
    workdir = Path(os.path.realpath(workdir))
    root = local_path(source.path, "a path of data.sources")
    if root.is_dir():
        root = Path(os.path.realpath(root))
        inner = workdir.relative_to(root).parts if workdir.is_relative_to(root) else (".hidden",)
        is_read = not any(part.startswith(".") or part == "__pycache__" for part in inner)
    else:
        pattern = Path(os.path.realpath(root)).parts
        is_read = glob.has_magic(str(root)) and any(_matches((*workdir.parts, name), pattern) for name in RUN_NAMES)
    if is_read:
        raise CorpusError(
            f"the workdir {shown(str(workdir))} lies in the data source {shown(source.path)!r}, which would read the"
            " run's own files; choose a --workdir elsewhere"
        )


def files_to_read(source: Source, problems: Problems) -> list[File]:
    """Return the files of a source, after saying which are left out and reporting what cannot be looked at.

    Raises:
        CorpusError: as `find_files`, or there are faults and `problems` refuses them.
    """
    found = find_files(source)
    if found.left_out:
        log.warning(
            "data source %s: %d files of another kind are left out, for example %s",
            shown(source.path),
            len(found.left_out),
            shown(found.left_out[0]),
        )
    for fault in found.faults:
        problems.report(fault)
    return found.files


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether `glob` would find a path of these parts by a pattern."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def all_files(root: Path) -> list[File]:
    """Return every file below a folder that is not hidden, sorted by name."""
    return sorted(_walk(root, []))


def _walk(root: Path, faults: list[str], not_entered: Iterable[str] = ()) -> list[File]:
    """Return the files below a folder.

    `not_entered` is for the standard library: only its modules are returned, without the generated tables among them.
    """
    files: list[File] = []
    entered = {_identity(os.stat(root))}

    def refuse(error: OSError) -> None:
        faults.append(f"corpus folder {shown(error.filename)} cannot be listed: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=not not_entered):
        # A link may lead back to a folder that was entered.
        kept = [
            name
            for name in sorted(subfolders)
            if not name.startswith(".") and name != "__pycache__" and name not in not_entered
        ]
        subfolders[:] = [name for name in kept if _enter(Path(folder, name), entered, faults)]
        names = _saved_shards(Path(folder), names, subfolders) if not not_entered else names
        prefix = os.path.join(os.path.relpath(folder, root), "").removeprefix("./")
        for name in names:
            if name.startswith(".") or (not_entered and not name.endswith(".py")):
                continue
            path = Path(folder, name)
            status = _status(path, faults)
            if status is not None and not (not_entered and status.st_size > LARGEST_WHOLE_FILE):
                files.append(_file(prefix + name, path, status))
    return files


def _enter(folder: Path, entered: set[tuple[int, int]], faults: list[str]) -> bool:
    """Return whether a folder was not entered before, and note it."""
    try:
        identity = _identity(os.stat(folder))
    except OSError as error:
        faults.append(f"corpus folder {shown(folder)} cannot be listed: {error.strerror}")
        return False
    is_new = identity not in entered
    entered.add(identity)
    return is_new


def _status(path: Path, faults: list[str]) -> os.stat_result | None:
    """Return the status of a regular file; anything else is a fault."""
    try:
        status = os.stat(path)
    except OSError as error:  # a broken link, a link to itself, a folder that may not be searched
        faults.append(f"{shown(path)} cannot be read: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):
        faults.append(f"{shown(path)} is {kind_of(status.st_mode)}, not a regular file")
        return None
    return status


def _saved_shards(folder: Path, names: list[str], subfolders: list[str]) -> list[str]:
    """Return the shards of a folder that `datasets` saved, or `names` if it did not.

    Raises:
        CorpusError: it holds several splits.
    """
    if "dataset_dict.json" in names and len(subfolders) > 1:
        raise CorpusError(
            f"{shown(folder)} was saved by `datasets` with the splits {sorted(subfolders)}; name one of them, for"
            f" example {shown(folder / sorted(subfolders)[0])!r}"
        )
    if not {"state.json", "dataset_info.json"} <= set(names):
        return names
    shards = read_json(folder / "state.json").get("_data_files")  # beside them may lie cache-*.arrow of `map`
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and isinstance(shard.get("filename"), str) and "/" not in shard["filename"]
        for shard in shards
    ):
        raise CorpusError(f"{shown(folder / 'state.json')} names no _data_files; save the data set again")
    return [shard["filename"] for shard in shards]


def _select(found: list[File], named: str) -> tuple[list[File], list[str]]:
    """Return the files of a folder that are read, and the names of the others; the page above says which."""
    about = [file for file in found if _is_about(file)]
    others = [file for file in found if not _is_about(file)]
    tables = [
        file for file in others if format_of(file.name).kind in TABLES and not file.name.lower().endswith(".json")
    ]
    jsons = [file for file in others if file.name.lower().endswith(".json")]
    if tables:
        files = tables + [file for file in others if file.name.lower().endswith(".txt") or _is_compressed_text(file)]
    elif len(jsons) == len(others):
        files = jsons or about
    else:
        files = [file for file in found if not file.name.lower().endswith((".json", "_success"))]
    chosen = set(files)
    rest = [file for file in found if file not in chosen]
    unwanted = [file for file in rest if not _is_about(file)]
    if sum(file.size for file in unwanted) > sum(file.size for file in files):
        raise CorpusError(
            f"{named} holds {len(files)} files such as {shown(files[0].name)} and {len(unwanted)} of another kind such"
            f" as {shown(unwanted[0].name)}, which have more bytes; say which are meant with a pattern such as"
            f" '.../**/*{Path(files[0].name).suffix}'"
        )
    return sorted(files), [file.name for file in rest]


def _matching(named: str, pattern: str) -> CorpusFiles:
    """Return the files that a pattern matches. They are meant, so none is left out."""
    faults: list[str] = []
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    statuses = [(path, _status(path, faults)) for path in paths]
    files = [_file(path.relative_to(root).as_posix(), path, status) for path, status in statuses if status is not None]
    if not files and not faults:
        raise CorpusError(f"{named} matches no file; name a folder, a file, or another pattern")
    return CorpusFiles(sorted(files), [], faults)


def _file(name: str, path: Path, status: os.stat_result) -> File:
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return File(name, path, status.st_size, status.st_mtime_ns)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_about(file: File) -> bool:
    name = file.name.rpartition("/")[2]
    return name.partition(".")[0].upper() in ABOUT_STEMS or name.lower() in ABOUT_NAMES


def _is_compressed_text(file: File) -> bool:
    return format_of(file.name) == ("text", True, "")
