"""A picture of a table: devices down, time across, a box per cell with the number of its micro-batch."""

from typing import TYPE_CHECKING

from deepseek_jax.palette import BLACK, BLUE, GREEN, ORANGE
from deepseek_jax.pipeline.simulation import Durations, run
from deepseek_jax.pipeline.table import LETTERS, Table, Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"forward": BLUE, "backward": GREEN, "weight": ORANGE}
MEANINGS = {"forward": "forward", "backward": "gradients of inputs", "weight": "gradients of weights"}
FIRST_CHUNK, OTHER_CHUNKS = 0.95, 0.45  # opacities
WIDTH_OF_TIME = 0.2  # inches per unit of time
HEIGHT_OF_DEVICE = 0.24
SHORTEST_NUMBER = 0.3  # units of time: a shorter box has no room for a number


def draw(tables: "Sequence[Table]", durations: Durations) -> "Figure":
    """Return a drawing with a panel per table, all on one scale of time.

    Colours are parts, paler ones those of a device's second chunk and of later ones. A full backward pass has both of
    its colours; a pair that overlaps is framed, F above.

    Args:
        tables: at least one.
        durations: of a P-th of the model; chunks that are smaller take less.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it
    from matplotlib.patches import Patch

    sized = [durations.scaled(table.num_devices / table.placement.num_stages) for table in tables]
    longest = max(run(table, of_chunk).makespan for table, of_chunk in zip(tables, sized, strict=True))
    heights = [table.num_devices for table in tables]
    size = (longest * WIDTH_OF_TIME + 1, sum(heights) * HEIGHT_OF_DEVICE + 0.55 * len(tables) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table, of_chunk in zip(panels, tables, sized, strict=True):
        _panel(axes, table, of_chunk)
        axes.set_xlim(0, longest)
    patches = [Patch(color=COLORS[part], label=f"{LETTERS[part]}: {MEANINGS[part]}") for part in COLORS]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=8)
    return figure


def _panel(axes: "Axes", table: Table, durations: Durations) -> None:
    times = run(table, durations)
    for device, row in enumerate(table.cells):
        for tick, cell in enumerate(row):
            if cell is None:
                continue
            start, end = times.starts[device, tick], times.ends[device, tick]
            has_pair = cell.forward is not None and cell.backward is not None
            height = 0.5 if has_pair else 1.0
            if cell.forward is not None:
                _box(axes, "forward", cell.forward, start, end, device - 0.5, height)
            if cell.backward is not None:
                share = durations.inputs / durations.full if cell.weight is not None else 1.0
                middle = start + share * (end - start)
                top = device - 0.5 + has_pair * height
                _box(axes, "backward", cell.backward, start, middle, top, height)
                if cell.weight is not None:
                    _box(axes, "weight", cell.weight, middle, end, top, height)
            elif cell.weight is not None:
                _box(axes, "weight", cell.weight, start, end, device - 0.5, height)
            if has_pair:
                _frame(axes, start, end, device)
    axes.set_ylim(table.num_devices - 0.5, -0.5)
    axes.set_yticks(range(table.num_devices))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{table.name}: {table.num_devices} devices, {table.placement.num_stages} stages, "
        f"{table.num_micro_batches} micro-batches; time {times.makespan:g}, idle {times.idle.max():g}",
        fontsize=9,
        loc="left",
    )


def _box(axes: "Axes", part: str, work: Work, start: float, end: float, top: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    opacity = FIRST_CHUNK if work.chunk == 0 else OTHER_CHUNKS
    style = {"facecolor": COLORS[part], "alpha": opacity, "edgecolor": "white", "linewidth": 0.4}
    axes.add_patch(Rectangle((start, top), end - start, height, **style))
    if end - start > SHORTEST_NUMBER:
        color = "white" if work.chunk == 0 else BLACK
        size = (6.5 if height == 1 else 4.5) * min(1.0, (end - start) / 0.75)
        number = str(work.micro_batch)
        axes.text(
            (start + end) / 2, top + height / 2, number, ha="center", va="center_baseline", fontsize=size, color=color
        )


def _frame(axes: "Axes", start: float, end: float, device: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((start, device - 0.5), end - start, 1, fill=False, edgecolor=BLACK, linewidth=0.9))
