"""Which face of an operation runs: its Hopper kernel, its TPU kernel, or the reference.

"auto" takes the kernel of the hardware that the program will run on, and the reference elsewhere; it logs each choice
once, with its reason. A named implementation runs or raises: nothing falls back silently.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np

# whether kernels are interpreted, which works on a CPU; JAX has no public way to ask
from jax._src import config as jax_config
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.lowering import manual_axes

LOGGER = logging.getLogger(__name__)
HOPPER = "9.0"  # compute capability
IMPLEMENTATIONS = ("auto", "reference", "hopper", "tpu")
OUTLINED = "kernel_"  # how the name of a call begins that stands for a kernel
_is_outlined: ContextVar[bool] = ContextVar("_is_outlined", default=False)


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
    if implementation == "reference":
        return functools.partial(_call, operation, face) if _is_outlined.get() else face
    if isinstance(face, functools.partial):
        kernel = functools.partial(_guarded(face.func, operation, implementation), *face.args, **face.keywords)
    else:
        kernel = _guarded(face, operation, implementation)
    return functools.partial(manual_axes.call, kernel)


@contextmanager
def outlined() -> Iterator[None]:
    """Trace each reference as one call, named OUTLINED and the operation, and once for all operands of the same shapes.

    A program that is traced to be read, not run, is then as short as one with kernels.
    """
    token = _is_outlined.set(True)
    try:
        yield
    finally:
        _is_outlined.reset(token)


def _call(operation: str, face: Callable, *operands: Any, **options: Any) -> Any:
    leaves, tree = jax.tree.flatten((operands, options))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    static = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return _outlined_call(operation, face, tree, tuple(is_array), static)(*arrays)


@functools.lru_cache(maxsize=256)
def _outlined_call(operation: str, face: Callable, tree: Any, is_array: tuple[bool, ...], static: tuple) -> Callable:
    def kernel(*arrays):
        given = iter(arrays)
        leaves = [next(given) if array else leaf for leaf, array in zip(static, is_array, strict=True)]
        operands, options = jax.tree.unflatten(tree, leaves)
        return face(*operands, **options)

    kernel.__name__ = OUTLINED + operation
    return jax.jit(kernel)


# The identity on an operand of a kernel. For which platform a program is, is known when it is lowered; ahead of time it
# is another than that of this process. There this primitive refuses hardware that the kernel cannot run on. Otherwise
# it leaves no trace.
_operand_p = Primitive("kernel_operand")
_operand_p.def_impl(lambda x, **_: x)
_operand_p.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_operand_p)


def _lower_operand(ctx: mlir.LoweringRuleContext, x: Any, *, operation: str, implementation: str) -> list[Any]:
    platforms = ctx.platforms or ctx.module_context.platforms
    wanted = {"hopper": "cuda", "tpu": "tpu"}[implementation]
    here, kind = _hardware()
    fault = next((f"on {platform}" for platform in platforms if platform != wanted), None)
    if not fault and wanted == "cuda" and here == "gpu" and kind != HOPPER:
        fault = f"on a GPU of compute capability {kind}, only on {HOPPER}"
    if fault:
        raise NotImplementedError(
            f"{operation}: implementation = {implementation!r} cannot run {fault}; use 'auto' or 'reference'"
        )
    return [x]


mlir.register_lowering(_operand_p, _lower_operand)


@functools.cache
def _guarded(face: Callable, operation: str, implementation: str) -> Callable:
    @functools.wraps(face)
    def kernel(*operands, **options):
        if jax_config.pallas_tpu_interpret_mode_context_manager.value is None:
            leaves, tree = jax.tree.flatten(operands)
            leaves[0] = _operand_p.bind(leaves[0], operation=operation, implementation=implementation)
            operands = jax.tree.unflatten(tree, leaves)
        return face(*operands, **options)

    return kernel


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
