"""The start of every command: other processes, the simulated mesh, the compilation cache, the CPU's memory."""

import ctypes
import os
from pathlib import Path

import jax
from absl import flags, logging

from deepseek_jax.parallel.mesh import environment
from pallas_kernels.lowering import export_cache

CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Simulate a mesh of this many devices on the CPU.", lower_bound=1
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Run as one of several processes. JAX finds the others on TPU pods, SLURM, Open MPI and Kubernetes.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for clusters where JAX does not find the processes by itself."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: number of processes.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator: index of this process, from 0.", lower_bound=0
)

# The cache keeps programs that compile for longer. A kernel takes 0.3 to 2 s; JAX's own limit is 1 s.
KERNEL_COMPILE_SECONDS = 0.2


def start(keep_heap: bool = True) -> None:
    """Join the other processes if there are any, apply --cpu_devices to this one, and use the persistent compilation
    cache ($JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder).

    Call it before anything runs on a device. Without --cpu_devices JAX chooses the platform itself. `keep_heap` suits
    steps that allocate the same memory again and again; a command that moves a model once should give its memory back.

    Raises:
        ValueError: only some of --coordinator, --num_processes and --process_id are given.
    """
    logging.set_verbosity(logging.WARNING)
    if CPU_DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "deepseek_jax" / "compiled"))
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KERNEL_COMPILE_SECONDS)
    export_cache.enable(None if "://" in cache else Path(cache) / "kernels")  # a bucket keeps only what JAX writes
    if keep_heap and computes_on_cpu():
        keep_freed_memory(CPU_HEAP_BYTES)
    join_processes()


def join_processes() -> None:
    """Start `jax.distributed` if the flags ask for it."""
    given = {
        "coordinator_address": COORDINATOR.value,
        "num_processes": NUM_PROCESSES.value,
        "process_id": PROCESS_ID.value,
    }
    if all(value is not None for value in given.values()):
        jax.distributed.initialize(**given)
    elif any(value is not None for value in given.values()):
        raise ValueError(
            f"--coordinator, --num_processes and --process_id belong together; got {given}; give all three, or"
            " --distributed"
        )
    elif DISTRIBUTED.value:
        jax.distributed.initialize()


def computes_on_cpu() -> bool:
    """Return whether JAX will choose the CPU, as far as one can tell without starting its backends."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    devices = Path("/dev")
    return not any([*devices.glob("nvidia[0-9]*"), *devices.glob("accel*"), *devices.glob("vfio/[0-9]*")])


def describe_device(mesh: jax.sharding.Mesh) -> str:
    """Return the number and kind of the devices, and for a CPU its number of cores."""
    here = environment(mesh)
    cores = f", {here['cores']} cores" if here["platform"] == "cpu" else ""
    return f"{mesh.size} x {here['device_kind']}{cores}"


# On a CPU the temporaries of a step are one malloc. glibc maps a block above 32 MiB anew, and unmaps it when it is
# freed. So every step of `tiny` touched 0.5 GiB of fresh pages: 132,000 page faults, a fifth of the step
# (experiments/log.md). A heap of 4 GiB costs only address space.
CPU_HEAP_BYTES = 4 << 30
# parameter and value, glibc's malloc.h
MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 << 20


def keep_freed_memory(heap_bytes: int) -> bool:
    """Make malloc serve large blocks from one heap that it never gives back, on huge pages if the kernel allows them.

    This affects threads that have not allocated yet, so call it before JAX starts its backend. Returns False, and does
    nothing, if the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    for parameter, value in MALLOPT.values():
        libc.mallopt(parameter, value)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(heap_bytes))
    if block:
        aligned = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(heap_bytes - HUGE_PAGE_BYTES), MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))
    return True
