"""The published schedules, each one function from devices and micro-batches to a table; `schedule` takes their names.

gpipe        Huang et al., arXiv 1811.06965: all forward passes, then all backward passes
1f1b         Narayanan et al., arXiv 2006.09503 (PipeDream-Flush): a backward pass as soon as there can be one
interleaved  Narayanan et al., arXiv 2104.04473: 1f1b with several chunks a device
zb1p         Qi et al., arXiv 2401.10241 (ZB-H1): 1f1b with W behind B, in the memory of 1f1b
dualpipe     DeepSeek-V3, arXiv 2412.19437, section 3.2.1: from both ends, forward and backward passes overlapped
dualpipev    its upper half, folded: both ends of one chain of stages on one device (DeepSeek's DualPipe, 2025)
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from deepseek_jax.pipeline import orders
from deepseek_jax.pipeline.table import Cell, Table, Work, bidirectional, interleaved, linear, v


def schedule(name: str, num_devices: int, num_micro_batches: int, num_chunks: int | None = None) -> Table:
    """Return the table of a schedule.

    Args:
        name: one of `SCHEDULES`.
        num_devices: P, devices of the pipeline.
        num_micro_batches: M, micro-batches of a step.
        num_chunks: stages that a device holds; by default the fewest that the schedule takes.

    Raises:
        ValueError: there is no such schedule, or it does not take these numbers.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=2)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no schedule {name!r}{hint}; schedules are {', '.join(SCHEDULES)}")
    if num_devices < 1 or num_micro_batches < 1:
        raise ValueError(f"{name} takes at least 1 device and 1 micro-batch, not {num_devices} and {num_micro_batches}")
    if name == "interleaved":
        return interleaved_1f1b(num_devices, num_micro_batches, 2 if num_chunks is None else num_chunks)
    fixed = 2 if name in ("dualpipe", "dualpipev") else 1
    if num_chunks not in (None, fixed):
        raise ValueError(f"{name} has {fixed} chunk{'s' * (fixed > 1)} a device, not {num_chunks}; interleaved has any")
    return SCHEDULES[name](num_devices, num_micro_batches)


def gpipe(num_devices: int, num_micro_batches: int) -> Table:
    """Return the schedule that does all forward passes first: a device holds all micro-batches."""
    rows = range(num_micro_batches)
    order = [orders.forward(i) for i in rows] + [orders.full(i) for i in rows]
    return orders.lay_out("gpipe", linear(num_devices), num_micro_batches, [order] * num_devices)


def one_f_one_b(num_devices: int, num_micro_batches: int) -> Table:
    """Return the schedule in which a device holds at most as many micro-batches as stages follow, itself included."""
    every = [
        _forward_first(num_devices - 1 - device, num_micro_batches, lambda i: [orders.full(i)])
        for device in range(num_devices)
    ]
    return orders.lay_out("1f1b", linear(num_devices), num_micro_batches, every)


def zb1p(num_devices: int, num_micro_batches: int) -> Table:
    """Return 1f1b with W in its gaps: device d keeps d of them for the end, so that every device holds P works."""

    def order(device: int) -> list[Cell]:
        def backward(i: int) -> list[Cell]:
            return [orders.inputs(i), *([orders.weights(i - device)] if i >= device else [])]

        cells = _forward_first(num_devices - 1 - device, num_micro_batches, backward)
        kept = range(max(0, num_micro_batches - device), num_micro_batches)
        return cells + [orders.weights(i) for i in kept]

    every = [order(device) for device in range(num_devices)]
    return orders.lay_out("zb1p", linear(num_devices), num_micro_batches, every)


def _forward_first(ahead: int, num_micro_batches: int, backward: Callable[[int], list[Cell]]) -> list[Cell]:
    """Return `ahead` forward passes, then one forward and one backward pass in turn."""
    ahead = min(ahead, num_micro_batches)
    cells = [orders.forward(i) for i in range(ahead)]
    for i in range(num_micro_batches):
        if i + ahead < num_micro_batches:
            cells.append(orders.forward(i + ahead))
        cells += backward(i)
    return cells


def interleaved_1f1b(num_devices: int, num_micro_batches: int, num_chunks: int) -> Table:
    """Return 1f1b over a ring: P micro-batches pass one chunk, then the next; idle time falls by `num_chunks`.

    Raises:
        ValueError: fewer than two chunks, or micro-batches that do not divide among the devices.
    """
    if num_chunks < 2:
        raise ValueError(f"interleaved takes at least 2 chunks a device, not {num_chunks}; with one it is 1f1b")
    if num_micro_batches % num_devices:
        lower = num_micro_batches // num_devices * num_devices
        near = f"{lower} or {lower + num_devices}" if lower else f"{num_devices}"
        raise ValueError(
            f"interleaved deals micro-batches in rounds of one a device: {num_micro_batches} do not divide among "
            f"{num_devices} devices; take {near}"
        )
    total = num_micro_batches * num_chunks

    def work(index: int, backward: bool) -> tuple[int, int]:
        around, within = divmod(index, num_devices * num_chunks)
        chunk, i = divmod(within, num_devices)
        return around * num_devices + i, num_chunks - 1 - chunk if backward else chunk

    def order(device: int) -> list[Cell]:
        ahead = min(total, 2 * (num_devices - 1 - device) + (num_chunks - 1) * num_devices)
        cells = [orders.forward(*work(k, False)) for k in range(ahead)]
        for k in range(total):
            if k + ahead < total:
                cells.append(orders.forward(*work(k + ahead, False)))
            cells.append(orders.full(*work(k, True)))
        return cells

    every = [order(device) for device in range(num_devices)]
    return orders.lay_out("interleaved", interleaved(num_devices, num_chunks), num_micro_batches, every)


