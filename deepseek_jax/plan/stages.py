"""How long a step of a pipeline takes, and what leaves its devices: from the very table that the step runs.

Each pass of a stage (F, B, W; `pipeline.table`) has its computation, the exchange of its experts and, with
`execution.gather` = "layer", the gathers of its weights. By the overlap rule of `timing.py` none hides another. Stages
are as the executor deals them (`parallel.stages`): the last has MTP layers and the head. The executor costs three
things more than the table alone, and all are counted:

    waits       it exchanges with both neighbours after every tick: a device begins a tick when they have ended theirs
    splits      a W in another tick than its B makes the gradients between layers once more: one B more
    transfers   activations and gradients to neighbours, every tick, over the links on which the table ever sends; once
                a step the FP32 weights of the stages, and their gradients back (`parallel.stage_weights`)
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import AnyMesh, axis_size
from deepseek_jax.parallel.stages import Stage, program_of, split_layers
from deepseek_jax.parameters import EXPERTS, PIPE, TOKENS
from deepseek_jax.pipeline.program import links
from deepseek_jax.plan import rates
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.counts import largest_batch, shares, without_pipe
from deepseek_jax.plan.held import held_of, plain
from deepseek_jax.plan.sums import ADDED, cast_traffic, casts_once
from deepseek_jax.plan.ticks import cell_times, makespan
from deepseek_jax.plan.timing import (
    IN,
    NCCL,
    OPTIMIZER_BYTES,
    OUT,
    TORUS,
    StepTime,
    layout_of,
    link_of,
    mean_hops,
    step_time,
    travel,
)
from deepseek_jax.plan.traffic import abstract
from deepseek_jax.plan.wire import (
    ACTIVATIONS,
    EXCHANGE,
    GRADIENTS,
    WEIGHTS,
    Sent,
    exchange_of_token,
    in_order,
    passes_of,
    sent_in_step,
)
from deepseek_jax.plan.work import Product, Work, dense_layer, head, moe_layer, seconds

COMPUTE, MOVED = "compute", "sums and casts"
INSIDE = (COMPUTE, MOVED)  # what does not leave a device: seconds, by axis ""
Amounts = dict[tuple[str, str], float]  # by axis and kind: bytes that leave a device, or seconds


class Passes(NamedTuple):
    """What one micro-batch costs one device in a stage."""

    forward: Amounts
    inputs: Amounts  # B; a W apart from its B pays it once more
    weights: Amounts


def time_of(config: Config, mesh: AnyMesh, state: Any, chip: Chip) -> StepTime:
    """Return the seconds of our own step on a mesh, with or without a pipeline.

    Args:
        config: that fits the mesh.
        mesh: of devices or of sizes.
        state: abstract state (`counts.state_of`).
        chip: of all devices.
    """
    if mesh.shape[PIPE] == 1:
        return step_time(config, layout_of(config, mesh, state, chip), chip)
    return Pipeline(config, mesh, chip).time()


def sent_of(config: Config, mesh: AnyMesh, state: Any, chip: Chip) -> list[Sent]:
    """Return what leaves a device in a step; in a pipeline on average over its devices."""
    if mesh.shape[PIPE] == 1:
        layout = layout_of(config, mesh, state, chip)
        return sent_in_step(config, mesh, state, layout.micro_batches, layout.tokens)
    return Pipeline(config, mesh, chip).sent()


class Pipeline:
    """A step of a config on a mesh with `pipe` above 1."""

    def __init__(self, config: Config, mesh: AnyMesh, chip: Chip):
        self.config, self.mesh, self.chip = config, abstract(mesh), chip
        self.held = held_of(plain(config), without_pipe(self.mesh))
        self.micro_batches = largest_batch(config) // config.training.micro_batch_size
        self.tokens = config.training.micro_batch_size * config.data.sequence_length // axis_size(mesh, TOKENS)
        self.program = program_of(config.execution.schedule, mesh.shape[PIPE], self.micro_batches)
        stages = split_layers(config.model, self.program.table.placement.num_stages)
        self.exchange = exchange_of_token(config, self.mesh)
        self.passes = [self._passes(stage) for stage in stages]

    def time(self) -> StepTime:
        """Return the seconds of the step: of devices on average, with what they wait."""
        step = makespan(self.program, self.cells())
        mean, once = self._mean(), self._once()
        compute = mean[0].get(("", COMPUTE), 0.0), mean[1].get(("", COMPUTE), 0.0)
        busy = add((1.0, mean[0]), (1.0, mean[1]))
        moved = busy.get(("", MOVED), 0.0)
        exchange, other = (self._seconds(only(busy, kinds)) for kinds in ((EXCHANGE,), (WEIGHTS, GRADIENTS)))
        idle = step - sum(compute) - moved - exchange - other
        exchange += self._seconds(only(once, (ACTIVATIONS,)))
        other += self._seconds(only(once, (WEIGHTS, GRADIENTS)))
        optimizer = OPTIMIZER_BYTES * self.held.parameters / self.mesh.size / rates.memory_rate(self.chip)
        moved += once.get(("", MOVED), 0.0)
        return StepTime(*compute, exchange, other, idle, optimizer, moved, travel=exchange + other)

    def cells(self) -> np.ndarray:
        """Return the seconds of all cells of the table, [devices, ticks]."""
        length = [[self._seconds(amounts) for amounts in passes] for passes in self.passes]
        return cell_times(self.program, *np.array(length).T)

    def sent(self) -> list[Sent]:
        """Return the bytes that leave a device in a step, on average."""
        every = add(*((1.0, amounts) for amounts in (*self._mean(), self._once())))
        useful = {axis: limit / shipped for axis, (shipped, limit) in self.exchange.items()}
        return in_order(
            Sent(axis, kind, size, size * (useful[axis] if kind == EXCHANGE else 1.0))
            for (axis, kind), size in every.items()
            if size and kind not in INSIDE
        )

    def _mean(self) -> tuple[Amounts, Amounts]:
        """Return what all micro-batches cost a device on average, forward and backward."""
        number, devices = self.micro_batches, self.mesh.shape[PIPE]
        apart = self.program.weight_stage[self.program.weight_pending >= 0]
        repeated = np.bincount(apart, minlength=len(self.passes))
        forward = add(*((number / devices, passes.forward) for passes in self.passes))
        backward = [(number / devices, passes.weights) for passes in self.passes]
        backward += [((number + n) / devices, p.inputs) for n, p in zip(repeated, self.passes, strict=True)]
        return forward, add(*backward)

    def _once(self) -> Amounts:
        """Return what a device sends in a step on average, whatever its stages are."""
        config, devices = self.config, self.mesh.shape[PIPE]
        row = config.model.width * jnp.dtype(compute_dtype(config.execution)).itemsize
        arrivals = (
            (getattr(self.program, f"{noun}_from_{side}"), step)
            for noun in ("activation", "gradient")
            for side, step in (("left", 1), ("right", -1))
        )
        sends = sum(len(links(slots, step)) for slots, step in arrivals) / devices  # of a tick, on average
        share = shares(config, self.mesh)
        gathered = (1 - 1 / devices) * sum(share.get(top, 1.0) * size for top, size in self.held.stored.items())
        found = {
            (PIPE, ACTIVATIONS): sends * self.program.table.num_ticks * self.tokens * row,
            (PIPE, WEIGHTS): gathered,
            (PIPE, GRADIENTS): gathered,
        }
        if config.execution.gather == "step":
            for (top, axis, kind), size in self.held.sent.items():
                found[axis, kind] = found.get((axis, kind), 0.0) + share.get(top, 1.0) * size
        if casts_once(config):
            stored = sum(share.get(top, 1.0) * size for top, size in self.held.stored.items())
            found["", MOVED] = cast_traffic(config, stored, 1) / rates.memory_rate(self.chip)
        return found

    def _passes(self, stage: Stage) -> Passes:
        """Return what one micro-batch costs in a stage."""
        config, model = self.config, self.config.model
        dense, moe = stage.dense_layers.number, stage.moe_layers.number
        mtp = model.num_mtp_layers if stage.is_last else 0
        length, precision = config.data.sequence_length, config.execution.precision
        experts = max(model.num_experts / axis_size(self.mesh, EXPERTS), 1)
        parts = dense * dense_layer(model, length, precision) + (moe + mtp) * moe_layer(
            model, length, precision, experts
        )
        parts += mtp * [Work((Product(2 * model.width, model.width),))]
        work = [(part, config.execution.remat) for part in parts]
        work += (1 + mtp) * stage.is_last * [(head(model), "none")]
        times = [seconds(self.chip, config, part, self.tokens, remat) for part, remat in work]
        found = Passes(*(Amounts({("", COMPUTE): self.tokens * sum(of)}) for of in zip(*times, strict=True)))
        layers = model.num_moe_layers + model.num_mtp_layers
        for axis, (shipped, _) in self.exchange.items():  # half of it on the way forward
            for amounts in found[:2]:
                amounts[axis, EXCHANGE] = shipped * self.tokens * (moe + mtp) / layers / 2
        numbers = {top: self._share(stage, top) for top in self.held.stored}
        self._add_sums(numbers, found)
        if config.execution.gather == "layer":
            self._gather(numbers, found)
        return found

    def _share(self, stage: Stage, top: str) -> float:
        """Return which share of the weights under the first name of a parameter a stage has."""
        model = self.config.model
        if top == "dense_layers":
            return stage.dense_layers.number / max(model.num_dense_layers, 1)
        if top == "moe_layers":
            return stage.moe_layers.number / max(model.num_moe_layers, 1)
        if top == "embed_VD":
            return float(stage.is_first or (stage.is_last and model.num_mtp_layers > 0))
        return float(stage.is_last)

    def _add_sums(self, numbers: dict[str, float], found: Passes) -> None:
        """Add the sums of a stage's gradients to its passes, and the casts of its weights."""
        config, rate = self.config, rates.memory_rate(self.chip)
        summed = self.held.in_use if config.execution.gather == "step" else self.held.stored
        found.weights["", MOVED] = ADDED * sum(n * summed[top] for top, n in numbers.items()) / rate
        if not casts_once(config):
            for which, amounts in enumerate(found[:2]):  # the backward pass casts again what it gathers again
                tops = [top for top in numbers if which < passes_of(config, top)]
                stored = sum(numbers[top] * self.held.stored[top] for top in tops)
                amounts["", MOVED] = cast_traffic(config, stored, 1) / rate

    def _gather(self, numbers: dict[str, float], found: Passes) -> None:
        """Add the gathers of a stage's weights to its passes, and the sums of their gradients over devices."""
        for (top, axis, kind), size in self.held.sent.items():
            size *= numbers[top]
            again = kind == WEIGHTS and passes_of(self.config, top) == 2
            of_weights = (found.forward, found.inputs) if again else (found.forward,)
            for amounts in of_weights if kind == WEIGHTS else (found.weights,):
                amounts[axis, kind] = amounts.get((axis, kind), 0.0) + size

    def _seconds(self, amounts: Amounts) -> float:
        """Return how long it takes, nothing beside anything."""
        total, transport = sum(amounts.get(("", kind), 0.0) for kind in INSIDE), TORUS if self.chip.compiles else NCCL
        for kind, hops in ((EXCHANGE, mean_hops(self.chip, self.mesh.size)), ("", 1.0)):
            sent = {IN: 0.0, OUT: 0.0}
            for (axis, of), size in amounts.items():
                if of not in INSIDE and (of == EXCHANGE) == (kind == EXCHANGE):
                    sent[link_of(self.chip, self.mesh, axis)] += size
            total += travel(transport, sent, self.chip, hops)
        return total


def add(*parts: tuple[float, Amounts]) -> Amounts:
    """Return the sum of amounts, each times its factor."""
    total: Amounts = {}
    for factor, amounts in parts:
        for key, value in amounts.items():
            total[key] = total.get(key, 0.0) + factor * value
    return total


def only(amounts: Amounts, kinds: Iterable[str]) -> Amounts:
    """Return the amounts of some kinds."""
    return {key: value for key, value in amounts.items() if key[1] in kinds}
