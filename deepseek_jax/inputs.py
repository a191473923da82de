"""Paths and files that a user names: checked at the door, read within limits.

A path may have "~" in front. It may not be an address of a bucket, which `pathlib` would turn into a local folder of
that name. A small file (a config.json, a tokenizer, a record of metrics) is read whole, and only if it is a regular
file of a bearable size: a FIFO would wait for ever, a device has no end. Every refusal is a ValueError that names the
path and the remedy.
"""

import contextlib
import ipaddress
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_PATH = 4096  # bytes, Linux's PATH_MAX
LARGEST_SMALL_FILE = 256 << 20  # bytes; the largest known tokenizer.json has 35 MB
LONGEST_SHOWN = 200  # characters of a foreign text in a message


def local_path(text: str, name: str) -> Path:
    """Return `text` as a path of this machine, with "~" expanded; `name` says which flag or key it is.

    Raises:
        ValueError: it is empty, an address such as "gs://bucket/run", too long, or has a NUL in it.
    """
    if not text.strip():
        raise ValueError(f"{name} is empty; name a folder or a file")
    if "://" in text:
        raise ValueError(
            f"{name} = {shown(text)} is an address; only paths of this machine work: mount the bucket, or copy it"
        )
    if "\0" in text or len(os.fsencode(text)) > LONGEST_PATH:
        raise ValueError(f"{name} = {shown(text)} is not a path: it is too long or has a NUL; name a folder or a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user, or no home
        raise ValueError(f"{name} = {shown(text)}: the home folder is unknown; write the whole path") from error


def new_folder(text: str, name: str) -> Path:
    """Return `text` as the path of a folder that exists or can be made; nothing is made yet.

    Raises:
        ValueError: as `local_path`, or something else has that name, or the folder above refuses.
    """
    path = local_path(text, name)
    shown_path = shown(str(path))
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if _exists(folder))
        is_folder = there.is_dir()
    except OSError as error:  # a name that the file system refuses, for example for its length
        raise ValueError(f"{name} = {shown_path} cannot be a folder: {error.strerror}; name another") from error
    if not is_folder:
        raise ValueError(f"{name} = {shown_path} cannot be a folder: {shown(str(there))} is none; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} = {shown_path}: {shown(str(there))} may not be written; change its permissions")
    return path


def new_file(text: str, name: str) -> Path:
    """Return `text` as the path of a file that can be written, its folders made if need be; nothing is written yet.

    Raises:
        ValueError: as `local_path`, it is a folder, or it may not be written.
    """
    path = local_path(text, name)
    shown_path = shown(str(path))
    try:
        exists = _exists(path)
        if path.is_dir():
            raise ValueError(f"{name} = {shown_path} is a folder; name a file")
    except OSError as error:
        raise ValueError(f"{name} = {shown_path} cannot be a file: {error.strerror}; name another") from error
    if not exists:
        new_folder(str(path.parent), name)
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{name} = {shown_path} may not be written; change its permissions, or name another")
    return path


@contextlib.contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises:
        ValueError: it does not exist, cannot be opened or read, or is not a regular file.
    """
    shown_path = shown(str(path))
    try:
        # O_NONBLOCK: opening a FIFO without a writer returns at once.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"{shown_path} is {kind_of(mode)}; put a regular file there")
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(
            f"{shown_path} cannot be read: {error.strerror}; check the path and its permissions"
        ) from error


def read_bytes(path: Path, limit: int = LARGEST_SMALL_FILE) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        ValueError: as `regular_file`, or it is larger.
    """
    with regular_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(
            f"{shown(str(path))} is larger than the {limit} bytes that such a file may have; put the right one"
        )
    return content


def read_text(path: Path, limit: int = LARGEST_SMALL_FILE) -> str:
    """Return the content of a UTF-8 file; line ends stay as they are.

    Raises:
        ValueError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(str(path))} is not UTF-8 text (byte {error.start}); restore or convert it") from error


def json_lines(path: Path, named: str) -> Iterator[tuple[str, Any]]:
    """Yield where each line of a file that is not blank stands, for messages ("NAMED, line 3"), and its JSON value.

    Raises:
        ValueError: as `read_text`, or a line is not JSON.
    """
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            where = f"{named}, line {number}"
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({shown(str(error))}); write one object a line") from error
            yield where, value


def read_json(path: Path, kind: type = dict, limit: int = LARGEST_SMALL_FILE) -> Any:
    """Return the JSON value of a file, whose outermost type is `kind`.

    Raises:
        ValueError: as `read_text`, or it is not JSON, too deep, or of another kind.
    """
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except ValueError as error:  # also for an integer of thousands of digits
        raise ValueError(f"{shown(str(path))} is not valid JSON ({error}); restore or repair it") from error
    except RecursionError as error:
        raise ValueError(f"{shown(str(path))} is nested too deeply for JSON; restore or repair it") from error
    if not isinstance(value, kind):
        raise ValueError(
            f"{shown(str(path))} holds a {type(value).__name__}, not a {kind.__name__}; restore or repair it"
        )
    return value


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(text: str | os.PathLike) -> str:
    """Return foreign text fit for a terminal: control characters escaped, and not longer than `LONGEST_SHOWN`."""
    text = os.fspath(text)
    text = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}...{text[-LONGEST_SHOWN // 2 :]}"
    return printable(text)


def printable_lines(text: str) -> str:
    """Return a text fit for a terminal: control characters escaped, except line breaks and tabs."""
    return "".join(character if character in "\n\t" else printable(character) for character in text)


def printable(text: str) -> str:
    """Return a line of text fit for a terminal: control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _exists(path: Path) -> bool:
    """Return whether there is anything of this name, a symbolic link to nothing included."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def kind_of(mode: int) -> str:
    """Return what a file with this `st_mode` is, in words: "a folder", "a FIFO"."""
    kinds = {
        "a regular file": stat.S_ISREG,
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "something else")
