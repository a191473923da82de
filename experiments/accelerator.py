"""Where JAX computes when nobody says it: on the accelerator that this machine has, or on the CPU and nothing else.

Left to itself, JAX asks every plug-in that is installed. The extras `dev` and `tpu` install the ones for NVIDIA cards
and TPUs, to compile for them, and where there is no such device each prints a page of errors. And where a card is there
but fails, JAX would go on with the CPU.
"""

import importlib.util
import os
from pathlib import Path

import jax

DEVICES = {  # files of a device, in the order of preference; /dev/dxg is a card under Windows' Linux
    "cuda": ("nvidia[0-9]*", "dxg"),
    "tpu": ("accel[0-9]*", "vfio/[0-9]*"),
}
PLUGINS = {"cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
NO_CARDS = ("", "-1")  # of CUDA_VISIBLE_DEVICES


def find(folder: Path = Path("/dev")) -> str | None:
    """Return "cuda" or "tpu" if the machine has such a device that this process may use; else None."""
    for platform, patterns in DEVICES.items():
        hidden = platform == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") in NO_CARDS
        if not hidden and any(next(folder.glob(pattern), None) for pattern in patterns):
            return platform
    return None


def choose() -> None:
    """Set JAX's platforms if $JAX_PLATFORMS does not; call it before JAX starts its devices.

    Where a device is there and nothing to drive it with, JAX chooses, and says what is missing.
    """
    if "JAX_PLATFORMS" in os.environ or jax.config.jax_platforms:
        return
    found = find()
    if found is None:
        jax.config.update("jax_platforms", "cpu")
    elif any(map(importlib.util.find_spec, PLUGINS[found])):
        jax.config.update("jax_platforms", f"{found},cpu")
