"""Kernels inside a `shard_map` that checks over which mesh axes arrays vary.

A kernel's equations know nothing of mesh axes: JAX refuses references that vary, and takes what a kernel returns for
equal on all devices, so that its gradient would be summed over them once more. `invariant` hides the axes from the
kernel, `vary` declares them again after it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# the switch of shard_map's check_vma, for which JAX has no public scope around a single call
from jax._src import config as jax_config
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels.lowering import export_cache

unchecked = functools.partial(jax_config._check_vma, False)

# `vary` backwards: the same array, declared to be equal on all devices. Without it the kernel's equations mix types and
# fail where JAX traces them again. It has no public name because the claim is false: what is computed from it must be
# declared to vary again.
_invariant_p = Primitive("invariant")
_invariant_p.def_impl(lambda x: x)
_invariant_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_invariant_p, lambda ctx, x: [x])


def invariant(tree: Any) -> Any:
    """Return the same arrays, declared to be equal on all devices."""
    return jax.tree.map(lambda x: _invariant_p.bind(x) if varies_over(x) else x, tree)


def varies_over(tree: Any) -> frozenset[str]:
    """Return the mesh axes that any array of `tree` varies over; a leaf that is not an array varies over no axis."""
    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Return the same arrays, declared to vary over `axes`."""

    def one(x):
        missing = tuple(axes - varies_over(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def call(kernel: Callable, *operands: Any, **options: Any) -> Any:
    """Return `kernel(*operands, **options)`, varying over the mesh axes that any array among the operands varies over.

    The kernel is a jitted function of its own: a program that calls it ten times with the same shapes lowers it once.
    """
    if isinstance(kernel, functools.partial):  # a new object at every call; jit remembers its function
        kernel, options = kernel.func, kernel.keywords | options
    leaves, tree = jax.tree.flatten((operands, options))
    is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
    arrays = [jnp.asarray(x) for x, array in zip(leaves, is_array, strict=True) if array]
    others = tuple(None if array else x for x, array in zip(leaves, is_array, strict=True))
    axes = varies_over(arrays)
    with unchecked() if axes else contextlib.nullcontext():
        result = _call(kernel, tree, others, invariant(arrays))
    return vary(result, axes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(kernel: Callable, tree: Any, others: tuple, arrays: list[jax.Array]) -> Any:
    def run(arrays):
        rest = iter(arrays)
        operands, options = jax.tree.unflatten(tree, [next(rest) if x is None else x for x in others])
        token = _OPERATION.set(kernel.__name__)
        try:
            return kernel(*operands, **options)
        finally:
            _OPERATION.reset(token)

    cache = export_cache.current()
    if cache is None:
        return run(arrays)
    return cache.call(run, kernel.__name__, (kernel.__module__, kernel.__qualname__, tree, others), arrays)


_OPERATION: contextvars.ContextVar[str | None] = contextvars.ContextVar("operation", default=None)


def operation(body: Callable) -> str:
    """Return the name of the operation that is being called, for profiles.

    Outside of `call`, it is that of the function that defines `body`.
    """
    return _OPERATION.get() or body.__qualname__.split(".")[0]
