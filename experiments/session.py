"""The start of every command: other processes, the simulated mesh, the compilation cache, the CPU's memory."""

import ctypes
import importlib.util
import os
import re
from pathlib import Path

import jax
from absl import flags, logging

from deepseek_jax.inputs import shown
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import environment
from experiments import accelerator, program_cache
from pallas_kernels.lowering import export_cache

# On two cores 1,024 simulated devices start and sum an array in two seconds. 100,000 were not ready after minutes: each
# has threads of its own.
MOST_CPU_DEVICES = 1024
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Simulate a mesh of this many devices on the CPU.",
    lower_bound=1,
    upper_bound=MOST_CPU_DEVICES,
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Run as one of several processes. JAX finds the others on TPU pods, SLURM, Open MPI and Kubernetes.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for clusters where JAX does not find the processes by itself."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator: number of processes.", lower_bound=1, upper_bound=2**20
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator: index of this process, from 0.", lower_bound=0, upper_bound=2**20
)
CONNECT_SECONDS = flags.DEFINE_integer(
    "connect_seconds",
    processes.CONNECT_SECONDS,
    "How long the processes of a run wait for each other at the start.",
    lower_bound=1,
)

# The cache keeps programs that compile for longer. A kernel takes 0.3 to 2 s; JAX's own limit is 1 s.
KERNEL_COMPILE_SECONDS = 0.2
# The devices of a simulated mesh share the cores, so the last may reach a collective long after the first: a step of
# `tiny` on 64 devices of two cores took 41 s. XLA gives up after 40 s, and the process dies.
COLLECTIVE_SECONDS = 24 * 3600
COLLECTIVE_FLAGS = (
    "xla_cpu_collective_call_warn_stuck_timeout_seconds",
    "xla_cpu_collective_call_terminate_timeout_seconds",
)
HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")
# What our programs assume of JAX: arithmetic in 32 bits and fewer, NumPy's rules for mixed dtypes and ranks.
UNFIT = {
    "jax_enable_x64": (True, "computes in 64 bits"),
    "jax_numpy_dtype_promotion": ("strict", "refuses mixed dtypes"),
    "jax_numpy_rank_promotion": ("raise", "refuses broadcasting"),
}


def start(keep_heap: bool = True) -> None:
    """Join the other processes if there are any, apply --cpu_devices to this one, and use the persistent compilation
    cache ($JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder).

    Call it before anything runs on a device, and after the checks that need none. Without --cpu_devices the platform is
    that of `accelerator.choose`. `keep_heap` suits steps that allocate the same memory again and again; a command that
    moves a model once should give its memory back.

    Raises:
        ValueError: the flags about processes do not fit each other, a variable of the environment makes JAX compute
            otherwise than our programs assume, or the platform that it names is not there.
    """
    check_environment()
    check_processes()
    if CPU_DEVICES.value is not None:
        simulate_devices(CPU_DEVICES.value)
    use_compilation_cache()
    if keep_heap and computes_on_cpu():
        keep_freed_memory(CPU_HEAP_BYTES)
    join_processes()
    start_devices()


def check_environment() -> None:
    """Refuse variables of the environment with which our programs cannot run."""
    for name, (value, effect) in UNFIT.items():
        if getattr(jax.config, name) == value:
            raise ValueError(f"{name.upper()}={value} {effect}; this project does not: unset it")


def simulate_devices(count: int) -> None:
    """Make `count` devices of the CPU, and let their collectives wait for each other."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"--{flag}={COLLECTIVE_SECONDS}" for flag in COLLECTIVE_FLAGS if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()


def use_compilation_cache() -> None:
    """Keep compiled programs for the next command, if there is a folder for them."""
    if not jax.config.jax_compilation_cache_dir:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # neither $HOME nor an entry in /etc/passwd, as in some containers
            logging.warning("there is no home folder: set JAX_COMPILATION_CACHE_DIR, and programs compile only once")
            export_cache.enable(None)
            return
        jax.config.update("jax_compilation_cache_dir", str(home / "deepseek_jax" / "compiled"))
    cache = jax.config.jax_compilation_cache_dir
    program_cache.write_whole()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KERNEL_COMPILE_SECONDS)
    export_cache.enable(None if "://" in cache else Path(cache) / "kernels")  # a bucket keeps only what JAX writes


def start_devices() -> None:
    """Start JAX's devices.

    Raises:
        ValueError: the platform that $JAX_PLATFORMS names, or that was found, cannot be used.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "") or "no such device"
        platforms = jax.config.jax_platforms or ""
        if "JAX_PLATFORMS" in os.environ:
            told = f"JAX_PLATFORMS={platforms} cannot be used here ({shown(reason)}); unset it, or set it to cpu"
        else:
            found = platforms.partition(",")[0]
            told = (
                f"there is a device for JAX's platform {found!r} here, and it does not start ({shown(reason)}); install"
                f" the extra '.[{found}]', repair the driver, or set JAX_PLATFORMS=cpu"
            )
        raise ValueError(told) from error


def check_processes() -> None:
    """Refuse flags about processes that do not fit each other, or the machine."""
    given = {f"--{flag.name}": flag.value for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} is missing: {', '.join(given)} belong together; or use --distributed")
    if not missing:
        found = HOST_AND_PORT.fullmatch(COORDINATOR.value)
        if not found or not 0 < int(found["port"]) < 2**16:
            raise ValueError(
                f"--coordinator={shown(COORDINATOR.value)} must be host:port of process 0, such as 10.0.0.1:1234"
            )
        if PROCESS_ID.value >= NUM_PROCESSES.value:
            raise ValueError(
                f"--process_id={PROCESS_ID.value} must be below --num_processes={NUM_PROCESSES.value}: it counts from 0"
            )
    elif DISTRIBUTED.value and "KUBERNETES_SERVICE_HOST" in os.environ and not importlib.util.find_spec("kubernetes"):
        raise ValueError(
            "--distributed: in Kubernetes JAX finds the processes with the package kubernetes, which is missing: pip"
            " install 'jax[k8s]', or give --coordinator, --num_processes and --process_id"
        )


def join_processes() -> None:
    """Start `jax.distributed` if the flags ask for it."""
    if COORDINATOR.value is not None:
        processes.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CONNECT_SECONDS.value)
    elif DISTRIBUTED.value:
        processes.join(None, None, None, CONNECT_SECONDS.value)


def computes_on_cpu() -> bool:
    """Return whether JAX will choose the CPU, as far as one can tell without starting its backends."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return accelerator.find() is None


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
