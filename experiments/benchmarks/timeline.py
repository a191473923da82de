"""What a device does at each moment of a traced step: its kernels by stage, and which run beside communication.

A profiler's trace of a GPU has a line per stream. Kernels of NCCL are communication, all others computation; both have
the `op_name` of what they come from, and with it the scope of the model (`breakdown.place`). XLA's command buffers hide
it: trace a program that was compiled without them (`breakdown.WITHOUT_COMMAND_BUFFERS`).

Where a layer begins shows in the attention cores: each layer has one of the longest kernels of that scope, or as many
as micro-batches pass it side by side. So the time of a layer goes from its first core to that of the next one. Half a
layer at the beginning and at the end of a pass is thereby lost.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from deepseek_jax.inputs import read_bytes, shown
from experiments.benchmarks.breakdown import OTHER, place

LARGEST_TRACE = 512 << 20  # bytes; a step of v3_5b on two devices has 2 MB without the program
WEIGHTS = "weights"
# The stage of a scope; what is not here belongs to OTHER.
STAGES = {
    "attention": "attention",
    "attention_core": "attention",
    "experts": "expert products",
    "ffn": "shared expert, dense FFN",
    "route": "router",
    "dispatch": "dispatch",
    "combine": "combine",
    "gather": WEIGHTS,
    "quantize_weights": WEIGHTS,
    "head": "head",
}
COMMUNICATION = "nccl"  # how the names of such kernels begin, in lower case
REDUCTION = "reducescatter"  # XLA merges those of several gradients, and the result has no `op_name`


class Kernel(NamedTuple):
    """A kernel, copy or memset on one stream."""

    name: str  # as the device calls it
    stage: str  # a value of STAGES, or OTHER
    scope: str  # of breakdown.SCOPES, or OTHER
    direction: str  # of breakdown.PASSES
    start: float  # ms after the first one of the trace
    stop: float

    @property
    def communicates(self) -> bool:
        """Whether it moves bytes between devices."""
        return self.name.lower().startswith(COMMUNICATION)


class Overlap(NamedTuple):
    """Milliseconds of a window in which the device ..."""

    communicates: float
    computes: float
    both: float
    idle: float


Event = tuple[float, float, str, str]  # start and duration in nanoseconds, kernel, op_name


def read(path: Path, device: int = 0) -> list[Kernel]:
    """Return what a device ran, by time.

    Args:
        path: an xplane file (`jax.profiler.start_trace` writes one per process).
        device: number of the GPU in the trace.

    Raises:
        ValueError: the file is none, or has no kernels of this device.
    """
    found = events_of(path)
    if device not in found:
        there = ", ".join(f"/device:GPU:{number}" for number in sorted(found)) or "no device"
        raise ValueError(f"{shown(str(path))} has no GPU {device}, but {there}; name another")
    if not found[device]:
        raise ValueError(f"{shown(str(path))} has no kernels of GPU {device}; trace a step that runs on it")
    return kernels_of(found[device])


def events_of(path: Path) -> dict[int, list[Event]]:
    """Return the kernels of each GPU in a trace, on one clock.

    Raises:
        ValueError: the file is no trace.
    """
    content = read_bytes(path, LARGEST_TRACE)
    try:
        planes = list(jax.profiler.ProfileData.from_serialized_xspace(content).planes)
    except Exception as error:  # of a type of JAX's runtime
        raise ValueError(f"{shown(str(path))} is no trace ({shown(str(error))}); name an .xplane.pb file") from error
    found: dict[int, list[Event]] = {}
    for plane in planes:
        number = plane.name.removeprefix("/device:GPU:")
        if number != plane.name and number.isdecimal():
            found[int(number)] = [
                (event.start_ns, event.duration_ns, event.name, str(dict(event.stats).get("name", "")))
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ]
    return found


def kernels_of(events: Sequence[Event]) -> list[Kernel]:
    """Return kernels by time from (start, duration, kernel, op_name) with times in nanoseconds."""
    first = min(event[0] for event in events)
    return [
        Kernel(name, *_place(name, op_name), (start - first) / 1e6, (start - first + duration) / 1e6)
        for start, duration, name, op_name in sorted(events)
    ]


def _place(name: str, op_name: str) -> tuple[str, str, str]:
    """Return stage, scope and pass. The `op_name` of a fusion in a trace may end with a scope, not an operation."""
    scope, direction = place(op_name)
    if scope == OTHER:
        scope, direction = place(op_name + "/")
    if scope == OTHER and REDUCTION in name.lower():
        return WEIGHTS, scope, "backward"
    return STAGES.get(scope, OTHER), scope, direction


def layer_window(kernels: Sequence[Kernel], num_layers: int, layer: int, direction: str) -> tuple[float, float]:
    """Return when a layer begins and when the next one of the pass does, in ms.

    Args:
        kernels: of one step.
        num_layers: layers of the model.
        layer: from 0, in the order in which the pass comes to them; the last one has no next.
        direction: "forward" or "backward".

    Raises:
        ValueError: there is no such layer, or the attention cores of the pass are not as many for each layer.
    """
    if not 0 <= layer < num_layers - 1:
        raise ValueError(f"layer = {layer} has no next one among {num_layers} layers; take 0 to {num_layers - 2}")
    cores = [k for k in kernels if k.scope == "attention_core" and k.direction == direction]
    longest = max(cores, key=lambda k: k.stop - k.start).name if cores else None
    starts = sorted(k.start for k in cores if k.name == longest)
    each, left = divmod(len(starts), num_layers)
    if left or not each:
        raise ValueError(
            f"the {direction} pass has {len(starts)} attention cores, which are not as many for each of {num_layers}"
            " layers; give the number of layers, and trace one step without command buffers"
        )
    return starts[each * layer], starts[each * (layer + 1)]


def overlap(kernels: Iterable[Kernel], window: tuple[float, float]) -> Overlap:
    """Return how long the device communicates, computes, does both, and neither, within a window."""
    edges = []
    for kernel in kernels:
        start, stop = max(kernel.start, window[0]), min(kernel.stop, window[1])
        if start < stop:
            edges += [(start, 1, kernel.communicates), (stop, -1, kernel.communicates)]
    running, last = {True: 0, False: 0}, window[0]
    sums = {(True, True): 0.0, (True, False): 0.0, (False, True): 0.0, (False, False): 0.0}
    for moment, step, communicates in [*sorted(edges), (window[1], 0, False)]:
        sums[running[True] > 0, running[False] > 0] += moment - last
        running[communicates] += step
        last = moment
    both = sums[True, True]
    return Overlap(both + sums[True, False], both + sums[False, True], both, sums[False, False])
