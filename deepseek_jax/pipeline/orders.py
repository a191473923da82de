"""From what each device does, one thing after the other, to a table: every cell in the first tick that it can be in."""

from collections.abc import Sequence

from deepseek_jax.pipeline.table import Cell, Placement, Table, Work, needs


def forward(micro_batch: int, chunk: int = 0) -> Cell:
    """Return the cell of a forward pass."""
    return Cell(forward=Work(micro_batch, chunk))


def inputs(micro_batch: int, chunk: int = 0) -> Cell:
    """Return the cell of the gradients of inputs."""
    return Cell(backward=Work(micro_batch, chunk))


def weights(micro_batch: int, chunk: int = 0) -> Cell:
    """Return the cell of the gradients of weights."""
    return Cell(weight=Work(micro_batch, chunk))


def full(micro_batch: int, chunk: int = 0) -> Cell:
    """Return the cell of a full backward pass."""
    return Cell(backward=Work(micro_batch, chunk), weight=Work(micro_batch, chunk))


def overlapped(first: Work, second: Work) -> Cell:
    """Return the cell of a forward pass and another's full backward pass."""
    return Cell(forward=first, backward=second, weight=second)


def lay_out(name: str, placement: Placement, num_micro_batches: int, orders: Sequence[Sequence[Cell]]) -> Table:
    """Return the table in which every device does its cells in the given order, each as early as the rules allow.

    Raises:
        ValueError: the orders wait for each other, or the table breaks a rule of `table`.
    """
    done: dict[tuple[str, int, int], int] = {}  # the tick after each part
    rows: list[list[Cell | None]] = [[] for _ in orders]
    next_cells = [0] * len(orders)
    tick = 0

    def is_ready(device: int, cell: Cell) -> bool:
        for part, work in cell.parts():
            key = part, work.micro_batch, placement.stage(device, work.chunk)
            if part != "weight" and any(done.get(k, tick + 1) > tick for k in needs(*key, placement.num_stages)):
                return False  # W follows its B on the same device, so the order alone decides
        return True

    while any(position < len(order) for position, order in zip(next_cells, orders, strict=True)):
        run: list[tuple[int, Cell]] = []
        for device, order in enumerate(orders):
            cell = order[next_cells[device]] if next_cells[device] < len(order) else None
            if cell is not None and is_ready(device, cell):
                run.append((device, cell))
        if not run:
            waiting = {
                d: str(order[i]) for d, (i, order) in enumerate(zip(next_cells, orders, strict=True)) if i < len(order)
            }
            raise ValueError(f"{name}: in tick {tick} every device waits for another: {waiting}")
        for row in rows:
            row.append(None)
        for device, cell in run:
            rows[device][-1] = cell
            next_cells[device] += 1
            for part, work in cell.parts():
                done[part, work.micro_batch, placement.stage(device, work.chunk)] = tick + 1
        tick += 1
    return Table(name, placement, num_micro_batches, tuple(tuple(row) for row in rows))
