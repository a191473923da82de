"""A table as arrays of integers, which is all that an executor reads.

Every array has shape [devices, ticks] and dtype int32; -1 means "nothing". In tick t a device d

    1. reads slot `forward_inbox[d, t]` of the inbox of activations, runs F, and keeps what the backward pass needs in
       slot `forward_slot[d, t]`; reads slot `backward_inbox[d, t]` of the inbox of gradients and what is kept in
       `backward_slot[d, t]`, and runs B; W reads what is kept in `weight_slot[d, t]`. A B without its W leaves what
       that will need in `backward_pending[d, t]`, and W finds it in `weight_pending[d, t]`;
    2. hands the output of F to `forward_to[d, t]` and the gradient that B made to `backward_to[d, t]`;
    3. stores what arrives: an activation from device d - 1 in slot `activation_from_left[d, t]` of its inbox, one from
       d + 1 in `activation_from_right[d, t]`, its own in `activation_from_self[d, t]`; gradients likewise. It may be
       read from tick t + 1 on.

Neighbours are taken modulo the number of devices. All reads of a tick come before its stores: an arrival may take the
slot that has just been read. F and BW of one cell never share a slot of what is kept. So there are as many slots as a
device holds works at once, and no more (`simulation.live`). Where a whole array is -1, nobody needs that transfer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from deepseek_jax.pipeline.table import KINDS, PARTS, Table

NOTHING = -1
KIND_CODES = {"": 0} | {kind: code for code, kind in enumerate(KINDS, 1)}  # idle 0, F 1, B 2, W 3, BW 4, F&BW 5
NOWHERE, LEFT, RIGHT, SELF = 0, -1, 1, 2  # values of `forward_to` and `backward_to`


@dataclass(frozen=True)
class Program:
    """What an executor runs; the module's docstring says how.

    Attributes:
        table: what it was made of.
        num_slots: works that a device holds at once, from F to W: slots of what is kept.
        num_activations, num_gradients: slots of the two inboxes.
        num_pending: slots of what B leaves for a W in a later tick.
        kind: `KIND_CODES`.
        *_micro_batch, *_chunk, *_stage: whose F, B and W.
        forward_slot, backward_slot, weight_slot: where a work's activations are kept. W's is free after its tick.
        forward_inbox: where F's input lies; -1 in stage 0, whose input is tokens.
        backward_inbox: where B's gradient lies; -1 in the last stage, whose gradient is that of the loss.
        backward_pending: where B leaves what its W will need, such as the gradient it read; -1 with W in its cell.
        weight_pending: where W finds it; -1 with B in its cell.
        forward_to, backward_to: `NOWHERE`, `LEFT` (device - 1), `RIGHT` (device + 1) or `SELF`.
        activation_from_*, gradient_from_*: slots for what arrives at the end of the tick.
    """

    table: Table
    num_slots: int
    num_activations: int
    num_gradients: int
    num_pending: int
    kind: np.ndarray
    forward_micro_batch: np.ndarray
    forward_chunk: np.ndarray
    forward_stage: np.ndarray
    forward_slot: np.ndarray
    forward_inbox: np.ndarray
    forward_to: np.ndarray
    backward_micro_batch: np.ndarray
    backward_chunk: np.ndarray
    backward_stage: np.ndarray
    backward_slot: np.ndarray
    backward_inbox: np.ndarray
    backward_pending: np.ndarray
    backward_to: np.ndarray
    weight_micro_batch: np.ndarray
    weight_chunk: np.ndarray
    weight_stage: np.ndarray
    weight_slot: np.ndarray
    weight_pending: np.ndarray
    activation_from_left: np.ndarray
    activation_from_right: np.ndarray
    activation_from_self: np.ndarray
    gradient_from_left: np.ndarray
    gradient_from_right: np.ndarray
    gradient_from_self: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}


def compile_table(table: Table) -> Program:
    """Return the program of a table."""
    arrays = {field.name: _blank(table) for field in fields(Program) if field.type is np.ndarray}
    for name in ("kind", "forward_to", "backward_to"):
        arrays[name][:] = 0
    for device, row in enumerate(table.cells):
        for tick, cell in enumerate(row):
            if cell is None:
                continue
            arrays["kind"][device, tick] = KIND_CODES[cell.kind]
            for part, work in cell.parts():
                arrays[f"{part}_micro_batch"][device, tick] = work.micro_batch
                arrays[f"{part}_chunk"][device, tick] = work.chunk
                arrays[f"{part}_stage"][device, tick] = table.placement.stage(device, work.chunk)
    kept = _keep(table, arrays)
    activations, gradients = (_send(table, arrays, part) for part in ("forward", "backward"))
    return Program(table, kept, activations, gradients, _leave_pending(table, arrays), **arrays)


def links(arrivals: np.ndarray, step: int) -> list[tuple[int, int]]:
    """Return (from, to) of all pairs of devices of which the second ever receives, int32 [devices, ticks].

    A permutation along a mesh axis waits for each of its pairs. Chunks that go around close the ring; the other
    schedules are chains, whose ends have nothing for each other.

    Args:
        arrivals: slots, -1 where nothing comes; of the one side that `step` is.
        step: how many devices an arrival has moved.
    """
    num_devices = len(arrivals)
    return [((to - step) % num_devices, to) for to in range(num_devices) if (arrivals[to] >= 0).any()]


def _blank(table: Table) -> np.ndarray:
    return np.full((table.num_devices, table.num_ticks), NOTHING, np.int32)


def _units(table: Table) -> dict[int, list[tuple[int, int]]]:
    """Return the (micro-batch, stage) of every device."""
    units: dict[int, list[tuple[int, int]]] = {device: [] for device in range(table.num_devices)}
    for micro_batch in range(table.num_micro_batches):
        for stage, place in enumerate(table.route(micro_batch)):
            units[place.device].append((micro_batch, stage))
    return units


def _keep(table: Table, arrays: dict[str, np.ndarray]) -> int:
    """Fill the slots of what is kept from F to W, and return how many there are."""
    most = 0
    for device, units in _units(table).items():
        ticks = [[table.ticks[part, *unit] for part in PARTS] for unit in units]
        slots, num_slots = allocate((f, w + 1) for f, _, w in ticks)  # not even a forward pass beside W may take it
        most = max(most, num_slots)
        for slot, of_parts in zip(slots, ticks, strict=True):
            for part, tick in zip(PARTS, of_parts, strict=True):
                arrays[f"{part}_slot"][device, tick] = slot
    return most


def _send(table: Table, arrays: dict[str, np.ndarray], part: str) -> int:
    """Fill where the outputs of F or B go and in which slots they wait; return how many slots an inbox has."""
    noun, step = ("activation", 1) if part == "forward" else ("gradient", -1)
    arrivals: dict[int, list[tuple[int, int, int]]] = {device: [] for device in range(table.num_devices)}
    for micro_batch in range(table.num_micro_batches):
        route = table.route(micro_batch)
        for stage, place in enumerate(route):
            if 0 <= stage + step < len(route):
                target = route[stage + step].device
                made, read = (table.ticks[part, micro_batch, s] for s in (stage, stage + step))
                direction = _direction(place.device, target, table.num_devices)
                arrays[f"{part}_to"][place.device, made] = direction
                arrivals[target].append((made, read, direction))
    most = 0
    for device, of_device in arrivals.items():
        slots, num_slots = allocate((made, read) for made, read, _ in of_device)
        most = max(most, num_slots)
        for slot, (made, read, direction) in zip(slots, of_device, strict=True):
            source = {RIGHT: "left", LEFT: "right", SELF: "self"}[direction]
            arrays[f"{noun}_from_{source}"][device, made] = slot
            arrays[f"{part}_inbox"][device, read] = slot
    return most


def _direction(device: int, target: int, num_devices: int) -> int:
    """Return where a device's neighbour is. Of two devices the other is to the right of 0 and to the left of 1."""
    if device == target:
        return SELF
    if target - device in (LEFT, RIGHT):
        return target - device
    assert abs(target - device) == num_devices - 1, (device, target)
    return RIGHT if target == 0 else LEFT


def _leave_pending(table: Table, arrays: dict[str, np.ndarray]) -> int:
    """Fill where B leaves something for its W, and return how many slots that takes."""
    most = 0
    for device, units in _units(table).items():
        waits = [(table.ticks["backward", *unit], table.ticks["weight", *unit]) for unit in units]
        waits = [(b, w) for b, w in waits if b < w]
        slots, num_slots = allocate(waits)
        most = max(most, num_slots)
        for slot, (b, w) in zip(slots, waits, strict=True):
            arrays["backward_pending"][device, b] = slot
            arrays["weight_pending"][device, w] = slot
    return most


def allocate(spans: Iterable[tuple[int, int]]) -> tuple[list[int], int]:
    """Return a slot for every half-open span [start, end), and the number of slots: as few as overlap at once."""
    spans = list(spans)
    slots, free_from = [NOTHING] * len(spans), list[int]()
    for index in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, end = spans[index]
        slot = next((s for s, free in enumerate(free_from) if free <= start), len(free_from))
        if slot == len(free_from):
            free_from.append(end)
        free_from[slot] = end
        slots[index] = slot
    return slots, len(free_from)
