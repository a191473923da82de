"""The fastest way to lay a run out on a number of devices: every mesh, recomputation and micro-batch that fits.

Times are those of `timing.py`. Memory is estimated: what the layouts hold, and the traced gradient of one and of two
sequences on a device (`liveness.py`), taken as linear in tokens and alike on every mesh but for the gathered layer.
The plan of the winner traces or compiles it itself. Schedules of a pipeline are not searched.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import CONTEXT, ROWS
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.counts import bytes_per_device, gathered_layer, largest_batch
from deepseek_jax.plan.liveness import gradient_bytes
from deepseek_jax.plan.meshes import Fit, accepted, as_fit, find_fit
from deepseek_jax.plan.timing import StepTime, layout_of, step_time

REMATS = ("selective", "full")
SEQUENCES = (1, 2, 4, 8, 16)  # of a micro-batch on a device


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to lay a run out."""

    fit: Fit
    memory: float  # bytes of a device, estimated
    time: StepTime

    def fits(self, chip: Chip) -> bool:
        """Whether a device of `chip` has so much memory."""
        return self.memory <= chip.memory


class Memory:
    """Estimates the memory of a step on any mesh, from few traces of the gradient, each made once."""

    def __init__(self, state: Any, say: Callable[[str], None]):
        """Take the abstract state of the config, and what to tell before a trace."""
        self._state, self._say = state, say
        self._traced: dict[tuple[str, str, int, int], float] = {}

    def of(self, fit: Fit) -> float:
        """Return the bytes of one device: state, gradients and what lives beside them."""
        config = fit.config
        sequences = config.training.micro_batch_size // axis_size(fit.mesh, ROWS)
        one, two = (self._beside(fit, count) for count in (1, 2))
        held = sum(bytes_per_device(config, self._state, fit.mesh).values())
        return held + gathered_layer(config, self._state, fit.mesh) + one + (sequences - 1) * (two - one)

    def _beside(self, fit: Fit, sequences: int) -> float:
        """Return what lives beside gradients, copies and a gathered layer, on the first mesh that was asked for."""
        execution = fit.config.execution
        key = execution.remat, execution.gather, sequences, axis_size(fit.mesh, (CONTEXT,))
        if key not in self._traced:
            config = fit.config.with_(training={"micro_batch_size": sequences * axis_size(fit.mesh, ROWS)})
            self._say(f"tracing the gradient: {sequences} sequences a device, remat {key[0]}")
            held = bytes_per_device(config, self._state, fit.mesh)
            known = sum(size for name, size in held.items() if name in ("gradients", "copies"))
            known += gathered_layer(config, self._state, fit.mesh)
            self._traced[key] = max(0.0, gradient_bytes(config, fit.mesh) - known)
        return self._traced[key]


def candidates(config: Config, num_devices: int) -> Iterator[Fit]:
    """Yield every mesh of `num_devices` devices, with every recomputation and micro-batch that a run accepts.

    Meshes that spread experts most come first. Devices share sequences only where the batch has too few of them.
    """
    first = find_fit(config, num_devices)
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
        sizes_of_mesh = {"mesh.data": -1, "mesh.context": context, "mesh.node": node, "mesh.expert": expert}
        others = {"execution.remat": remat, "training.micro_batch_size": micro_batch}
        fit = as_fit(config, num_devices, sizes_of_mesh | others)
        if fit is not None and accepted(fit.config, fit.mesh):
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
    if not fits:
        raise ValueError(
            f"no mesh of {num_devices} devices is accepted for {config.name}: its batch of {largest_batch(config)} must"
            f" be a multiple of {num_devices}, or of a part of them that share sequences; python -m experiments.plan"
            " lists what works"
        )
    choices = [Choice(fit, memory.of(fit), _time(fit, chip, state)) for fit in fits]
    fitting = sorted((c for c in choices if c.fits(chip)), key=lambda choice: choice.time.total)
    if not fitting:
        least = min(choices, key=lambda choice: choice.memory)
        larger = nearest_that_fits(config, 2 * num_devices, chip, memory)
        where = f"; {larger.num_devices} devices do, with {larger.flags}" if larger else ", and neither on more devices"
        raise ValueError(
            f"nothing fits on {num_devices} {chip.name}: the least is {least.memory / 1e9:,.0f} of"
            f" {chip.memory / 1e9:,.0f} GB, with {least.fit.flags}{where}"
        )
    return fitting


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


def _time(fit: Fit, chip: Chip, state: Any) -> StepTime:
    return step_time(fit.config, layout_of(fit.config, fit.mesh, state, chip), chip)
