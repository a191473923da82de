"""The plan of a run: its size, the numbers of devices that work and, for one of them, the memory of a device."""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.plan.assignment import assign_step
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.counts import Counts, bytes_per_device, count, host_bytes_per_device, state_of, update_bytes
from deepseek_jax.plan.memory import StepMemory
from deepseek_jax.plan.meshes import Fit, find_fits, require_fit

SECONDS_BETWEEN_SIGNS = 10.0


@dataclasses.dataclass(frozen=True)
class Placement:
    """A config on a number of devices.

    Attributes:
        fit: the config, with its mesh.
        held: bytes of one device, by contents (`counts.bytes_per_device`), computed from the layouts.
        chip: the kind of the devices; None if none was named.
        step: memory of the step by a TPU's compiler; None: there is none to compile for, or nothing is compiled.
        on_host: bytes that lie in host memory for one device, by contents, computed.
        update: bytes of one device while a program of its own updates an average in host memory, computed
            (`counts.update_bytes`). A device needs the larger of the step and this.
    """

    fit: Fit
    held: dict[str, int]
    chip: Chip | None = None
    step: StepMemory | None = None
    on_host: dict[str, int] = dataclasses.field(default_factory=dict)
    update: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        config: as it was given.
        counts: its size.
        fits: the numbers of devices that work, with what must be changed for each.
        placement: on the number of devices that was asked for, or on the smallest whose memory holds the state; None if
            neither is there.
        too_small: the chip whose memory holds the state on none of the numbers that work as written; else None.
        holding: the fits with changes whose state it holds; of a placement, the next number whose devices store less
            each, and no more than they hold if a chip is given.
        by_topology: the devices were given as a topology. Remedies name one, and a card's verdict is left to the traced
            program (`forecast`).
    """

    config: Config
    counts: Counts
    fits: tuple[Fit, ...]
    placement: Placement | None
    too_small: Chip | None = None
    holding: tuple[Fit, ...] = ()
    by_topology: bool = False


def make_plan(
    config: Config,
    num_devices: int | None = None,
    chip: Chip | None = None,
    say: Callable[[str], None] = print,
    compiled: bool = True,
) -> Plan:
    """Plan `config` on `num_devices` devices of a kind; for a TPU its step is compiled (`chips.prepare` comes first).

    Args:
        config: any valid config.
        num_devices: None: with a chip, the smallest number on which what is computed is at most `chip.room`.
        chip: None: nothing is compiled.
        say: takes the signs of life of a long compilation.
        compiled: whether to compile for a TPU.

    Raises:
        ValueError: a run would refuse the number of devices; the message has the flags or numbers that work.
    """
    fit = None if num_devices is None else require_fit(config, num_devices)
    state = state_of(config)
    counts, fits = count(config, state), find_fits(config)
    if fit is None and chip is not None:
        fit = next((f for f in fits if not f.changes and _holds(chip, f, state)), None)
    if fit is None:
        holding = tuple(f for f in fits if f.changes and _holds(chip, f, state)) if chip else ()
        return Plan(config, counts, fits, None, chip, holding)
    step = compile_fit(fit, chip, say) if chip and chip.compiles and compiled else None
    held = _state(fit, state)
    larger = (f for f in fits if f.num_devices > fit.num_devices and _state(f, state) < held)
    if chip:
        larger = (f for f in larger if _holds(chip, f, state))
    holding = tuple(itertools.islice(larger, 1))
    in_memory, on_host = (of(fit.config, state, fit.mesh) for of in (bytes_per_device, host_bytes_per_device))
    on = Placement(fit, in_memory, chip, step, on_host, update_bytes(fit.config, state, fit.mesh))
    return Plan(config, counts, fits, on, holding=holding)


def compile_fit(fit: Fit, chip: Chip, say: Callable[[str], None] = print) -> StepMemory:
    """Compile the step of a fit for a TPU that need not be there, as far as its memory; return that of one device."""
    with signs_of_life(f"compiling the step of {fit.config.name} for {fit.num_devices} devices of {chip.name}", say):
        return assign_step(fit.config, chip, fit.num_devices)


@contextmanager
def signs_of_life(what: str, say: Callable[[str], None]):
    """Say every few seconds that the body still runs, and how long it has."""
    start, done = time.perf_counter(), threading.Event()

    def tell():
        while not done.wait(SECONDS_BETWEEN_SIGNS):
            say(f"{what} ... {time.perf_counter() - start:.0f} s")

    say(f"{what} ... (minutes for a large model)")
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _holds(chip: Chip, fit: Fit, state: Any) -> bool:
    """Whether there are that many chips in a pod, and each of them holds its part of the state."""
    update = update_bytes(fit.config, state, fit.mesh)
    return chip.has(fit.num_devices) and _state(fit, state) <= chip.room and update <= chip.memory


def _state(fit: Fit, state: Any) -> int:
    return sum(bytes_per_device(fit.config, state, fit.mesh).values())
