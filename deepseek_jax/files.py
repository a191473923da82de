"""Atomic writes of files, and work on a pool of threads whose results come in order."""

import contextlib
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

PARTIAL_MARK = ".partial-"  # in the name of a file that is being written

_numbers = itertools.count()


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace `path` by `content`, text as UTF-8. After a kill or a power cut `path` has the old content or the new.

    `mode` are the new file's permissions, less those that the process's umask takes away.
    """
    with replacing(path, mode) as descriptor:
        write_all(descriptor, memoryview(content.encode() if isinstance(content, str) else content))
        os.fsync(descriptor)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[int]:
    """Open a new file that replaces `path` at the end of the context; an exception removes it.

    Yields the file's descriptor. The caller calls `os.fsync` on it after the last byte, and so can say in its own error
    what a full disk means. The file lies beside `path` and is called `<name>.partial-<host>-<process>-<number>`, so no
    two writers share one.
    """
    partial = path.with_name(f"{path.name}{PARTIAL_MARK}{socket.gethostname()}-{os.getpid()}-{next(_numbers)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte of `data`; one system call may write only some of them."""
    while data:
        data = data[os.write(descriptor, data) :]


def in_order[Item, Result](
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` of each item, in the order of `items`, computed by `pool`.

    A result is yielded as soon as it and all earlier ones are done. At most `ahead` items are in work or wait for an
    earlier one. `items` is read in the caller's thread. An exception of `function` is raised where its result would
    have been yielded.
    """
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        while pending and (pending[0].done() or len(pending) >= ahead):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
