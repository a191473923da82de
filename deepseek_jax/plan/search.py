"""The fastest way to lay a run out on a number of devices: every mesh, recomputation and micro-batch that fits.

Times are those of `timing.py`. Memory is estimated: what the layouts hold, and the traced gradient of a sequence on a
device (`liveness.py`), taken as a part that is fixed and one that is linear in tokens (`estimate.Memory`), and alike on
every mesh but for the gathered layer. A pipeline holds what its table's slots hold, besides, and must fit with
PIPELINE_MARGIN to spare: its estimate came out too low. The plan of the winner traces it itself, or asks a TPU's
compiler.

Pipelines are many: numbers of stages, of devices that share experts, six schedules. So what their stages hold in closed
form prunes them first, then the checks of a run, then the memory of their tables; only what is left is timed. Their
nodes are those of the chip: neighbours share experts before nodes do.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.stages import check_beside_pipeline, program_of, split_layers
from deepseek_jax.parameters import CONTEXT, PIPE, ROWS
from deepseek_jax.pipeline.schedules import SCHEDULES
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.counts import largest_batch, micro_batches_of, placement_of
from deepseek_jax.plan.estimate import Memory, least_slots
from deepseek_jax.plan.meshes import Fit, accepted, as_fit, find_fit
from deepseek_jax.plan.stages import time_of
from deepseek_jax.plan.timing import StepTime

REMATS = ("selective", "full")
SEQUENCES = (1, 2, 4, 8, 16)  # of a micro-batch on a device
PIPELINE_MARGIN = 1.04  # V3 on 4 stages of dualpipev: 159 GB traced, 154 estimated (docs/planning.md)
MOST_MICRO_BATCHES = 256  # of a pipeline's step: longer tables take seconds each


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to lay a run out."""

    fit: Fit
    memory: float  # bytes of a device, estimated
    time: StepTime


def candidates(config: Config, num_devices: int) -> Iterator[Fit]:
    """Yield every mesh of `num_devices` devices without a pipeline, with the recomputations and micro-batches of a run.

    Meshes that spread experts most come first. Devices share sequences only where the batch has too few of them.
    """
    first = find_fit(config.with_(mesh={PIPE: 1}), num_devices)
    context = 1 if first is None else axis_size(first.mesh, (CONTEXT,))
    rows = num_devices // context
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    meshes = [(n, e) for n, e in itertools.product(sizes, sizes) if rows % (n * e) == 0]
    meshes.sort(key=lambda mesh: (-mesh[0] * mesh[1], mesh))
    batch = largest_batch(config)
    for (node, expert), remat, sequences in itertools.product(meshes, REMATS, SEQUENCES):
        micro_batch = sequences * rows
        if config.model.num_experts % (node * expert) or batch % micro_batch:
            continue
        sizes_of_mesh = {"mesh.pipe": 1, "mesh.data": -1, "mesh.context": context}
        sizes_of_mesh |= {"mesh.node": node, "mesh.expert": expert}
        others = {"execution.remat": remat, "training.micro_batch_size": micro_batch}
        fit = as_fit(config, num_devices, sizes_of_mesh | others)
        if fit is not None and accepted(fit.config, fit.mesh):
            yield fit


