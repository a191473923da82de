"""The fastest way to lay a run out on a number of devices: every mesh, recomputation and micro-batch that fits.

Times are those of `timing.py`. Memory is estimated: what the layouts hold, and the traced gradient of a sequence on a
device (`liveness.py`), taken as linear in tokens and alike on every mesh but for the gathered layer. A pipeline holds
what its table's slots hold, besides; `Memory` says how that is found. The plan of the winner traces or compiles it
itself.

Pipelines are many: numbers of stages, of devices that share experts, six schedules. So what their stages hold in closed
form prunes them first, then the checks of a run, then the memory of their tables; only what is left is timed. Their
nodes are those of the chip: neighbours share experts before nodes do.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parallel.stages import check_beside_pipeline, program_of, split_layers
from deepseek_jax.parameters import CONTEXT, PIPE, ROWS, TOKENS
from deepseek_jax.pipeline.schedules import SCHEDULES
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.counts import (
    IN_GRADIENT,
    bytes_per_device,
    gathered_layer,
    largest_batch,
    placement_of,
    without_pipe,
)
from deepseek_jax.plan.liveness import Living, living
from deepseek_jax.plan.meshes import Fit, accepted, as_fit, find_fit
from deepseek_jax.plan.stages import time_of
from deepseek_jax.plan.timing import StepTime

REMATS = ("selective", "full")
SEQUENCES = (1, 2, 4, 8, 16)  # of a micro-batch on a device
MOST_MICRO_BATCHES = 256  # of a pipeline's step: longer tables take seconds each


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to lay a run out."""

    fit: Fit
    memory: float  # bytes of a device, estimated
    time: StepTime


class Memory:
    """Estimates the memory of a step on any mesh, from few traces of the gradient, each made once.

    One trace for each recomputation says what a sequence needs. What does not grow with tokens is the same for both: a
    trace of two sequences says how much. In a pipeline each slot of the table keeps what its stage's layers keep, which
    the trace has as what its loops over layers hand from the forward to the backward pass (`liveness.kept_bytes`). What
    else the trace has is taken to live in a tick. A tick reads one slot and makes another.
    """

    def __init__(self, state: Any, say: Callable[[str], None]):
        """Take the abstract state of the config, and what to tell before a trace."""
        self._state, self._say = state, say
        self._traced: dict[tuple[Any, ...], Living] = {}
        self._held: dict[tuple[Any, ...], float] = {}

    def of(self, fit: Fit) -> float:
        """Return the bytes of one device: state, gradients and what lives beside them."""
        execution, pipe = fit.config.execution, fit.mesh.shape[PIPE]
        if pipe == 1:
            return self.least(fit) + self._beside(fit, _sequences(fit))
        program = program_of(execution.schedule, pipe, _micro_batches(fit.config))
        boxes = program.num_activations + program.num_gradients + program.num_pending
        return self.of_pipeline(fit, program.num_slots, boxes)

    def least(self, fit: Fit) -> float:
        """Return the bytes that need no trace: state, gradients, copies, a gathered layer, transfers between stages."""
        config, pipe = fit.config, fit.mesh.shape[PIPE]
        execution = config.execution
        placement = placement_of(execution.schedule, pipe).name if pipe > 1 else ""
        key = *fit.mesh.shape.values(), execution.gather, placement
        if key not in self._held:
            held = bytes_per_device(config, self._state, fit.mesh)
            sums = held["gradients"] if pipe > 1 else 0  # a tick's branch gives other sums back than it was given
            self._held[key] = sum(held.values()) + sums + gathered_layer(config, self._state, fit.mesh)
        return self._held[key] + _least_slots(fit) * _row_bytes(fit)

    def of_pipeline(self, fit: Fit, slots: int, boxes: int) -> float:
        """Return the bytes of one device of a pipeline whose table has so many slots of what is kept, and inboxes."""
        config, model, pipe = fit.config, fit.config.model, fit.mesh.shape[PIPE]
        flat = dataclasses.replace(fit, config=config.with_(mesh={PIPE: 1}), mesh=without_pipe(fit.mesh))
        sequences, all_layers = _sequences(flat), model.num_layers + model.num_mtp_layers
        beside, of_layer = self._beside(flat, sequences), self._trace(flat, 1).kept
        kept = beside / all_layers if of_layer is None else sequences * of_layer  # not scanned: all that lives
        stages = split_layers(model, placement_of(config.execution.schedule, pipe).num_stages)
        most = max(s.dense_layers.number + s.moe_layers.number + s.is_last * model.num_mtp_layers for s in stages)
        row, of_tick = _row_bytes(fit), max(0.0, beside - kept * all_layers)
        held = self.least(fit) - _least_slots(fit) * row
        return held + of_tick + (slots + 2) * (kept * most + row) + (boxes + 6) * row  # two spare, four of a tick

    def _beside(self, fit: Fit, sequences: int) -> float:
        """Return what lives beside gradients, copies and a gathered layer, on the first mesh that was asked for."""
        one = self._trace(fit, 1).most
        if sequences == 1:
            return one
        full = dataclasses.replace(fit, config=fit.config.with_(execution={"remat": "full"}))
        fixed = max(0.0, 2 * self._trace(full, 1).most - self._trace(full, 2).most)
        return fixed + sequences * max(0.0, one - fixed)

    def _trace(self, fit: Fit, sequences: int) -> Living:
        """Return what lives beside them with so many sequences on a device."""
        execution = fit.config.execution
        key = execution.remat, execution.gather, sequences, axis_size(fit.mesh, (CONTEXT,))
        if key not in self._traced:
            self._say(f"tracing the gradient: {sequences} sequences a device, remat {key[0]}")
            config = fit.config.with_(
                training={"micro_batch_size": sequences * axis_size(fit.mesh, ROWS)}, execution={"scan_unroll": 1}
            )
            held = bytes_per_device(config, self._state, fit.mesh)
            known = sum(size for name, size in held.items() if name in IN_GRADIENT)
            known += gathered_layer(config, self._state, fit.mesh)
            found = living(config, fit.mesh)
            self._traced[key] = found._replace(most=max(0, found.most - known))
        return self._traced[key]


