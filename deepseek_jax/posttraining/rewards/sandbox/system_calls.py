"""System calls that a sandbox refuses: a filter (seccomp) that the kernel asks before each call.

Namespaces and limits hold the rest; the filter takes away the doors beside them: other programs, sockets, memory that
no limit counts (System V segments, memfd), other processes' memory, mounts, new namespaces, keys, and the large new
interfaces of the kernel. A refused call returns EPERM. The list is one of refusals, because which calls Python and the
C library make changes with each of their versions.
"""

import ctypes
import os
import platform

# name: (number on x86_64, number on aarch64); None where the architecture does not have it. From the kernel's tables.
REFUSED = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "syslog": (103, 116),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "chroot": (161, 51),
    "acct": (163, 89),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "quotactl": (179, 60),
    "io_setup": (206, 0),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "finit_module": (313, 273),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "execveat": (322, 281),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
    "open_tree_attr": (467, 467),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of linux/audit.h

LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF, linux/bpf_common.h
NUMBER, ARCHITECTURE = 0, 4  # bytes into struct seccomp_data
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: SECCOMP_RET_ERRNO with EPERM
X32 = 0x40000000  # x86_64's calls with 32-bit pointers have numbers from here
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


class Instruction(ctypes.Structure):
    """One instruction of classic BPF: struct sock_filter."""

    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]


class Program(ctypes.Structure):
    """A program of classic BPF: struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]


def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter for an architecture as (code, jump if true, jump if false, operand)."""
    column, architecture = ARCHITECTURES[machine]
    numbers = [row[column] for row in REFUSED.values() if row[column] is not None]
    tests = [(JUMP_IF_AT_LEAST, X32)] + [(JUMP_IF_EQUAL, number) for number in numbers]
    # A test that holds jumps over the tests after it and the return that allows.
    jumps = [(code, len(tests) - place, 0, operand) for place, (code, operand) in enumerate(tests)]
    return [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        *jumps,
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]


def refuse_system_calls(libc: ctypes.CDLL) -> None:
    """Refuse the calls of `REFUSED` to this thread and what it starts, for ever. `no_new_privs` must be set.

    Raises:
        OSError: the kernel does not take the filter.
    """
    rows = instructions(platform.machine())
    array = (Instruction * len(rows))(*(Instruction(*row) for row in rows))
    program = Program(len(rows), array)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
