"""A picture of a table: devices down, time across, a box per cell with the number of its micro-batch."""

from typing import TYPE_CHECKING

from deepseek_jax.palette import BLACK, BLUE, GREEN, ORANGE
from deepseek_jax.pipeline.simulation import Durations, run
from deepseek_jax.pipeline.table import LETTERS, Cell, Table, Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

Bounds = tuple[float, float, float, float]  # left, top, right, bottom
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
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    times = run(table, durations)
    boxes: dict[tuple[str, bool], list[Bounds]] = {}
    frames: list[Bounds] = []
    for device, row in enumerate(table.cells):
        for tick, cell in enumerate(row):
            if cell is not None:
                place = (times.starts[device, tick], device - 0.5, times.ends[device, tick], device + 0.5)
                for part, work, box in _boxes(cell, place, durations):
                    boxes.setdefault((part, work.chunk > 0), []).append(box)
                    if part != "weight" or cell.kind == "W":  # else it is its B's
                        _number(axes, work, box)
                if cell.kind == "FBW":
                    frames.append(place)
    for (part, is_pale), of_part in boxes.items():  # one path for all boxes of a colour: the file stays small
        style = {"facecolor": COLORS[part], "alpha": OTHER_CHUNKS if is_pale else FIRST_CHUNK, "edgecolor": "white"}
        axes.add_patch(PathPatch(Path.make_compound_path(*map(_outline, of_part)), linewidth=0.4, **style))
    if frames:
        path = Path.make_compound_path(*map(_outline, frames))
        axes.add_patch(PathPatch(path, fill=False, edgecolor=BLACK, linewidth=0.9))
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


def _boxes(cell: Cell, place: Bounds, durations: Durations) -> "Iterator[tuple[str, Work, Bounds]]":
    """Yield the box of every part: W right of its B, F above both."""
    left, top, right, bottom = place
    if cell.kind == "FBW":
        middle = (top + bottom) / 2
        yield from ((part, work, (left, top, right, middle)) for part, work in cell.parts() if part == "forward")
        top = middle
    if cell.backward is not None and cell.weight is not None:
        between = left + durations.inputs / durations.full * (right - left)
        yield "backward", cell.backward, (left, top, between, bottom)
        yield "weight", cell.weight, (between, top, right, bottom)
    else:
        yield from ((part, work, place) for part, work in cell.parts())


def _outline(box: Bounds) -> "Path":
    from matplotlib.path import Path

    left, top, right, bottom = box
    return Path([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True)


def _number(axes: "Axes", work: Work, box: Bounds) -> None:
    left, top, right, bottom = box
    if right - left > SHORTEST_NUMBER:
        color = "white" if work.chunk == 0 else BLACK
        size = (6.5 if bottom - top == 1 else 4.5) * min(1.0, (right - left) / 0.75)
        place = (left + right) / 2, (top + bottom) / 2
        axes.text(*place, str(work.micro_batch), ha="center", va="center_baseline", fontsize=size, color=color)
