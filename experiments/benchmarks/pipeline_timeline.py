"""What the devices of a pipeline do at each moment of a traced step, and for how long they idle.

Forward and backward passes are told apart by the `op_name` of their kernels, so a program is traced that was compiled
without command buffers (`breakdown.WITHOUT_COMMAND_BUFFERS`). The head belongs to the backward pass, in whose tick it
runs. Transfers between devices last as long as these wait for each other. `pipeline_drawing` is the command.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deepseek_jax.inputs import read_json
from deepseek_jax.palette import BLUE, GRAY, ORANGE, SKY
from experiments.benchmarks import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORWARD, BACKWARD, OTHER, TRANSFER = "forward", "backward", "copies, sums, casts", "transfer and wait"
COLORS = {FORWARD: BLUE, BACKWARD: ORANGE, OTHER: GRAY, TRANSFER: SKY}
TICK = "/cond/"  # in the op_name of what a tick's branch does
CLOSE = 0.02  # ms: spans of one kind that are no farther apart are drawn as one


class Span(NamedTuple):
    """Milliseconds in which a device does one thing."""

    kind: str  # a key of COLORS
    start: float
    stop: float


class Use(NamedTuple):
    """What a device does between the first tick of a step and the last, in ms."""

    whole: float
    computes: float
    forward: float
    backward: float


Found = tuple[tuple[float, float], dict[int, list[Span]]]  # when the first tick begins and the last ends; by device


def from_trace(path: Path) -> Found:
    """Return the ticks' window and the spans of each device; see `spans_of`."""
    return spans_of(timeline.events_of(path))


def spans_of(devices: Mapping[int, Sequence[timeline.Event]]) -> Found:
    """Return when the first tick begins and the last ends, and the spans of each device, ms after its first kernel.

    Raises:
        ValueError: no kernel belongs to a tick.
    """
    ticks = [event for events in devices.values() for event in events if TICK in event[3]]
    if not ticks:
        raise ValueError(
            "no kernel of the trace belongs to a tick of a pipeline; trace a step with mesh.pipe above 1, compiled"
            " without command buffers"
        )
    first = min(event[0] for events in devices.values() for event in events)
    window = min(event[0] for event in ticks), max(event[0] + event[1] for event in ticks)
    spans = {device: _merged(events, first) for device, events in sorted(devices.items())}
    return ((window[0] - first) / 1e6, (window[1] - first) / 1e6), spans


def kind_of(name: str, op_name: str) -> str:
    """Return what a kernel does, a key of COLORS."""
    if name.lower().startswith(timeline.COMMUNICATION):
        return TRANSFER
    if "transpose(" in op_name or "rematted_computation" in op_name or "(head)" in op_name:
        return BACKWARD
    return FORWARD if "jvp(" in op_name else OTHER


def _merged(events: Iterable[timeline.Event], first: float) -> list[Span]:
    spans: list[Span] = []
    last: dict[str, int] = {}  # where the last span of a kind is
    for start, duration, name, op_name in sorted(events):
        kind, begin, end = kind_of(name, op_name), (start - first) / 1e6, (start - first + duration) / 1e6
        place = last.get(kind, -1)
        # what computes runs in turn: a span ends where another begins. A transfer runs beside it
        follows = place == len(spans) - 1 or kind == TRANSFER
        if place >= 0 and follows and begin - spans[place].stop <= CLOSE:
            spans[place] = spans[place]._replace(stop=max(end, spans[place].stop))
        else:
            last[kind] = len(spans)
            spans.append(Span(kind, begin, end))
    return spans


def use_of(spans: Iterable[Span], window: tuple[float, float]) -> Use:
    """Return what a device does in a window; a pause of at most CLOSE within a span counts as work."""
    sums, reached = dict.fromkeys(COLORS, 0.0), window[0]
    for span in sorted(spans, key=lambda span: span.start):
        start, stop = max(span.start, reached), min(span.stop, window[1])
        if span.kind != TRANSFER and start < stop:
            sums[span.kind] += stop - start
            reached = stop
    computes = sum(sums.values())
    return Use(window[1] - window[0], computes, sums[FORWARD], sums[BACKWARD])


def describe(device: int, use: Use) -> str:
    """Return the numbers of a device in a line."""
    return (
        f"device {device}: ticks {use.whole:.1f} ms, computes {use.computes:.1f} (forward {use.forward:.1f}, backward"
        f" {use.backward:.1f}), idle {1 - use.computes / use.whole:.1%}"
    )


def as_json(ticks: tuple[float, float], devices: Mapping[int, list[Span]]) -> str:
    """Return the text of a file that `from_json` reads."""
    rows = {
        device: [[span.kind, round(span.start, 3), round(span.stop, 3)] for span in spans]
        for device, spans in devices.items()
    }
    return json.dumps({"unit": "ms", "ticks": ticks, "devices": rows}) + "\n"


def from_json(path: Path) -> Found:
    """Return what `as_json` wrote.

    Raises:
        ValueError: the file is none of these.
    """
    content = read_json(path, dict)
    try:
        begin, end = map(float, content["ticks"])
        devices = {
            int(device): [Span(str(kind), float(start), float(stop)) for kind, start, stop in rows]
            for device, rows in content["devices"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"--spans={path} is not what --json wrote; name such a file") from error
    if unknown := {span.kind for spans in devices.values() for span in spans} - set(COLORS):
        raise ValueError(f"--spans={path} has spans of {sorted(unknown)}; the kinds are {', '.join(COLORS)}")
    return (begin, end), devices


def draw(ticks: tuple[float, float], devices: Mapping[int, list[Span]], title: str = "") -> "Figure":
    """Return the drawing: computation of each device, and its transfers in a thin line below."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it
    from matplotlib.patches import Patch

    figure = Figure(figsize=(15, 1.1 * len(devices) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, spans in enumerate(devices.values()):
        for kind, color in COLORS.items():
            low, height = (0.32, 0.1) if kind == TRANSFER else (-0.35, 0.65)
            bars = [(span.start - ticks[0], span.stop - span.start) for span in spans if span.kind == kind]
            axes.broken_barh(bars, (row + low, height), color=color, linewidth=0)
    idle = [1 - use.computes / use.whole for use in (use_of(spans, ticks) for spans in devices.values())]
    axes.set_yticks(range(len(devices)), [f"device {d}\nidle {i:.1%}" for d, i in zip(devices, idle, strict=True)])
    axes.set(ylim=(len(devices) - 0.5, -0.5), xlim=(0, ticks[1] - ticks[0]), xlabel="ms")
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.suptitle(title)
    return figure
