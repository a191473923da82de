"""Draw the figures of the pages into `docs/drawings/`: `python -m docs.make_drawings`."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from deepseek_jax.palette import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION
from deepseek_jax.pipeline.drawing import draw as draw_schedules
from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import Durations

FOLDER = Path(__file__).parent / "drawings"


class Drawing:
    """A canvas whose unit is about one line of text; y grows downwards."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width / 4, height / 4))
        self.figure.patch.set_facecolor("white")  # readable on a dark page, too
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str, dashed: bool = False) -> None:
        """Draw a rounded box with its text in the middle."""
        style = {"facecolor": color + "30", "edgecolor": color, "linewidth": 1.4, "linestyle": "--" if dashed else "-"}
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.3", **style))
        self.text(x + width / 2, y + height / 2, text)

    def cells(self, x: float, y: float, values: list[str], color: str, marked: tuple[int, ...] = (), size=2.0) -> None:
        """Draw a row of squares; marked ones are filled."""
        for i, value in enumerate(values):
            face = color if i in marked else color + "18"
            self.axes.add_patch(Rectangle((x + i * size, y), size, 1.6, facecolor=face, edgecolor=color))
            self.text(x + (i + 0.5) * size, y + 0.8, value, color="white" if i in marked else BLACK)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], text: str = "", color: str = GRAY) -> None:
        """Draw an arrow, with its text beside the middle."""
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=style)
        if text:
            self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, text, color=color, size=9, ground=True)

    def text(
        self, x: float, y: float, text: str, color: str = BLACK, size: float = 10, align: str = "center", ground=False
    ) -> None:
        """Write text around a point; with `ground` over a white patch that covers what is behind."""
        patch = {"facecolor": "white", "edgecolor": "none", "pad": 1.5} if ground else None
        self.axes.text(x, y, text, color=color, fontsize=size, ha=align, va="center", bbox=patch)

    def save(self, name: str) -> None:
        """Write the drawing as SVG."""
        save(self.figure, name)


def save(figure: Figure, name: str) -> None:
    """Write a figure as SVG: the same bytes each time."""
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def attention() -> Drawing:
    """MLA: what is made of a token, and what the cache keeps."""
    d = Drawing(48, 23)
    d.text(24, 1, "Latent attention: keys and values of 128 heads come from 576 cached numbers per token", size=12)
    d.box(1, 10, 6, 3, "x\n7168", GRAY)
    d.box(12, 4, 8, 3, "query latent c_Q\n1536", BLUE)
    d.box(12, 11, 8, 3, "latent c_KV\n512", VERMILION)
    d.box(12, 17, 8, 3, "rotary key\n64, one for all heads", VERMILION)
    d.arrow((7, 11), (12, 5.5), "W_DQ", BLUE)
    d.arrow((7, 11.6), (12, 12.5), "W_DKV", VERMILION)
    d.arrow((7, 12.2), (12, 18.5), "W_KR, rope", VERMILION)
    d.box(28, 4, 9, 3, "queries of 128 heads\n128 content + 64 rotary", BLUE)
    d.box(28, 10, 9, 3, "keys of 128 heads\n128 content + 64 rotary", GREEN)
    d.box(28, 15, 9, 3, "values of 128 heads\n128", GREEN)
    d.arrow((20, 5.5), (28, 5.5), "W_UQ, W_QR, rope", BLUE)
    d.arrow((20, 12), (28, 11.5), "W_UK", GREEN)
    d.arrow((20, 13), (28, 16.5), "W_UV", GREEN)
    d.arrow((20, 18.5), (28, 12.6), "", GREEN)
    d.box(41, 9, 6, 4, "softmax(q kᵀ) v\nW_O", PURPLE)
    d.arrow((37, 5.5), (41.5, 9), color=PURPLE)
    d.arrow((37, 11.5), (41, 11), color=PURPLE)
    d.arrow((37, 16.5), (41.5, 13), color=PURPLE)
    d.box(11, 10.2, 10, 10.6, "", VERMILION, dashed=True)
    d.text(16, 21.7, "the cache: 576 values instead of 40,960", VERMILION)
    d.text(
        37,
        20,
        "training expands (in green);\ndecoding absorbs W_UK into the query,\nW_UV into the output and reads the cache",
        GREEN,
        9,
    )
    return d


