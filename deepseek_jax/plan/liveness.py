"""How much memory the gradient of a micro-batch needs, from the traced program: what lives at once, at most.

The program is walked in its own order. An array lives from the equation that makes it to the last that reads it; a loop
needs what lives in one turn of its body beside what it stacks. What XLA fuses is never stored: the result of an
elementwise operation that one equation alone reads. Kernels need what they are given and what they give back. What lies
in host memory counts nothing.

This knows nothing of how a compiler orders, reuses or wastes memory. Beside what XLA set aside on H200s for whole steps
(experiments/log.md, 2026-11-30, by hand): `v3_5b` in BF16 4% less, in FP8 18% more; `moonlight_16b` on two cards in
BF16 1% less, in FP8 2% less. The walk is tested on small programs whose peak is known; those four figures are not.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, jaxprs_in_params

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import AnyMesh
from deepseek_jax.plan.traffic import trace_gradient
from pallas_kernels.dispatch import OUTLINED

LOOPS = ("scan", "while")
# Operations that XLA writes into the loop of whatever reads them, if nothing else does.
FUSED = frozenset(
    {
        "abs", "add", "and", "bitcast_convert_type", "broadcast_in_dim", "clamp", "concatenate",
        "convert_element_type", "copy", "div", "eq", "exp", "expand_dims", "floor", "ge", "gt", "integer_pow",
        "iota", "is_finite", "le", "log", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or",
        "pad", "pcast", "pvary", "reduce_precision", "reshape", "rev", "round", "rsqrt", "select_n",
        "shift_left", "shift_right_logical", "sign", "slice", "sqrt", "square", "squeeze", "stop_gradient",
        "sub", "tanh", "transpose",
    }
)  # fmt: skip


class Living(NamedTuple):
    """What lives in the gradient of one micro-batch, in bytes of one device.

    Attributes:
        most: at once, at most. The results, FP32 gradients, are among them, and so are gathered weights; weights and
            moments are not.
        kept: of a layer, from its forward to its backward pass, on average over scanned layers; None: none is scanned.
    """

    most: int
    kept: float | None


def living(config: Config, mesh: AnyMesh) -> Living:
    """Return what lives in the gradient of one micro-batch of `config`."""
    program = _on_one_device(trace_gradient(config, mesh, "gpu"))
    return Living(peak_bytes(program), kept_bytes(program))


def gradient_bytes(config: Config, mesh: AnyMesh) -> int:
    """Return the bytes of one device that live at once in the gradient of one micro-batch (`Living.most`)."""
    return living(config, mesh).most


def kept_bytes(program: Any) -> float | None:
    """Return what a turn of a loop keeps for the same turn of a later one, which goes back; None: there is no such."""
    stacked: set[Any] = set()
    handed = turns = 0
    for equation in program.eqns:
        if equation.primitive.name != "scan":
            continue
        (inner,), length = jaxprs_in_params(equation.params), equation.params["length"]
        reads, makes = (
            [v for v, one in zip(outside, inside, strict=True) if _shape(v) == (length, *_shape(one))]
            for outside, inside in ((equation.invars, inner.invars), (equation.outvars, inner.outvars))
        )
        found = [v for v in _variables(reads) if v in stacked]
        if found:
            handed, turns = handed + sum(map(_bytes, found)), turns + length
        stacked |= set(makes)
    return handed / turns if turns else None


def peak_bytes(program: Any) -> int:
    """Return the bytes that live at once in a traced program, at most, beside its inputs."""
    last, readers = {}, {}
    for place, equation in enumerate(program.eqns):
        for variable in _variables(equation.invars):
            last[variable] = place
            readers[variable] = readers.get(variable, 0) + 1
    results = set(_variables(program.outvars))
    fused = {
        variable
        for equation in program.eqns
        if equation.primitive.name in FUSED
        for variable in equation.outvars
        if readers.get(variable) == 1 and variable not in results
    }
    alive: dict[Any, int] = {}
    now = peak = 0
    for place, equation in enumerate(program.eqns):
        made = {variable: 0 if variable in fused else _bytes(variable) for variable in equation.outvars}
        inside, beside = _inside(equation), sum(made.values())
        peak = max(peak, now + (beside + inside if equation.primitive.name in LOOPS else max(beside, inside)))
        kept = {variable: size for variable, size in made.items() if variable in last or variable in results}
        alive |= kept
        now += sum(kept.values())
        for variable in set(_variables(equation.invars)) - results:
            if last[variable] == place:
                now -= alive.pop(variable, 0)
    return peak


def _inside(equation: Any) -> int:
    """Return what lives inside an equation that is a program: a loop, a call; nothing for kernels, which have memory of
    their own.
    """
    if str(equation.params.get("name", "")).startswith(OUTLINED):
        return 0
    return max((peak_bytes(inner) for inner in jaxprs_in_params(equation.params)), default=0)


def _on_one_device(program: Any) -> Any:
    """Return the program of one device: the body of the `shard_map`."""
    for equation in program.eqns:
        for inner in jaxprs_in_params(equation.params):
            found = inner if equation.primitive.name == "shard_map" else _on_one_device(inner)
            if found is not None:
                return found
    return None


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _variables(of: Any) -> list[Any]:
    return [variable for variable in of if not isinstance(variable, Literal)]


def _bytes(variable: Any) -> int:
    if getattr(variable.aval, "memory_space", None) == jax.memory.Space.Host:
        return 0
    size = getattr(getattr(variable.aval, "dtype", None), "itemsize", 0)  # tokens and keys have none
    return math.prod(variable.aval.shape) * size if size else 0
