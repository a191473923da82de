"""The walls of a sandbox: what the process that runs foreign code cannot see, reach or use up.

`build` runs in a fresh process (`inside`), which gets namespaces of its own and there a file system of its own:

    /scratch           empty, in memory, a few MiB, the only place to write
    Python's library   read only, without site-packages
    /lib, /usr/lib     read only: the C libraries that Python's library loads

There is no /proc, /dev, /home or /tmp, no program to start, no network device (not even loopback that is up), and no
other process. `enter` runs in that process's child, number 1 of its process namespace: when it dies the kernel kills
all others of the namespace. It takes away every privilege, sets the limits and refuses system calls
(`system_calls`).

An ordinary user makes a user namespace first, which carries the right to make the others. Root makes them as root and
becomes user 65534 in `enter`, as the kernel limits no process of root; its second user namespace makes the count of
processes start at one, however many other processes that user has.
"""

import ctypes
import os
import resource
import sys
import sysconfig

NOBODY = 65534
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
PACKAGES = "site-packages", "dist-packages"  # in a Python's folder
WORK = "/scratch"
NEW_ROOT = "/proc"  # a folder that exists everywhere and is not needed after this: the new root is mounted over it

# linux/mount.h, linux/prctl.h, linux/capability.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_RECURSIVE, ATTR_READ_ONLY_NOSUID_NODEV = 442, 0x8000, 1 | 2 | 4
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise what a call of the C library reported."""
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends."""
    check(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def build(disk_bytes: int) -> None:
    """Move this process into new namespaces and a new root; its next child is process 1 of them.

    Raises:
        OSError: the kernel, or the container that this runs in, does not permit it.
    """
    user, group = os.getuid(), os.getgid()
    others = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if user == 0:
        os.unshare(others)
    else:
        os.unshare(os.CLONE_NEWUSER | others)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=256k,nr_inodes=256,mode=755")
    os.mkdir(NEW_ROOT + WORK)
    os.mkdir(NEW_ROOT + "/empty")
    _show_libraries()
    attributes = (ctypes.c_uint64 * 4)(ATTR_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    check(
        libc.syscall(
            MOUNT_SETATTR, -100, NEW_ROOT.encode(), AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
        ),
        "mount_setattr",
    )
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _mount("tmpfs", NEW_ROOT + WORK, "tmpfs", flags, f"size={disk_bytes},nr_inodes=128,mode=777")
    os.chdir(NEW_ROOT)
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir(WORK)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind, data)]
    check(libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3]), f"mount {target}")


def _show_libraries() -> None:
    """Show Python's library and the C libraries under the new root, without packages that were installed."""
    standard = sysconfig.get_path("stdlib")
    folders = {*LIBRARIES, os.path.join(sys.base_prefix, "lib"), standard, *filter(os.path.isdir, sys.path)}
    shown: list[str] = []
    for folder in sorted(folders):
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), NEW_ROOT + folder)
            folder = os.path.realpath(folder)
        if os.path.isdir(folder) and not any(folder == other or folder.startswith(other + "/") for other in shown):
            os.makedirs(NEW_ROOT + folder, exist_ok=True)
            _mount(folder, NEW_ROOT + folder, None, MS_BIND | MS_REC)
            shown.append(folder)
    pythons = {standard}
    for folder in shown:  # a system has packages for its own Python too: /usr/lib/python3/dist-packages
        pythons |= {entry.path for entry in os.scandir(folder) if entry.name.startswith("python") and entry.is_dir()}
    covered: set[str] = set()
    for packages in (os.path.join(python, name) for python in sorted(pythons) for name in PACKAGES):
        real = os.path.realpath(packages)
        if real not in covered and os.path.isdir(NEW_ROOT + real):
            _mount(NEW_ROOT + "/empty", NEW_ROOT + real, None, MS_BIND)
            covered.add(real)


def enter(limits: dict[str, int]) -> None:
    """Give up every privilege, set the limits, refuse system calls. There is no way back.

    Raises:
        OSError: one of them is not permitted; nothing foreign has run then.
    """
    os.setsid()
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.unshare(os.CLONE_NEWUSER)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    die_with_parent()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