def pipelines(config: Config, num_devices: int, chip: Chip) -> Iterator[Fit]:
    """Yield every mesh with a pipeline, schedule, recomputation and micro-batch; a run may refuse them.

    Devices of a node share experts first. More than MOST_MICRO_BATCHES are not tried.
    """
    model, batch = config.model, largest_batch(config)
    context = max(config.mesh.context, 1)
    inside = chip.node or max(config.mesh.expert, 1)
    most = min(model.num_layers + model.num_mtp_layers, num_devices // context)
    for pipe in (n for n in range(2, most + 1) if num_devices % (n * context) == 0):
        rows = num_devices // (pipe * context)
        for sharing in (n for n in range(rows, 0, -1) if rows % n == 0 and model.num_experts % n == 0):
            expert = math.gcd(sharing, inside)
            sizes = {"mesh.pipe": pipe, "mesh.data": -1, "mesh.context": context}
            sizes |= {"mesh.node": sharing // expert, "mesh.expert": expert}
            for remat, sequences, schedule in itertools.product(REMATS, SEQUENCES, SCHEDULES):
                micro_batch = sequences * rows
                if batch % micro_batch or batch // micro_batch > MOST_MICRO_BATCHES:
                    continue
                others = {"execution.remat": remat, "training.micro_batch_size": micro_batch}
                fit = as_fit(config, num_devices, sizes | {"execution.schedule": schedule} | others)
                if fit is not None:
                    yield fit


def search(
    config: Config, num_devices: int, chip: Chip, state: Any, say: Callable[[str], None] = print
) -> list[Choice]:
    """Return the ways that fit, the fastest first.

    Args:
        config: what is trained; its batch and precision stay.
        num_devices: to lay it out on.
        chip: whose memory it must fit in, and whose rates it has.
        state: abstract state of `config` (`counts.state_of`).
        say: takes signs of life.

    Raises:
        ValueError: no way is accepted, or none fits; the message names the least memory and the next number of devices.
    """
    memory = Memory(state, say)
    fits = list(candidates(config, num_devices))
    needs = [memory.of(fit) for fit in fits]  # before any pipeline's: the first mesh is the one that is traced
    piped = _pipelines_that_fit(config, num_devices, chip, memory, say)
    fits, needs = [*fits, *piped], [*needs, *(memory.of(fit) for fit in piped)]
    if not fits:
        raise ValueError(
            f"no mesh of {num_devices} devices is accepted for {config.name}: its batch of {largest_batch(config)} must"
            f" be a multiple of {num_devices}, or of a part of them that share sequences; python -m experiments.plan"
            " lists what works"
        )
    fitting = [(fit, need) for fit, need in zip(fits, needs, strict=True) if need <= chip.memory]
    if not fitting:
        need, least = min(zip(needs, fits, strict=True), key=lambda way: way[0])
        larger = nearest_that_fits(config, 2 * num_devices, chip, memory)
        where = f"; {larger.num_devices} devices do, with {larger.flags}" if larger else ", and neither on more devices"
        raise ValueError(
            f"nothing fits on {num_devices} {chip.name}: the least is {need / 1e9:,.0f} of"
            f" {chip.memory / 1e9:,.0f} GB, with {least.flags}{where}"
        )
    choices = (Choice(fit, need, time_of(fit.config, fit.mesh, state, chip)) for fit, need in fitting)
    return sorted(choices, key=lambda choice: choice.time.total)


def nearest_that_fits(config: Config, first: int, chip: Chip, memory: Memory) -> Fit | None:
    """Return on which of `first`, 2 `first`, 4 `first`, ... devices a step fits first, with the flags that it needs.

    The numbers of stages are tried in turn: the config's own, none, then 2, 4, 8, ... One sequence a device, or what a
    pipeline of MOST_MICRO_BATCHES leaves, and full recomputation need least. None: no number of devices of a pod is
    enough.
    """
    for number in (first << doublings for doublings in range(13)):
        if not chip.has(number):
            return None
        for pipe in _numbers_of_stages(config, number):
            fit = _smallest(config, number, pipe)
            if fit is None:
                continue
            if _fits(fit, chip, memory) if pipe > 1 else memory.of(fit) <= chip.memory:
                return fit
    return None


def _numbers_of_stages(config: Config, num_devices: int) -> list[int]:
    """Return the numbers of devices along `pipe` to try, without repetition."""
    most = config.model.num_layers + config.model.num_mtp_layers
    doubled = [1 << n for n in range(1, most.bit_length())]
    numbers = dict.fromkeys([max(config.mesh.pipe, 1), 1, *doubled])
    return [pipe for pipe in numbers if num_devices % pipe == 0 and pipe <= most]


def _smallest(config: Config, num_devices: int, pipe: int) -> Fit | None:
    """Return what needs least on so many devices and stages; None: a run accepts nothing."""
    least = config.with_(mesh={PIPE: pipe}, execution={"remat": "full", "gather": "layer"})
    if pipe > 1:
        try:
            check_beside_pipeline(least, {PIPE: pipe, CONTEXT: config.mesh.context})
        except ValueError:
            return None
    fit = find_fit(least, num_devices)
    if fit is None:
        return None
    rows, batch = axis_size(fit.mesh, ROWS), largest_batch(config)
    sizes = (n for n in range(rows, batch + 1, rows) if batch % n == 0)
    micro_batch = next((n for n in sizes if pipe == 1 or batch // n <= MOST_MICRO_BATCHES), None)
    changes = {"training.micro_batch_size": micro_batch, "execution.remat": "full", "execution.gather": "layer"}
    if micro_batch is None:
        return None
    smallest = as_fit(config, num_devices, {f"mesh.{PIPE}": pipe, **fit.changes, **changes})
    return smallest if smallest and accepted(smallest.config, smallest.mesh) else None


def _pipelines_that_fit(
    config: Config, num_devices: int, chip: Chip, memory: Memory, say: Callable[[str], None]
) -> list[Fit]:
    """Return the pipelines that fit and that a run accepts; none if a run has something that no pipeline can have."""
    try:
        tried = config.with_(execution={"remat": REMATS[0]})
        check_beside_pipeline(tried, {PIPE: 2, CONTEXT: config.mesh.context})
    except ValueError as error:
        say(f"no pipeline is tried: {error}")
        return []
    return [fit for fit in pipelines(config, num_devices, chip) if _fits(fit, chip, memory)]


def _fits(fit: Fit, chip: Chip, memory: Memory) -> bool:
    """Whether a pipeline fits, with the margin of its estimate, and a run accepts it.

    Tables take long, those of all batches longest: they come last.
    """
    config, pipe = fit.config, fit.mesh.shape[PIPE]
    try:
        split_layers(config.model, placement_of(config.execution.schedule, pipe).num_stages)
    except ValueError:  # the schedule does not take so many devices, or has more stages than the model has layers
        return False
    if memory.least(fit) > chip.memory or memory.of_pipeline(fit, least_slots(fit), 0) > chip.memory:
        return False
    try:
        program_of(config.execution.schedule, pipe, micro_batches_of(config))
    except ValueError:  # the schedule does not take so many micro-batches
        return False
    return PIPELINE_MARGIN * memory.of(fit) <= chip.memory and accepted(config, fit.mesh)
