"""The published schedules, each one function from devices and micro-batches to a table.

gpipe        Huang et al., arXiv 1811.06965: all forward passes, then all backward passes
1f1b         Narayanan et al., arXiv 2006.09503 (PipeDream-Flush): a backward pass as soon as there can be one
interleaved  Narayanan et al., arXiv 2104.04473: 1f1b with several chunks a device
zb1p         Qi et al., arXiv 2401.10241 (ZB-H1): 1f1b with W behind B, in the memory of 1f1b
dualpipe     DeepSeek-V3, arXiv 2412.19437, section 3.2.1: from both ends, forward and backward passes overlapped
dualpipev    the half of it that has both ends on one device (DeepSeek's repository DualPipe, 2025)
"""

from collections.abc import Iterator

from deepseek_jax.pipeline import orders
from deepseek_jax.pipeline.table import Cell, Table, Work, bidirectional, interleaved, linear, v


def gpipe(num_devices: int, num_micro_batches: int) -> Table:
    """Return the schedule that does all forward passes first."""
    _check_sizes("gpipe", num_devices, num_micro_batches)
    rows = range(num_micro_batches)
    order = [orders.forward(i) for i in rows] + [orders.full(i) for i in rows]
    return orders.lay_out("gpipe", linear(num_devices), num_micro_batches, [order] * num_devices)


def one_f_one_b(num_devices: int, num_micro_batches: int) -> Table:
    """Return the schedule in which a device holds at most as many micro-batches as stages follow, itself included."""
    _check_sizes("1f1b", num_devices, num_micro_batches)

    def order(device: int) -> list[Cell]:
        ahead = min(num_devices - 1 - device, num_micro_batches)
        cells = [orders.forward(i) for i in range(ahead)]
        for i in range(num_micro_batches):
            if i + ahead < num_micro_batches:
                cells.append(orders.forward(i + ahead))
            cells.append(orders.full(i))
        return cells

    every = [order(device) for device in range(num_devices)]
    return orders.lay_out("1f1b", linear(num_devices), num_micro_batches, every)


def _check_sizes(name: str, num_devices: int, num_micro_batches: int) -> None:
    if num_devices < 1 or num_micro_batches < 1:
        raise ValueError(f"{name} takes at least 1 device and 1 micro-batch, not {num_devices} and {num_micro_batches}")
