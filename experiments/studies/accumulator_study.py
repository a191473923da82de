"""Draw what the limited FP8 accumulator costs, and what promotion cures.

`python -m experiments.studies.accumulator_study`

Emulates products of 64 x 64 outputs (`pallas_kernels/accumulator.py`). Draws their relative L2 error against the exact
product of the same FP8 values, over K and over the promotion interval. Writes the drawing and a record of each point.
Takes ten seconds.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.palette import BLUE, GREEN, ORANGE, VERMILION
from experiments import command
from experiments.studies import output
from pallas_kernels import GROUP
from pallas_kernels.accumulator import Accumulator, multiply
from pallas_kernels.bench import records
from pallas_kernels.quantized import LARGEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 64  # m and n: 4,096 outputs make the relative L2 error stable to 5% over seeds
LENGTHS = [2**i for i in range(8, 15)]  # of K
LENGTH = 4096  # K where the interval varies: the report's example (arXiv 2412.19437, section 3.5.2)
INTERVALS = [2**i for i in range(5, 12)]


class Case(NamedTuple):
    """The data and the accumulator of one line of the drawing."""

    label: str
    distribution: str  # a method of numpy.random.Generator
    fraction_bits: int
    rounding: str
    color: str  # Okabe and Ito's palette, which colour-blind readers tell apart


CASES = [
    Case("uniform(0, 1), 13 bits", "random", 13, "toward_zero", VERMILION),
    Case("uniform(0, 1), 14 bits", "random", 14, "toward_zero", ORANGE),
    Case("N(0, 1), 13 bits, floor", "standard_normal", 13, "floor", BLUE),
    Case("N(0, 1), 13 bits, toward zero", "standard_normal", 13, "toward_zero", GREEN),
]


def main(_) -> None:
    """Emulate, write, draw."""
    folder = output.folder("accumulator")
    points = [record for case in CASES for record in measure(case)]
    common = records.provenance("experiments.studies.accumulator_study", "NumPy, emulated")
    records.write(folder / "accumulator_study.json", [point | common for point in points])
    figure = draw(points, quantisation_error())
    figure.savefig(folder / "accumulator_study.png", dpi=110)
    print(f"Wrote {folder}/accumulator_study.json and .png")


def measure(case: Case) -> list[dict[str, Any]]:
    """Return the records of a case: over K, never promoted and promoted every 128; over the interval at K = 4096."""
    never = {k: relative_error(case, k, None) for k in LENGTHS}
    promoted = [(k, GROUP) for k in LENGTHS] + [(LENGTH, interval) for interval in INTERVALS if interval != GROUP]
    found = [_record(case, k, None, error, None) for k, error in never.items()]
    return found + [_record(case, k, interval, relative_error(case, k, interval), never[k]) for k, interval in promoted]


def relative_error(case: Case, k: int, interval: int | None) -> float:
    """Return the relative L2 error of 64 x 64 outputs, in percent, against the exact product of the same FP8 values."""
    a, b = (_whole_tensor(x) for x in _operands(case.distribution, k))
    emulated = multiply(a, b, Accumulator(case.fraction_bits, case.rounding, interval))
    return _percent(emulated, a.astype(np.float64) @ b.astype(np.float64).T)


def quantisation_error() -> float:
    """Return the error of a product of N(0, 1) rounded to FP8, in percent. An accumulator must stay far below it."""
    x, w = _operands("standard_normal", LENGTH)
    a, b = (_whole_tensor(y).astype(np.float64) / (LARGEST / abs(y).max()) for y in (x, w))
    return _percent(a @ b.T, x @ w.T)


def _operands(distribution: str, k: int) -> list[np.ndarray]:
    rng = np.random.default_rng(k)
    return [getattr(rng, distribution)((SIZE, k)) for _ in range(2)]


def _whole_tensor(x: np.ndarray) -> np.ndarray:
    """Return E4M3 with the largest magnitude at 448. The scale divides out of a relative error."""
    return (x * (LARGEST / abs(x).max())).astype(ml_dtypes.float8_e4m3fn)


def _percent(product: np.ndarray, exact: np.ndarray) -> float:
    return float(100 * np.linalg.norm(product - exact) / np.linalg.norm(exact))


def _record(case: Case, k: int, interval: int | None, error: float, never: float | None) -> dict[str, Any]:
    shape = {"m": SIZE, "n": SIZE, "k": k, "promotion_interval": interval}
    record = {
        "op": "limited accumulator",
        "mode": case.label,
        "precision": "fp8",
        "shape": shape,
        "value": error,
        "unit": "% relative L2",
    }
    return record | {"yardstick": never and {"name": "never promoted", "version": None, "value": never}}


def draw(points: list[dict[str, Any]], quantisation: float) -> "Figure":
    """Return the drawing: error over K on the left, over the promotion interval on the right, one colour per case."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    over_k, over_interval = figure.subplots(1, 2, sharey=True)
    for case in CASES:
        of_case = {
            (point["shape"]["k"], point["shape"]["promotion_interval"]): point["value"]
            for point in points
            if point["mode"] == case.label
        }
        style = {"color": case.color, "marker": "o", "markersize": 4, "linewidth": 1.8}
        over_k.plot(LENGTHS, [of_case[k, None] for k in LENGTHS], label=case.label, **style)
        over_k.plot(LENGTHS, [of_case[k, GROUP] for k in LENGTHS], linestyle="--", **style)
        over_interval.plot(
            [*INTERVALS, LENGTH], [of_case[LENGTH, interval] for interval in [*INTERVALS, None]], **style
        )
    over_k.plot([], [], color="black", label="never promoted")
    over_k.plot([], [], color="black", linestyle="--", label=f"promoted every {GROUP} (DeepSeek-V3)")
    over_k.set(
        title="Error grows with K; promotion holds it down", xlabel="K", ylabel="relative L2 error of the product, %"
    )
    over_interval.set(title=f"Each promotion less costs accuracy (K = {LENGTH})", xlabel="promotion interval along K")
    over_interval.axvline(GROUP, color="black", linewidth=0.8, linestyle=":")
    over_interval.annotate("DeepSeek-V3", (GROUP, 0.0025), xytext=(4, 0), textcoords="offset points", fontsize=9)
    _label_lengths(over_k, LENGTHS, [f"{k}" for k in LENGTHS])
    _label_lengths(over_interval, [*INTERVALS, LENGTH], [*(f"{interval}" for interval in INTERVALS), "never"])
    over_k.annotate(
        "rounding N(0, 1) to FP8",
        (LENGTHS[0], quantisation),
        xytext=(0, 3),
        textcoords="offset points",
        color="gray",
        fontsize=9,
    )
    for axes in (over_k, over_interval):
        axes.axhline(quantisation, color="gray", linewidth=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _label_lengths(axes: "Axes", places: list[int], labels: list[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels)


if __name__ == "__main__":
    command.run(main)
