"""What a benchmark of an operation is: its call, the work that it does, how it is timed, and its error."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.bench.shapes import DeepGemm, Masked, Shape

LAUNCHES = 5  # that the profiler times one after the other


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time: a jitted function with its operands, and the FLOPs or bytes of one call."""

    function: Callable
    operands: tuple
    work: int


class InPlace:
    """A function that adds to its last operand, jitted so that the last of its results takes that operand's place.

    The caller may repeat the operands: after the first call they give way to the results of earlier calls. There are as
    many accumulators as results that the profiler holds on to, and one more: a result that is given away is gone. To
    the profiler this is a jitted function (`jax.stages.Wrapped`).
    """

    def __init__(self, function: Callable) -> None:
        self._jitted = jax.jit(lambda total, *factors: function(*factors, total), donate_argnums=0)
        self._totals: collections.deque[Array] = collections.deque()
        self.trace, self.lower, self.eval_shape = self._jitted.trace, self._jitted.lower, self._jitted.eval_shape

    def __call__(self, *operands: Any) -> Any:
        """Return the function's result, for the operands but the last."""
        *factors, total = operands
        if not self._totals:
            self._totals.extend(total.copy() for _ in range(LAUNCHES + 1))
        result = self._jitted(self._totals.popleft(), *factors)
        self._totals.append(jax.tree.leaves(result)[-1])
        return result


@dataclasses.dataclass(frozen=True)
class Operation:
    """A public function and how to benchmark it.

    Attributes:
        name: selects it.
        call: the public function, on operands alone.
        rows: its shapes, with DeepGEMM's figures where there are any.
        operands: makes them from a key and a shape.
        precision: "fp8" or "bf16": which peak counts, and which XLA product stands first beside it.
        accumulates: whether the last operand is an accumulator that the last result replaces.
        exact: keywords with which the reference is as exact as FP32.
        hint: the keyword with which a caller tells about how large the shape's `rows` are, where sizes are known on the
            device only.
    """

    name: str
    call: Callable
    rows: Mapping[Any, DeepGemm | None]
    operands: Callable[[Array, Any], tuple]
    precision: str = "fp8"
    accumulates: bool = False
    exact: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hint: str | None = None

    def kernel(self, shape: Shape) -> Callable:
        """Return `call` on a shape's operands by the Hopper kernel."""
        hints = {self.hint: shape.rows} if self.hint else {}
        return functools.partial(self.call, implementation="hopper", **hints)

    def make_operands(self, key: Array, shape: Shape) -> tuple:
        """Return the operands on the device."""
        return jax.jit(lambda key: self.operands(key, shape))(key)

    def program(self, shape: Shape, operands: tuple) -> Program:
        """Return what is timed: the Hopper kernel, for an accumulating operation in place."""
        result = jax.eval_shape(functools.partial(self.call, implementation="reference"), *operands)
        function = (InPlace if self.accumulates else jax.jit)(self.kernel(shape))
        return Program(function, operands, work_of(shape, operands, result))

    def error(self, operands: tuple, result: Any) -> float:
        """Return the relative L2 error of the program's first result against the reference in FP32; 0 means equal."""
        exact = jax.jit(functools.partial(self.call, implementation="reference", **self.exact))
        return relative_error(result, exact(*operands))


def work_of(shape: Shape, operands: Any, result: Any) -> int:
    """Return the FLOPs of a call, or where memory binds, the bytes that must move.

    Those are each operand in and each result out, unless the shape knows better.
    """
    if shape.unit == "TFLOP/s":
        return shape.flops
    if isinstance(shape, Masked):
        return shape.bytes
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, result)))


@jax.jit
def _squares(x: Array, y: Array) -> tuple[Array, Array]:
    defined = ~jnp.isnan(y)  # the reference marks what is unspecified
    return jnp.where(defined, (x - y) ** 2, 0).sum(), jnp.where(defined, y**2, 0).sum()


def relative_error(result: Any, expected: Any) -> float:
    """Return |result - expected| / |expected| of the worst leaf; NaN if a result is NaN where the reference is not.

    FP8 values and their scales are compared as they are stored.
    """
    leaves = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    squares = [_squares(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in leaves]
    return float(jnp.max(jnp.stack([jnp.sqrt(difference / magnitude) for difference, magnitude in squares])))