def _sequences(fit: Fit) -> int:
    """Return the sequences of a micro-batch on a device."""
    return fit.config.training.micro_batch_size // axis_size(fit.mesh, ROWS)


def _least_slots(fit: Fit) -> int:
    """Return how many micro-batches some device of a pipeline holds at once at least; without one 0."""
    pipe = fit.mesh.shape[PIPE]
    count = _micro_batches(fit.config)
    return 0 if pipe == 1 else count if fit.config.execution.schedule == "gpipe" else min(count, pipe)


def _row_bytes(fit: Fit) -> int:
    """Return the bytes of one micro-batch's activations between two layers."""
    config = fit.config
    tokens = config.training.micro_batch_size * config.data.sequence_length // axis_size(fit.mesh, TOKENS)
    return tokens * config.model.width * jnp.dtype(compute_dtype(config.execution)).itemsize


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

    One sequence a device and full recomputation need least. None: no number of devices of a pod is enough.
    """
    least = config.with_(execution={"remat": "full", "gather": "layer"})
    for number in (first << doublings for doublings in range(13)):
        if not chip.has(number):
            return None
        fit = find_fit(least, number)
        if fit is None:
            continue
        rows = axis_size(fit.mesh, ROWS)
        changes = {"training.micro_batch_size": rows, "execution.remat": "full", "execution.gather": "layer"}
        smallest = as_fit(config, number, {**fit.changes, **changes})
        if smallest and accepted(smallest.config, smallest.mesh) and memory.of(smallest) <= chip.memory:
            return smallest
    return None


def _pipelines_that_fit(
    config: Config, num_devices: int, chip: Chip, memory: Memory, say: Callable[[str], None]
) -> list[Fit]:
    """Return the pipelines that fit and that a run accepts; none if a run has something that no pipeline can have."""
    try:
        check_beside_pipeline(config, {PIPE: 2, CONTEXT: config.mesh.context})
    except ValueError as error:
        say(f"no pipeline is tried: {error}")
        return []
    return [fit for fit in pipelines(config, num_devices, chip) if _fits(fit, chip, memory)]


def _fits(fit: Fit, chip: Chip, memory: Memory) -> bool:
    """Whether a pipeline fits and a run accepts it. Tables take long, those of all batches longest: they come last."""
    config, pipe = fit.config, fit.mesh.shape[PIPE]
    try:
        split_layers(config.model, placement_of(config.execution.schedule, pipe).num_stages)
    except ValueError:  # the schedule does not take so many devices, or has more stages than the model has layers
        return False
    if memory.least(fit) > chip.memory or memory.of_pipeline(fit, _least_slots(fit), 0) > chip.memory:
        return False
    try:
        program_of(config.execution.schedule, pipe, _micro_batches(config))
    except ValueError:  # the schedule does not take so many micro-batches
        return False
    return memory.of(fit) <= chip.memory and accepted(config, fit.mesh)


def _micro_batches(config: Config) -> int:
    """Return the micro-batches of the largest step."""
    return largest_batch(config) // config.training.micro_batch_size
