"""Who can write where programs are kept: a program from a file runs with all rights of the process that reads it.

So a folder of programs is used only if nobody else can put a file into it, or another folder in its place: it and all
folders above it belong to this user or to root, and others cannot write there. A folder above with the sticky bit
(`/tmp`) may be written by all, because only owners rename what lies in it. A group that has this user alone is not
"others": on many systems all files of a user are writable by it. Access lists beyond the mode are not looked at.
"""

import os
import stat
from pathlib import Path


def fault_of(path: Path) -> str | None:
    """Return why programs at `path`, a folder or a file that may not exist yet, are not to be trusted, or None."""
    if not hasattr(os, "geteuid"):
        return "this system does not tell who can write there"
    try:
        whole = path.resolve()
        for part in (whole, *whole.parents):
            if part.exists() and (fault := _fault(part.stat(), above=part != whole)):
                return f"{part} {fault}"
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror}"
    return None


def make_private(folder: Path) -> None:
    """Make `folder` and those above it that are missing, each for this user alone.

    Raises:
        OSError: a folder cannot be made.
    """
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)


def _fault(status: os.stat_result, above: bool) -> str | None:
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({status.st_uid})"
    open_to_all = status.st_mode & stat.S_IWOTH
    open_to_group = status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)
    sticky = above and status.st_mode & stat.S_ISVTX
    if (open_to_all or open_to_group) and not sticky:
        return f"can be written by {'all users' if open_to_all else f'group {status.st_gid}'}"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is this user's own: of the same name, without other members."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}
