"""A schedule is a table: devices down, ticks across; a cell says what a device does in a tick.

The model is cut into `stages`, in the order of a forward pass. A device holds one or several of them, its `chunks`. A
micro-batch takes a `route` through (device, chunk) of every stage. Four placements, drawn for four devices, chunk 0 /
chunk 1 of each:

    linear         0       1       2       3        one stage a device
    interleaved    0/4     1/5     2/6     3/7      from the last device on to the first, in a ring
    v              0/7     1/6     2/5     3/4      down and up again: the first and the last stage share a device
    bidirectional  0/3     1/2     2/1     3/0      two copies of the stages: micro-batches come from both ends

The work of a micro-batch on a chunk has three parts: F, its forward pass; B, the gradients of its inputs; W, the
gradients of its weights. A cell holds one of F, B, W, the full backward pass BW, or F and BW of two micro-batches side
by side, "F&B", where the communication of one hides under the arithmetic of the other (DeepSeek-V3, arXiv 2412.19437,
section 3.2.1). What is made in a tick is at its destination in the next one, on the same device or a neighbour.

A `Table` that exists obeys all rules: whoever builds one that does not gets a ValueError that names the cell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

PARTS = ("forward", "backward", "weight")
LETTERS = {"forward": "F", "backward": "B", "weight": "W"}


class Work(NamedTuple):
    """The work of one micro-batch on one chunk of a device."""

    micro_batch: int
    chunk: int


class Place(NamedTuple):
    """Where a stage lives."""

    device: int
    chunk: int


@dataclass(frozen=True)
class Cell:
    """What a device does in a tick: F, B, W, BW (`backward` and `weight` of the same work), or F and BW."""

    forward: Work | None = None
    backward: Work | None = None
    weight: Work | None = None

    def __post_init__(self):
        if not self.kind:
            raise ValueError("a cell of a schedule holds no work: an idle tick is None")
        if self.kind not in KINDS:
            raise ValueError(f"a cell holds {self}: it must hold one of {', '.join(KINDS)}")
        if self.backward and self.weight and self.backward != self.weight:
            raise ValueError(f"a cell holds {self}: B and W in one tick must be of the same micro-batch and chunk")
        if self.forward and self.forward == self.backward:
            raise ValueError(f"a cell holds {self}: F and B of one work must be in different ticks")

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return "".join(LETTERS[part] for part in PARTS if getattr(self, part))

    def parts(self) -> Iterator[tuple[str, Work]]:
        """Yield the parts that there are, by name."""
        for part in PARTS:
            if (work := getattr(self, part)) is not None:
                yield part, work

    def __str__(self) -> str:
        return " ".join(f"{LETTERS[part]}({work.micro_batch}, chunk {work.chunk})" for part, work in self.parts())


KINDS = ("F", "B", "W", "BW", "FBW")


@dataclass(frozen=True)
class Placement:
    """Which device holds which stages.

    Attributes:
        name: linear, interleaved, v or bidirectional.
        routes: per route its places, by stage. Micro-batches are dealt to routes in equal blocks of consecutive ones.
    """

    name: str
    routes: tuple[tuple[Place, ...], ...]

    @property
    def num_stages(self) -> int:
        """Stages of the model, each counted once."""
        return len(self.routes[0])

    @cached_property
    def stages(self) -> dict[Place, int]:
        """The stage of every place."""
        return {place: stage for route in self.routes for stage, place in enumerate(route)}

    @property
    def num_devices(self) -> int:
        """Devices, P."""
        return 1 + max(place.device for place in self.stages)

    @property
    def num_chunks(self) -> int:
        """Stages that a device holds."""
        return 1 + max(place.chunk for place in self.stages)

    def stage(self, device: int, chunk: int) -> int:
        """Return the stage that a chunk of a device is."""
        return self.stages[Place(device, chunk)]


def linear(num_devices: int) -> Placement:
    """Place stage s on device s."""
    return Placement("linear", (tuple(Place(device, 0) for device in range(num_devices)),))


def interleaved(num_devices: int, num_chunks: int) -> Placement:
    """Place stage s on device s mod P."""
    places = (Place(device, chunk) for chunk in range(num_chunks) for device in range(num_devices))
    return Placement("interleaved", (tuple(places),))


def v(num_devices: int) -> Placement:
    """Place 2P stages down the devices and up again."""
    down = [Place(device, 0) for device in range(num_devices)]
    up = [Place(device, 1) for device in reversed(range(num_devices))]
    return Placement("v", (tuple(down + up),))


def bidirectional(num_devices: int) -> Placement:
    """Place P stages twice: stage s on device s as chunk 0, and on device P - 1 - s as chunk 1."""
    down = tuple(Place(device, 0) for device in range(num_devices))
    up = tuple(Place(device, 1) for device in reversed(range(num_devices)))
    return Placement("bidirectional", (down, up))


@dataclass(frozen=True)
class Table:
    """A schedule that obeys every rule of this module.

    Attributes:
        name: of the schedule.
        placement: which device holds which stages.
        num_micro_batches: M.
        cells: per device and tick, a Cell or None.

    Raises:
        ValueError: a rule is broken; the message names the cell.
    """

    name: str
    placement: Placement
    num_micro_batches: int
    cells: tuple[tuple[Cell | None, ...], ...]

    def __post_init__(self):
        _check_shape(self)
        _check_once(self)
        _check_dependencies(self)

    @property
    def num_ticks(self) -> int:
        """Ticks from the first to the last cell."""
        return len(self.cells[0])

    @property
    def num_devices(self) -> int:
        """Devices, P."""
        return self.placement.num_devices

    def route(self, micro_batch: int) -> tuple[Place, ...]:
        """Return the places of a micro-batch, by stage."""
        return self.placement.routes[micro_batch * len(self.placement.routes) // self.num_micro_batches]

    @cached_property
    def ticks(self) -> dict[tuple[str, int, int], int]:
        """The tick of every (part, micro-batch, stage)."""
        return {key: tick for key, _, tick in _works(self)}


def needs(part: str, micro_batch: int, stage: int, num_stages: int) -> Iterator[tuple[str, int, int]]:
    """Yield the (part, micro-batch, stage) whose results a part reads."""
    if part == "forward" and stage > 0:
        yield "forward", micro_batch, stage - 1
    if part == "backward":
        yield "forward", micro_batch, stage
        if stage < num_stages - 1:
            yield "backward", micro_batch, stage + 1
    if part == "weight":
        yield "backward", micro_batch, stage


def _works(table: Table) -> Iterator[tuple[tuple[str, int, int], int, int]]:
    """Yield ((part, micro-batch, stage), device, tick) of everything in the cells."""
    for device, row in enumerate(table.cells):
        for tick, cell in enumerate(row):
            for part, work in cell.parts() if cell else ():
                yield (part, work.micro_batch, table.placement.stage(device, work.chunk)), device, tick


def _where(table: Table, device: int, tick: int) -> str:
    return f"{table.name}: device {device}, tick {tick}, {table.cells[device][tick]}"


def _check_shape(table: Table) -> None:
    placement, rows = table.placement, table.cells
    if len(rows) != placement.num_devices or len({len(row) for row in rows}) != 1:
        sizes = [len(row) for row in rows]
        raise ValueError(
            f"{table.name}: rows of {sizes} ticks; {placement.num_devices} devices need one equal row each"
        )
    if table.num_micro_batches < 1 or table.num_micro_batches % len(placement.routes):
        raise ValueError(
            f"{table.name}: {table.num_micro_batches} micro-batches do not divide among {len(placement.routes)} routes"
        )
    for device, row in enumerate(rows):
        for tick, cell in enumerate(row):
            for _, work in cell.parts() if cell else ():
                if not 0 <= work.micro_batch < table.num_micro_batches:
                    raise ValueError(
                        f"{_where(table, device, tick)}: there is no micro-batch {work.micro_batch} "
                        f"among {table.num_micro_batches}"
                    )
                if Place(device, work.chunk) not in table.route(work.micro_batch):
                    raise ValueError(f"{_where(table, device, tick)}: its micro-batch does not pass this chunk")


def _check_once(table: Table) -> None:
    seen: dict[tuple[str, int, int], int] = {}
    for key, device, tick in _works(table):
        if key in seen:
            raise ValueError(f"{_where(table, device, tick)}: its {LETTERS[key[0]]} is in tick {seen[key]} already")
        seen[key] = tick
    for micro_batch in range(table.num_micro_batches):
        for stage, place in enumerate(table.route(micro_batch)):
            for part in PARTS:
                if (part, micro_batch, stage) not in seen:
                    raise ValueError(
                        f"{table.name}: device {place.device} has no {LETTERS[part]} of micro-batch {micro_batch}, "
                        f"chunk {place.chunk}"
                    )


def _check_dependencies(table: Table) -> None:
    for key, device, tick in _works(table):
        for needed in needs(*key, table.placement.num_stages):
            ready = table.ticks[needed] + (key[0] != "weight")  # W may share the tick of its B
            if tick < ready:
                part, _, stage = needed
                raise ValueError(
                    f"{_where(table, device, tick)}: {LETTERS[key[0]]} needs {LETTERS[part]} of stage {stage}, "
                    f"which is there from tick {ready} on"
                )
