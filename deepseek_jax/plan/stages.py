"""How long a step of a pipeline takes, and what leaves its devices: from the very table that the step runs.

Each pass of a stage (F, B, W; `pipeline.table`) has its computation, the exchange of its experts and, with
`execution.gather` = "layer", the gathers of its weights. By the overlap rule of `timing.py` none hides another. Stages
are as the executor deals them (`parallel.stages`): the last has MTP layers and the head, which runs in the tick of B.
The executor costs four things more than the table alone, and all are counted:

    waits       it exchanges with both neighbours after every tick: a device begins a tick when they have ended theirs
    splits      a W in another tick than its B makes the gradients between layers once more: one B more. The first
                stage's B has nothing to do without its W
    slots       what F keeps is copied into a slot, and out of it by B, or by a W apart (`slots.py`)
    transfers   activations and gradients to neighbours, every tick, over the links on which the table ever sends, one
                permutation after another; once a step the FP32 weights of the stages, and their gradients back
                (`parallel.stage_weights`)

Not counted: in every tick a device waits for the host, which reads what it is to run, and kernels wait to be launched.
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
from deepseek_jax.plan.counts import micro_batches_of, shares, without_pipe
from deepseek_jax.plan.held import held_of, plain
from deepseek_jax.plan.slots import COPIED, kept_of_layer
from deepseek_jax.plan.sums import Gradients, cast_traffic, casts_once
from deepseek_jax.plan.ticks import Times, cell_times, makespan
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

COMPUTE, MOVED = "compute", "sums and casts"  # MOVED: slots, too
HEAD = "head_DV"
INSIDE = (COMPUTE, MOVED)  # what does not leave a device: seconds, by axis ""
Amounts = dict[tuple[str, str], float]  # by axis and kind: bytes that leave a device, or seconds


class Passes(NamedTuple):
    """What one micro-batch costs one device in a stage."""

    forward: Amounts
    inputs: Amounts  # B without the head; a W apart from its B pays it once more
    weights: Amounts
    head: Amounts  # with B


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
        self.micro_batches = micro_batches_of(config)
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
        exchange += self._transfers()
        other += self._seconds(only(once, (WEIGHTS, GRADIENTS)))
        optimizer = OPTIMIZER_BYTES * self.held.parameters / self.mesh.size / rates.memory_rate(self.chip)
        moved += once.get(("", MOVED), 0.0)
        return StepTime(*compute, exchange, other, idle, optimizer, moved, travel=exchange + other)

    def cells(self) -> np.ndarray:
        """Return the seconds of all cells of the table, [devices, ticks]."""
        forward, inputs, weights, head = np.array([[self._seconds(part) for part in each] for each in self.passes]).T
        return cell_times(self.program, Times(forward, inputs, weights, inputs * self._has_inputs(), head))

    def idle_share(self) -> float:
        """Return the share of the ticks' time in which a device computes nothing, on average."""
        cells = self.cells()
        return 1 - float(cells.mean(0).sum()) / (makespan(self.program, cells) + self._transfers())

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
        repeated = np.bincount(apart, minlength=len(self.passes)) * self._has_inputs()
        forward = add(*((number / devices, passes.forward) for passes in self.passes))
        backward = [(number / devices, part) for passes in self.passes for part in (passes.weights, passes.head)]
        backward += [((number + n) / devices, p.inputs) for n, p in zip(repeated, self.passes, strict=True)]
        return forward, add(*backward)

    def _has_inputs(self) -> np.ndarray:
        """Return of each stage whether a gradient of its input is needed: of all but the first."""
        return np.arange(len(self.passes)) > 0

    def _links(self) -> list[int]:
        """Return of each permutation of a tick how many links it takes; they run one after another."""
        arrivals = (
            (getattr(self.program, f"{noun}_from_{side}"), step)
            for noun in ("activation", "gradient")
            for side, step in (("left", 1), ("right", -1))
        )
        return [number for slots, step in arrivals if (number := len(links(slots, step)))]

    def _row(self) -> int:
        """Return the bytes of a micro-batch's activations between two layers."""
        return self.tokens * self.config.model.width * jnp.dtype(compute_dtype(self.config.execution)).itemsize

    def _transfers(self) -> float:
        """Return the seconds of all ticks' permutations."""
        sent = len(self._links()) * self.program.table.num_ticks * self._row()
        return self._seconds({(PIPE, ACTIVATIONS): float(sent)})

    def _once(self) -> Amounts:
        """Return what a device sends in a step on average, whatever its stages are."""
        config, devices = self.config, self.mesh.shape[PIPE]
        sends = sum(self._links()) / devices  # of a tick, on average
        share = shares(config, self.mesh)
        gathered = (1 - 1 / devices) * sum(share.get(top, 1.0) * size for top, size in self.held.stored.items())
        found = {
            (PIPE, ACTIVATIONS): sends * self.program.table.num_ticks * self._row(),
            (PIPE, WEIGHTS): gathered,
            (PIPE, GRADIENTS): gathered,
        }
        if config.execution.gather == "step":
            for (top, axis, kind), size in self.held.sent.items():
                found[axis, kind] = found.get((axis, kind), 0.0) + share.get(top, 1.0) * size
        moved = sum(share.get(top, 1.0) * of.once for top, of in self._gradients().items())
        if casts_once(config):
            stored = sum(share.get(top, 1.0) * size for top, size in self.held.stored.items())
            moved += cast_traffic(config, stored, 1)
        return found | {("", MOVED): moved / rates.memory_rate(self.chip)}

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
        forward, inputs, weights = self._compute(parts, config.execution.remat)
        of_head = sum(self._compute((1 + mtp) * stage.is_last * [head(model)], "none"))
        found = Passes(*(Amounts({("", COMPUTE): time}) for time in (forward, inputs, weights, of_head)))
        layers = model.num_moe_layers + model.num_mtp_layers
        for axis, (shipped, _) in self.exchange.items():  # half of it on the way forward
            for amounts in found[:2]:
                amounts[axis, EXCHANGE] = shipped * self.tokens * (moe + mtp) / layers / 2
        numbers = {top: self._share(stage, top) for top in self.held.stored}
        kept = [
            n * kept_of_layer(config, self.mesh, self.tokens, is_moe)
            for n, is_moe in ((dense, False), (moe + mtp, True))
        ]
        self._add_moved(numbers, COPIED * (sum(kept) + stage.is_last * self._row()), found)
        if config.execution.gather == "layer":
            self._gather(numbers, found)
        return found

    def _compute(self, parts: list[Work], remat: str) -> list[float]:
        """Return the seconds of the three passes of a micro-batch over parts of a stage."""
        times = [(0.0, 0.0, 0.0), *(seconds(self.chip, self.config, part, self.tokens, remat) for part in parts)]
        return [self.tokens * sum(of) for of in zip(*times, strict=True)]

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

    def _gradients(self) -> dict[str, Gradients]:
        """Return the gradients that a micro-batch makes of all stages, by the first name of a parameter."""
        return self.held.gradients[self.config.execution.gather]

    def _add_moved(self, numbers: dict[str, float], kept: float, found: Passes) -> None:
        """Add what slots, sums of a stage's gradients and casts of its weights move to its passes."""
        config, gradients = self.config, self._gradients()
        of_head = gradients[HEAD].each * numbers[HEAD]
        added = sum(number * gradients[top].each for top, number in numbers.items()) - of_head
        moved = [kept, kept, added, of_head]
        if not casts_once(config):
            for which in (0, 1):  # the backward pass casts again what it gathers again
                tops = [top for top in numbers if which < passes_of(config, top)]
                moved[which] += cast_traffic(config, sum(numbers[top] * self.held.stored[top] for top in tops), 1)
        for amounts, size in zip(found, moved, strict=True):
            amounts["", MOVED] = size / rates.memory_rate(self.chip)

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
