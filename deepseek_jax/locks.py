"""One writer per folder: a lock that ends with the process that holds it.

The lock is an exclusive `flock` on the file `.lock` in the folder. The system releases it when its owner dies, so a
lock file that a killed process left behind keeps nobody out; the owner's name in it tells that it did not end well.
NFS turns `flock` into a lock of its server (that needs a file opened for writing, not a folder), so it holds between
hosts. It does not hold between hosts where NFS is mounted with `local_lock` or `nolock`, or Lustre with `localflock`.
A file system without any locks is named in a warning.
"""

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.inputs import shown

LOCK = ".lock"
LONGEST_OWNER = 200  # bytes of its name that are read
SECONDS_BETWEEN_TRIES = 0.2
NOT_WRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO),  # no folder, or something else in the way
}

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Keep other writers out of `folder` for the time of the context.

    Args:
        folder: exists.
        wait_seconds: how long to wait for another writer to end.

    Yields:
        Whether the writer before died without an end: it left its lock file.

    Raises:
        ValueError: another process writes into the folder; the message names it. Or no file can be made there.
    """
    path = folder / LOCK
    descriptor = _acquire(path, wait_seconds)
    try:
        abandoned = bool(_owner(descriptor))
        os.ftruncate(descriptor, 0)
        started = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()} since {started}".encode(), 0)
        yield abandoned
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, wait_seconds: float) -> int:
    """Return a descriptor of the file `path` that has the lock."""
    deadline, waiting = time.monotonic() + wait_seconds, False
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor) or "another process"
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{path.parent} is in use by {owner}; wait for its end, stop it, or choose another folder"
                ) from None
            if not waiting:
                log.warning("%s is in use by %s; waiting up to %g s for its end", path.parent, owner, wait_seconds)
            waiting = True
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        except OSError as error:
            log.warning("%s: the file system has no locks (%s); keep other writers out", path, error.strerror)
            return descriptor
        if _is_file(path, descriptor):
            return descriptor
        os.close(descriptor)  # the owner before removed the file between our opening and our lock


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise ValueError(f"{path} cannot be written: {error.strerror}; check the folder and its permissions") from error


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    return shown(os.pread(descriptor, LONGEST_OWNER, 0).decode(errors="replace"))
