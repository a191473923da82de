"""The collectives of a program, traced or compiled, and the bytes that they send along each axis of the mesh.

The traced program (jaxpr) has every collective that the code asks for. The compiled program has what XLA made of them,
and what its partitioner added. Both are read into the same records, so that one can be held against the other:

    traced      operand uint8[20480, 7168]   all_to_all over (node,)    in a scan of 58 layers
    compiled    eight results u8[2560,7168]  all-to-all {'node'}        in a while whose trip count is known: 58

Bytes are counted by pair of devices: what a device has for another counts for the slowest axis along which the two
differ. How a library moves it (along a ring, or up and down a tree) is its own affair.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from deepseek_jax.parallel.mesh import AXES

GATHER, SCATTER, EXCHANGE, PERMUTE = "all_gather", "reduce_scatter", "all_to_all", "ppermute"
SUMS = ("psum", "psum_invariant")
LARGEST = ("pmax", "pmin")
KINDS = (GATHER, SCATTER, EXCHANGE, PERMUTE, *SUMS, *LARGEST)
# Loops around a collective: a scan runs a known number of times, a while as often as the data need.
SCAN, WHILE = "scan", "while"

HLO_KINDS = {
    "all-gather": GATHER,
    "reduce-scatter": SCATTER,
    "all-to-all": EXCHANGE,
    "collective-permute": PERMUTE,
    "all-reduce": SUMS[0],
}
HLO_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}
HLO_LETTERS = {"f": "float", "s": "int", "u": "uint"}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (?P<result>.*?) (?P<kind>{'|'.join(HLO_KINDS)})(?:-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations|branch_computations|\w+_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # one of KINDS; a compiled all-reduce is a "psum", whatever it computes
    dtype: Any
    shape: tuple[int, ...]  # of its operand, on one device
    axes: tuple[str, ...]  # of the mesh; some may have one device
    loops: tuple[str, ...]  # SCAN and WHILE around it
    times: int  # product of the scans' lengths; a while counts once
    scope: str  # the named scopes and transformations around it
    senders: int | None = None  # of a permutation: devices along `axes` that send; None: all

    @property
    def bytes(self) -> int:
        """Bytes of the operand."""
        return math.prod(self.shape) * self.dtype.itemsize


def sent_bytes(collective: Collective, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes that a device sends along each axis, in one call.

    A gather sends all to all others; an exchange and a sum that stays split (reduce-scatter) send each its part; a
    whole sum is a split sum and a gather of the parts. Of a permutation not all need to send: the mean over devices.

    Args:
        collective: over at least one axis.
        sizes: devices along every axis of the mesh.
    """
    axes = sorted(collective.axes, key=AXES.index)  # the slowest first
    parts = math.prod(sizes[axis] for axis in axes)
    each = collective.bytes if collective.kind == GATHER else collective.bytes // parts
    if collective.kind in (*SUMS, *LARGEST):
        each = 2 * collective.bytes // parts
    if collective.kind == PERMUTE:
        senders = parts if collective.senders is None else collective.senders
        return {axes[0]: collective.bytes * senders // parts}
    sent, inside = {}, parts
    for axis in axes:
        within = inside // sizes[axis]
        sent[axis] = each * (inside - within)
        inside = within
    return sent


def traced_collectives(jaxpr: Any, loops: tuple[str, ...] = (), times: int = 1, scope: str = "") -> list[Collective]:
    """Return the collectives of a traced program, those of inner programs included.

    Args:
        jaxpr: of the program, without constants (`ClosedJaxpr.jaxpr`).
        loops, times, scope: of what is around it.
    """
    found = []
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        here = f"{scope}/{equation.source_info.name_stack}"
        if kind in KINDS:
            axes, arrays = _named(equation.params), (var.aval for var in equation.invars)
            senders = len(equation.params["perm"]) if kind == PERMUTE else None
            found += [Collective(kind, a.dtype, a.shape, axes, loops, times, here, senders) for a in arrays]
        inner_loops = (*loops, kind) if kind in (SCAN, WHILE) else loops
        inner_times = times * equation.params["length"] if kind == SCAN else times
        for inner in jaxprs_in_params(equation.params):
            found += traced_collectives(inner, inner_loops, inner_times, here)
    return found


def _named(params: Mapping[str, Any]) -> tuple[str, ...]:
    axes = params.get("axis_name", params.get("axes"))
    return (axes,) if isinstance(axes, str) else tuple(axes)


def compiled_collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a compiled program (`Compiled.as_text()`).

    A tuple of results is one record each: XLA merges small collectives into one, and may cut one into its parts.

    Args:
        text: HLO.
        sizes: devices along every axis of the mesh, in the mesh's order.

    Raises:
        ValueError: the text is no HLO of a whole program, or has devices that are in no such mesh.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give the HLO of a whole program (Compiled.as_text())")
    return list(_collectives_in(entry, computations, sizes, (), 1))


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Return the lines of each computation, and the name of the first that runs."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            lines = computations[found[1]] = []
            entry = found[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return computations, entry


def _collectives_in(
    name: str, computations: dict[str, list[str]], sizes: Mapping[str, int], loops: tuple[str, ...], times: int
) -> Iterator[Collective]:
    for line in computations[name]:
        if found := _COLLECTIVE.search(line):
            yield from _collectives_of(line, found, sizes, loops, times)
        elif found := _WHILE.search(line):
            trips = _TRIPS.search(line)
            around, count = ((*loops, SCAN), times * int(trips[1])) if trips else ((*loops, WHILE), times)
            yield from _collectives_in(found["body"], computations, sizes, around, count)
        else:
            for called in _CALLED.findall(line):
                for inner in re.findall(r"[\w.\-]+", called):
                    if inner in computations:
                        yield from _collectives_in(inner, computations, sizes, loops, times)


def _collectives_of(
    line: str, found: re.Match, sizes: Mapping[str, int], loops: tuple[str, ...], times: int
) -> Iterator[Collective]:
    """Yield one record for every result of one instruction."""
    kind = HLO_KINDS[found["kind"]]
    axes = _axes_of(line, sizes)
    if not axes:  # each device alone
        return
    parts = math.prod(sizes[axis] for axis in axes)
    name = re.search(r'op_name="([^"]*)"', line)
    split = re.search(r"dimensions=\{(\d+)", line)
    arrays = _ARRAY.findall(found["result"])
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    senders = pairs[1].count("{") * parts // math.prod(sizes.values()) if pairs and kind == PERMUTE else None
    if "-start(" in line and kind != SUMS[0]:  # operands, results and perhaps scalars of the runtime
        arrays = [(dtype, dims) for dtype, dims in arrays if dims]
        arrays = arrays[len(arrays) // 2 :]
    for dtype, dims in arrays:
        shape = [int(size) for size in dims.split(",") if size]
        if split and kind == GATHER:
            shape[int(split[1])] //= parts
        if split and kind == SCATTER:
            shape[int(split[1])] *= parts
        yield Collective(kind, _dtype(dtype), tuple(shape), axes, loops, times, name[1] if name else "", senders)


def _dtype(name: str) -> Any:
    if name in HLO_DTYPES:
        return jnp.dtype(HLO_DTYPES[name])
    return jnp.dtype(HLO_LETTERS[name[0]] + name[1:])


def _axes_of(line: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes along which the devices of a group differ."""
    if found := re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", line):
        return tuple(re.findall(r"'(\w+)'", found[1]))
    shape = tuple(sizes.values())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, reshaped, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
        devices = np.arange(math.prod(reshaped or ())).reshape(reshaped or ())
        group = devices.transpose(order).reshape(groups or ())[0]
    elif found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        group = np.array([int(device) for device in found[1].split(",")])
    else:  # without groups, all devices
        group = np.arange(math.prod(shape))
    if group.max() >= math.prod(shape):
        raise ValueError(f"the program has device {group.max()}, and the mesh {dict(sizes)} has {math.prod(shape)}")
    places = np.array(np.unravel_index(group, shape))
    return tuple(axis for axis, place in zip(sizes, places, strict=True) if len(set(place.tolist())) > 1)
