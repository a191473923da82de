"""What a table costs: when each cell runs, how long devices idle, how much they hold.

A cell begins when its device is free and what it reads is there; travel takes no time of its own. That is what the
report's Table 2 counts (DeepSeek-V3, arXiv 2412.19437). `in_step` adds what one program for all devices costs: it
exchanges with both neighbours after every tick, so a device waits for them even where it reads nothing.
"""

from dataclasses import dataclass

import numpy as np

from deepseek_jax.pipeline.table import Cell, Table, needs


@dataclass(frozen=True)
class Durations:
    """How long the parts of one chunk take, in any unit.

    Attributes:
        forward: F.
        inputs: B without W.
        weights: W.
        overlapped: F of one micro-batch with the full backward pass of another; None: as long as one after the other.
    """

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0
    overlapped: float | None = None

    def __post_init__(self):
        values = (self.forward, self.inputs, self.weights, 1.0 if self.overlapped is None else self.overlapped)
        if not all(0 < value < float("inf") for value in values):
            raise ValueError(f"{self}: every duration must be above 0")

    @property
    def pair(self) -> float:
        """F&B."""
        return self.forward + self.full if self.overlapped is None else self.overlapped

    @property
    def full(self) -> float:
        """The full backward pass, which the report's Table 2 calls B."""
        return self.inputs + self.weights

    def scaled(self, factor: float) -> "Durations":
        """Return the durations of a chunk that is `factor` times as large."""
        return Durations(self.forward * factor, self.inputs * factor, self.weights * factor, self.pair * factor)

    def of(self, cell: Cell) -> float:
        """Return how long a cell takes."""
        by_kind = {"F": self.forward, "B": self.inputs, "W": self.weights, "BW": self.full, "FBW": self.pair}
        return by_kind[cell.kind]


@dataclass(frozen=True)
class Run:
    """When everything happens.

    Attributes:
        starts, ends: times [devices, ticks]; NaN where a device is idle.
    """

    starts: np.ndarray
    ends: np.ndarray

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return float(np.nanmax(self.ends))

    @property
    def idle(self) -> np.ndarray:
        """Time per device in which it does nothing: the bubble."""
        return self.makespan - np.nansum(self.ends - self.starts, axis=1)


def run(table: Table, durations: Durations, in_step: bool = False) -> Run:
    """Return when every cell of a table runs."""
    num_devices = table.num_devices
    starts = np.full((num_devices, table.num_ticks), np.nan)
    ends = starts.copy()
    free = np.zeros(num_devices)  # when each device has done the ticks so far
    done: dict[tuple[str, int, int], float] = {}
    for tick in range(table.num_ticks):
        if in_step and tick:
            free = np.max([free, np.roll(free, 1), np.roll(free, -1)], axis=0) if _is_ring(table) else _beside(free)
        made = {}
        for device in range(num_devices):
            if (cell := table.cells[device][tick]) is None:
                continue
            keys = [(p, w.micro_batch, table.placement.stage(device, w.chunk)) for p, w in cell.parts()]
            reads = [done[n] for key in keys for n in needs(*key, table.placement.num_stages) if n not in keys]
            starts[device, tick] = max([free[device], *reads])
            free[device] = ends[device, tick] = starts[device, tick] + durations.of(cell)
            made |= dict.fromkeys(keys, free[device])
        done |= made
    return Run(starts, ends)


def _is_ring(table: Table) -> bool:
    return table.placement.name == "interleaved"


def _beside(free: np.ndarray) -> np.ndarray:
    padded = np.pad(free, 1)
    return np.max([padded[:-2], free, padded[2:]], axis=0)


def live(table: Table, until: str = "weight") -> np.ndarray:
    """Return the most works that each device holds at once, from F to the end of B ("backward") or W ("weight")."""
    changes = np.zeros((table.num_devices, table.num_ticks + 1), int)
    for micro_batch in range(table.num_micro_batches):
        for stage, place in enumerate(table.route(micro_batch)):
            changes[place.device, table.ticks["forward", micro_batch, stage]] += 1
            changes[place.device, table.ticks[until, micro_batch, stage] + 1] -= 1
    return changes.cumsum(axis=1).max(axis=1)


@dataclass(frozen=True)
class Cost:
    """What a table costs a model that is cut into its stages; a P-th of the model is the unit of size.

    Attributes:
        makespan: time of a step.
        idle: the longest idle time of a device.
        makespan_in_step, idle_in_step: the same where neighbours wait for each other after every tick.
        activations: the most that a device holds, in micro-batches through a P-th of the model.
        parameters: what a device holds, in P-ths of the model.
    """

    makespan: float
    idle: float
    makespan_in_step: float
    idle_in_step: float
    activations: float
    parameters: float


def cost(table: Table, durations: Durations) -> Cost:
    """Return what a table costs, where `durations` are those of a P-th of the model."""
    size = table.num_devices / table.placement.num_stages
    free, in_step = (run(table, durations.scaled(size), wait) for wait in (False, True))
    return Cost(
        makespan=free.makespan,
        idle=float(free.idle.max()),
        makespan_in_step=in_step.makespan,
        idle_in_step=float(in_step.idle.max()),
        activations=float(live(table).max() * size),
        parameters=table.placement.num_chunks * size,
    )
