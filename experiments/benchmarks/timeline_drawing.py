"""Draw one layer's time on a GPU: `python -m experiments.benchmarks.timeline_drawing --trace=FILE --layers=12
--drawing=layer.png`.

Two lanes, computation and communication, forward above and backward below, from a profiler's trace of one step. It also
prints how long the device communicates, and how much of that is beside computation (`experiments/benchmarks/timeline`).
"""

from typing import TYPE_CHECKING

from absl import flags

from deepseek_jax.inputs import local_path, new_file
from deepseek_jax.palette import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW
from experiments import command
from experiments.benchmarks import timeline
from experiments.benchmarks.breakdown import OTHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRACE = flags.DEFINE_string("trace", None, "The .xplane.pb file of one step.", required=True)
DRAWING = flags.DEFINE_string("drawing", None, "Write the drawing to this file, such as layer.png.", required=True)
LAYERS = flags.DEFINE_integer("layers", None, "Layers of the model.", required=True, lower_bound=2, upper_bound=10**4)
LAYER = flags.DEFINE_integer(
    "layer", None, "Which one in the order of a pass, from 0; by default one in the middle.", lower_bound=0
)
DEVICE = flags.DEFINE_integer("device", 0, "Number of the GPU in the trace.", lower_bound=0)
TITLE = flags.DEFINE_string("title", "", "Title of the drawing.")

PASSES = ("forward", "backward")
COLORS = {
    "attention": BLUE,
    "expert products": ORANGE,
    "shared expert, dense FFN": GREEN,
    "router": YELLOW,
    "dispatch": VERMILION,
    "combine": PURPLE,
    timeline.WEIGHTS: SKY,
    "head": BLACK,
    OTHER: GRAY,
}
COMMUNICATION, COMPUTATION = 0, 1  # heights of the lanes
SHORTEST_LABEL = 0.045  # of the window: a shorter bar has no room for its stage's name


def main(_) -> None:
    """Read, print, draw."""
    trace, drawing = command.path_of(TRACE, local_path), command.path_of(DRAWING, new_file)
    assert trace and drawing  # both are required
    kernels = timeline.read(trace, DEVICE.value)
    layer = LAYERS.value // 2 if LAYER.value is None else LAYER.value
    layer = min(layer, LAYERS.value - 2) if LAYER.value is None else layer
    windows = {name: timeline.layer_window(kernels, LAYERS.value, layer, name) for name in PASSES}
    for name, window in windows.items():
        print(describe(name, window, timeline.overlap(kernels, window)))
    draw(kernels, windows, TITLE.value).savefig(drawing, dpi=110)


def describe(direction: str, window: tuple[float, float], found: timeline.Overlap) -> str:
    """Return the numbers of a window in a line."""
    return (
        f"{direction}: {window[1] - window[0]:.2f} ms, computation {found.computes:.2f}, communication"
        f" {found.communicates:.2f}, of it {found.both:.2f} beside computation, idle {found.idle:.2f}"
    )


def draw(kernels: list[timeline.Kernel], windows: dict[str, tuple[float, float]], title: str = "") -> "Figure":
    """Return the drawing: a panel for each window, named by its pass, with times from the window's start."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it
    from matplotlib.patches import Patch

    figure = Figure(figsize=(15, 2.6 * len(windows) + 1), layout="constrained")
    panels = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
    for axes, (direction, window) in zip(panels, windows.items(), strict=True):
        _bars(axes, kernels, window)
        axes.set_title(describe(direction, window, timeline.overlap(kernels, window)), fontsize="medium")
        axes.set_yticks([COMMUNICATION, COMPUTATION], ["communication", "computation"])
        axes.set(xlim=(0, window[1] - window[0]), ylim=(-0.55, 1.55), xlabel="ms")
    handles = [Patch(color=color, label=stage) for stage, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS), frameon=False)
    figure.suptitle(title)
    return figure


def _bars(axes: "Axes", kernels: list[timeline.Kernel], window: tuple[float, float]) -> None:
    """Draw the kernels of a window, and name the long ones by their stage."""
    for kernel in kernels:
        start, stop = (min(max(moment, window[0]), window[1]) - window[0] for moment in (kernel.start, kernel.stop))
        if stop <= start:
            continue
        lane = COMMUNICATION if kernel.communicates else COMPUTATION
        axes.broken_barh([(start, stop - start)], (lane - 0.4, 0.8), color=COLORS[kernel.stage], linewidth=0)
        if stop - start > SHORTEST_LABEL * (window[1] - window[0]):
            axes.text((start + stop) / 2, lane, kernel.stage, ha="center", va="center", fontsize=7, rotation=90)


if __name__ == "__main__":
    command.run(main)
