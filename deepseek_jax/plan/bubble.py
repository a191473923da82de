"""How long the devices of a pipeline wait in a step, from the table of its schedule (`deepseek_jax.pipeline`)."""

import functools
from typing import NamedTuple

from deepseek_jax.pipeline.schedules import schedule
from deepseek_jax.pipeline.simulation import Durations, run
from deepseek_jax.pipeline.table import Table


class Stage(NamedTuple):
    """Seconds of one micro-batch on one device; `pair` is a forward and a full backward pass of two at once."""

    forward: float
    inputs: float
    weights: float
    pair: float


class Waiting(NamedTuple):
    """What a schedule costs a device beside its work, on average over devices."""

    seconds: float  # that it waits
    apart: float  # micro-batches whose forward and backward pass run apart, not beside another's


NONE = "none"


def waiting(name: str, stages: int, micro_batches: int, stage: Stage, chunks: int = 1) -> Waiting:
    """Return what a schedule costs.

    Args:
        name: of a schedule (`pipeline.schedules`), or "none" for one stage.
        stages: devices of the pipeline.
        micro_batches: of a step and pipeline.
        stage: of one device. DualPipe has two such stages on each, and gives each half of the micro-batches.
        chunks: of a device, which "interleaved" runs in turn.

    Raises:
        ValueError: there is no such schedule, or it does not take these numbers.
    """
    if stages == 1:
        return Waiting(0.0, micro_batches)
    if name == NONE:
        raise ValueError(f"{stages} stages need a schedule, and it is {name!r}; choose one of pipeline.schedules")
    table = _table(name, stages, micro_batches, chunks if name == "interleaved" else None)
    parts = chunks if name == "interleaved" else 1
    durations = Durations(*(seconds / parts for seconds in stage))
    pairs = sum(cell is not None and cell.kind == "FBW" for cells in table.cells for cell in cells) / stages
    return Waiting(float(run(table, durations).idle.mean()), micro_batches - pairs)


@functools.lru_cache(maxsize=32)
def _table(name: str, stages: int, micro_batches: int, chunks: int | None) -> Table:
    return schedule(name, stages, micro_batches, chunks)