def dualpipe(num_devices: int, num_micro_batches: int) -> Table:
    """Return the bidirectional schedule: P stages in two copies, half of the micro-batches from each end.

    Raises:
        ValueError: an odd number of devices or micro-batches, or fewer than two micro-batches a device.
    """
    for noun, number in (("devices", num_devices), ("micro-batches", num_micro_batches)):
        if number % 2:
            raise ValueError(
                f"dualpipe works from both ends: {number} {noun} are odd; take {number + 1}"
                + (f", or dualpipev with {num_devices} devices" if noun == "devices" else "")
            )
    _check_enough("dualpipe", num_devices, num_micro_batches)
    half, each = num_devices // 2, num_micro_batches // 2

    def order(device: int) -> list[Cell]:
        is_upper = device >= half
        rank = num_devices - 1 - device if is_upper else device
        begins = (each, 0) if is_upper else (0, each)  # the nearer end feeds chunk 0 below the middle, 1 above it
        chunks = (1, 0) if is_upper else (0, 1)
        return list(_dualpipe_order(half, rank, each, begins, chunks))

    every = [order(device) for device in range(num_devices)]
    return orders.lay_out("dualpipe", bidirectional(num_devices), num_micro_batches, every)


def dualpipev(num_devices: int, num_micro_batches: int) -> Table:
    """Return the V of 2P stages: what the lower half of DualPipe's devices do, for one chain.

    Raises:
        ValueError: fewer than two micro-batches a device.
    """
    _check_enough("dualpipev", num_devices, num_micro_batches)
    every = [list(_dualpipe_order(num_devices, d, num_micro_batches, (0, 0), (0, 1))) for d in range(num_devices)]
    return orders.lay_out("dualpipev", v(num_devices), num_micro_batches, every)


def _check_enough(name: str, num_devices: int, num_micro_batches: int) -> None:
    if num_micro_batches < 2 * num_devices:
        raise ValueError(
            f"{name} fills its pipeline with two micro-batches a device: {num_micro_batches} are too few for "
            f"{num_devices} devices; take at least {2 * num_devices}"
        )


def _dualpipe_order(
    half: int, rank: int, each: int, begins: tuple[int, int], chunks: tuple[int, int]
) -> Iterator[Cell]:
    """Yield what a device of DualPipe does, in eight phases; way 0 begins nearer to this device than way 1.

    Args:
        half: devices from an end to the middle.
        rank: devices from the nearer end to this one.
        each: micro-batches of each way.
        begins: the first micro-batch of each way.
        chunks: the chunk that each way passes here.
    """
    forwards, backwards, deferred = [count(b) for b in begins], [count(b) for b in begins], list[Work]()
    to_middle = half - 1 - rank

    def works(counters: Sequence[Iterator[int]], way: int) -> Work:
        return Work(next(counters[way]), chunks[way])

    def forward(way: int) -> Cell:
        return orders.forward(*works(forwards, way))

    def backward(way: int, split: bool = False) -> Cell:
        work = works(backwards, way)
        if split:
            deferred.append(work)
        return orders.inputs(*work) if split else orders.full(*work)

    def pair(way: int) -> Cell:
        return orders.overlapped(works(forwards, way), works(backwards, 1 - way))

    for _ in range(2 * to_middle):  # 1: fill the way that is far from its end
        yield forward(0)
    for _ in range(rank + 1):  # 2: both ways
        yield from (forward(0), forward(1))
    for _ in range(to_middle):  # 3: the first gradients come back; W fills the wait
        yield from (backward(1, split=True), orders.weights(*deferred.pop(0)), forward(1))
    for i in range(each - 2 * half + rank + 1):  # 4: the main part
        if i == 0 and to_middle == 0:  # the middle would make its neighbour wait for a pair
            yield from (forward(0), backward(1))
        else:
            yield pair(0)
        yield pair(1)
    for _ in range(to_middle):  # 5: the last forward passes
        yield from (backward(1), pair(1))
    for i in range(2 * (rank + 1)):  # 6: from its middle on, W waits, and gradients of inputs travel sooner
        yield backward(1 - i % 2, split=i > rank)
    for _ in range(to_middle):  # 7: a W for every wait
        yield from (orders.weights(*deferred.pop(0)), backward(0, split=True))
    for work in deferred:  # 8: what is left
        yield orders.weights(*work)


SCHEDULES: dict[str, Callable[..., Table]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved_1f1b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
