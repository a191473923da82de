"""What a file system refused, and what to do about it.

Errors of writing come from many libraries. Python's are `OSError`s with a number; TensorStore's are `ValueError`s whose
text ends in `[os_error_code='28']`; others wrap one of these. `error_number` finds the number, `remedy` says in words
what helps: a full disk needs room, a limit on open files does not.
"""

import errno
import re
import shutil
from pathlib import Path

_CODE = re.compile(r"\[os_error_code='(\d+)'\]")

FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    (errno.EACCES, errno.EPERM): "this user may not write there: change the owner or the permissions",
    (errno.EROFS,): "the file system is mounted read-only: mount it for writing",
    (errno.EMFILE, errno.ENFILE): "too many files are open: raise the limit, for example with ulimit -n 4096",
    (errno.EFBIG,): "a file may not become that large: raise the limit (ulimit -f), or use another file system",
    (errno.EIO, errno.ENXIO, errno.ESTALE, errno.EREMOTEIO): (
        "the disk or its network fails: look into the system's log (dmesg) before you trust it again"
    ),
    (errno.ENOMEM, errno.EAGAIN): "the system gave no memory or no thread: end other programs, or raise the limits",
    (errno.ENOENT, errno.ENOTDIR): "the folder was removed or replaced while the program ran: put it back",
}


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error or of one that it wraps, such as `errno.ENOSPC`; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := _CODE.search(str(error)):
            return int(match[1])
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        error = error.__cause__ or error.__context__
    return None


def remedy(error: BaseException, folder: Path, advice: str = "") -> str:
    """Return what helps against a failed write into `folder`, as words without a full stop.

    `advice` says how this program needs less room, for the case that room is what is missing.
    """
    number = error_number(error)
    if number in FULL:
        return f"{_free(folder)}make room{advice}"
    return next((words for numbers, words in _REMEDIES.items() if number in numbers), f"look at {folder}")


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free there: "
    except OSError:
        return ""
