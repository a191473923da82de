"""Which face of an operation runs: its Hopper kernel, its TPU kernel, or the reference.

"auto" takes the kernel of the hardware that the program will run on, and the reference elsewhere; it logs each choice
once, with its reason. A named implementation runs or raises: nothing falls back silently.
"""

import functools
import logging
from collections.abc import Callable, Mapping

import jax
from jax.extend import backend

from pallas_kernels.lowering import manual_axes

LOGGER = logging.getLogger(__name__)
HOPPER = "9.0"  # compute capability
IMPLEMENTATIONS = ("auto", "reference", "hopper", "tpu")


def choose(operation: str, implementation: str, faces: Mapping[str, Callable]) -> Callable:
    """Return the face of `operation` to call.

    Args:
        operation: its name, for messages.
        implementation: "auto", or one of `faces`.
        faces: "reference", and the kernels that exist: "hopper", "tpu".

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: it is known, but this operation has no such kernel, or this hardware cannot run it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {implementation!r} is unknown; it must be one of {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation, reason = _best(frozenset(faces), *_hardware())
        _log_once(operation, implementation, reason)
    if implementation not in faces:
        raise NotImplementedError(f"{operation} has no {implementation!r} kernel; it has {sorted(faces)}")
    face = faces[implementation]
    return face if implementation == "reference" else functools.partial(manual_axes.call, face)


def _best(faces: frozenset[str], platform: str, kind: str) -> tuple[str, str]:
    wanted = {"gpu": "hopper", "tpu": "tpu"}.get(platform)
    if wanted is None:
        return "reference", f"there are no kernels for {platform}"
    if wanted == "hopper" and kind != HOPPER:
        return "reference", f"the kernels are for compute capability 9.0, this GPU has {kind}"
    if wanted not in faces:
        return "reference", f"there is no {wanted} kernel of this operation"
    return wanted, f"{platform} {kind}"


def on_hopper() -> bool:
    """Whether a program traced now will run on a GPU that the Hopper kernels are for."""
    return _hardware() == ("gpu", HOPPER)


def _hardware() -> tuple[str, str]:
    """Platform and kind of the device that a program traced now will run on.

    They are "gpu" and its compute capability, or "tpu" and its name.
    """
    device = backend.get_default_device()
    return device.platform, str(getattr(device, "compute_capability", device.device_kind))


@functools.cache
def _log_once(operation: str, implementation: str, reason: str) -> None:
    LOGGER.info("%s: %s (%s)", operation, implementation, reason)


def num_multiprocessors() -> int:
    """Return the number of streaming multiprocessors of the GPU that runs the program.

    Where the GPU is not visible it is 132, that of an H100 and an H200.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract and abstract.num_cores:
        return abstract.num_cores
    device = backend.get_default_device()
    return device.core_count if device.platform == "gpu" else 132