def router() -> Drawing:
    """The choice of experts for one token: eight experts, four groups, two groups kept, two experts."""
    d = Drawing(46, 21)
    d.text(23, 1, "The router's choice: the bias selects, the score weighs", size=12)
    scores, bias = [0.60, 0.20, 0.55, 0.58, 0.30, 0.10, 0.70, 0.15], [0, 0, 0.1, 0.1, 0, 0, -0.3, 0]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    rows = [
        (3.5, "scores s = sigmoid(h W)", scores, BLUE, ()),
        (6.5, "+ bias b: busy experts lose, idle ones win", bias, GRAY, ()),
        (9.5, "s + b; the two best groups by the sum of their best two", biased, ORANGE, (0, 1, 2, 3)),
        (12.5, "K = 2 best of the kept groups", biased, GREEN, (2, 3)),
        (15.5, "gates: unbiased scores, normalised", [0, 0, 0.55 / 1.13, 0.58 / 1.13, 0, 0, 0, 0], PURPLE, (2, 3)),
    ]
    for y, label, values, color, marked in rows:
        d.text(24.5, y + 0.8, label, color, align="right", size=9)
        for group in range(4):
            numbers = [f"{v:.2f}" for v in values[2 * group : 2 * group + 2]]
            here = tuple(i - 2 * group for i in marked if i // 2 == group)
            d.cells(25.5 + group * 5, y, numbers, color, here)
    for group in range(4):
        d.text(27.5 + group * 5, 2.7, f"group {group}", GRAY, 9)
    d.text(
        23,
        19,
        "expert 6 has the best score and is not chosen: it was overloaded, so its bias went down",
        GRAY,
        9,
    )
    return d


def mtp() -> Drawing:
    """What depth 1 of MTP reads and predicts, five positions."""
    d = Drawing(44, 19)
    d.text(22, 1, "Multi-token prediction, depth 1: the ids shift, the states do not", size=12)
    for i in range(5):
        x = 12 + 6 * i
        d.text(x + 1.5, 2.8, f"position {i + 1}", GRAY, 9)
        d.box(x, 4, 3, 2, f"t{i + 1}", BLUE)
        d.box(x, 8, 3, 2, f"h{i + 1}", GREEN)
        d.arrow((x + 1.5, 6), (x + 1.5, 8), color=GREEN)
        d.text(x + 1.5, 10.7, f"predicts t{i + 2}", GREEN, 8, ground=True)
        if i < 4:
            d.box(x, 13, 3, 2, f"h'{i + 1}", PURPLE)
            d.arrow((x + 1.0, 10), (x + 1.0, 13), color=PURPLE)
            d.arrow((x + 6.2, 6), (x + 2.6, 13), color=BLUE)
            d.text(x + 1.5, 15.7, f"predicts t{i + 3}", PURPLE, 8)
    d.text(11, 5, "tokens", BLUE, align="right")
    d.text(11, 9, "main model: state i", GREEN, 9, "right")
    d.text(11, 14, "MTP layer: merges state i\nwith the token after it", PURPLE, 9, "right")
    d.text(
        22,
        17.6,
        "position 5 has no loss at depth 1: t7 is beyond the row",
        GRAY,
        9,
    )
    return d


def mesh() -> Drawing:
    """One token's way to its experts and back, on four devices."""
    d = Drawing(48, 24)
    d.text(
        24,
        1,
        "One token's way through a layer on four devices: each has its own rows and two of eight experts",
        size=12,
    )
    for device in range(4):
        y = 3 + 5 * device
        d.box(1, y, 46, 4.2, "", GRAY, dashed=True)
        d.text(2, y + 0.7, f"device {device}", GRAY, 9, "left")
        d.box(6, y + 1, 6, 2.2, "rows", BLUE)
        d.box(27, y + 1, 7, 2.2, f"experts {2 * device}, {2 * device + 1}", GREEN)
        d.box(40, y + 1, 6, 2.2, "rows", BLUE)
    d.box(14.5, 4, 6, 2.2, "attention,\nrouter: 2, 7", ORANGE)
    d.arrow((12, 5.1), (14.5, 5.1), color=ORANGE)
    for device in (1, 3):
        y = 5.1 + 5 * device
        d.arrow((20.5, 5.1), (27, y), "", VERMILION)
        d.arrow((34, y), (40, 5.1), "", PURPLE)
    d.text(23.8, 15.2, "all-to-all,\nBF16", VERMILION, 9, "right", ground=True)
    d.text(37.3, 15.2, "back,\none sum", PURPLE, 9, "left", ground=True)
    d.text(
        24,
        23.3,
        "dense weights lie in slices and are gathered before a layer; the transpose sums their gradients",
        GRAY,
        9,
    )
    return d


def fp8() -> Drawing:
    """The three products of a linear layer and what is quantised how."""
    d = Drawing(48, 23)
    d.text(24, 1, "A linear layer's three products in FP8, and how each operand is grouped", size=12)
    tiles, blocks, columns = "tiles of 1 x 128", "blocks of 128 x 128", "tiles of 128 x 1"
    rows = [
        (3, "forward", "y = x W", ("x", tiles), ("W", blocks), "BF16"),
        (9, "input gradient", "dx = dy Wᵀ", ("dy", tiles), ("Wᵀ", blocks), "BF16"),
        (15, "weight gradient", "dW = xᵀ dy", ("xᵀ", columns), ("dy", columns), "FP32"),
    ]
    for y, name, formula, left, right, out in rows:
        d.text(1, y + 1, name, align="left")
        d.text(1, y + 2.6, formula, GRAY, align="left")
        for x, (operand, grouping) in ((10, left), (20, right)):
            color = {tiles: BLUE, blocks: GREEN, columns: ORANGE}[grouping]
            d.box(x, y, 8, 3.8, f"{operand}, E4M3\n{grouping}", color)
        d.arrow((28, y + 1.9), (32, y + 1.9))
        d.box(32, y, 8, 3.8, "tensor core,\nFP32 every 128", VERMILION)
        d.arrow((40, y + 1.9), (43, y + 1.9))
        d.box(43, y, 4, 3.8, out, PURPLE)
    d.text(
        24,
        20.6,
        "W is quantised once per optimizer step and gathered as bytes; xᵀ is regrouped from what was kept",
        GRAY,
        9,
    )
    d.text(24, 22, "the sum along k leaves the tensor core every 128 products, because it keeps about 14 bits", GRAY, 9)
    return d


def pipeline() -> Figure:
    """Every schedule of a pipeline, four devices, drawn from the table that an executor runs."""
    return draw_schedules([schedule(name, 4, 8) for name in SCHEDULES], Durations(overlapped=2.5))


DRAWINGS = {"attention": attention, "router": router, "mtp": mtp, "mesh": mesh, "fp8": fp8}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for drawing, draw in DRAWINGS.items():
        draw().save(drawing)
    save(pipeline(), "pipeline")
