"""What every command does before it touches a device: the simulated mesh, the compilation cache, quiet logs."""

import os
from pathlib import Path

import jax
from absl import flags, logging

CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Simulate a mesh of this many devices on the CPU.", lower_bound=1)


def start() -> None:
    """Apply --cpu_devices and use the persistent compilation cache ($JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder).

    Without --cpu_devices JAX chooses the platform itself.
    """
    logging.set_verbosity(logging.WARNING)
    if CPU_DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "deepseek_jax" / "compiled"))
