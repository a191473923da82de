"""Draw what the scaling of gradients costs where tokens differ: `python -m experiments.studies.scaling_study`.

DeepSeek saw a 16B model diverge when gradients of activations were scaled in blocks of 128 x 128, as weights are, and
suspected outliers that belong to tokens (arXiv 2412.19437, appendix B.2). Here gradients g = exp(s n_t) n_tj of 1,024
tokens are quantised in four ways; n is normal, and s is the spread between tokens. Both products of the backward pass
are then exact, so the only error is the quantisation of g.

    tiles     E4M3, 1 token x 128 channels for the input gradient, 128 tokens x 1 channel for the weight gradient: the
              recipe
    blocks    E4M3, 128 x 128
    tensor    E4M3, one scale
    hybrid    E5M2, one scale: the format of more range that others use for gradients

For the input gradient, the error of a token is relative to that token: one large token in a block leaves the small ones
few bits or none. Writes records and the drawing. Takes a few seconds.
"""

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from deepseek_jax.palette import BLUE, GREEN, ORANGE, VERMILION
from experiments import command
from experiments.studies import output
from pallas_kernels import GROUP
from pallas_kernels.bench import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_TOKENS = NUM_OUTPUTS = NUM_INPUTS = 1024
SPREADS = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # standard deviation of the logarithm of a token's magnitude
WAYS = {  # format; group (tokens, channels) for the input gradient; group for the weight gradient; None: all
    "tiles": (ml_dtypes.float8_e4m3fn, (1, GROUP), (GROUP, 1)),
    "blocks": (ml_dtypes.float8_e4m3fn, (GROUP, GROUP), (GROUP, GROUP)),
    "tensor": (ml_dtypes.float8_e4m3fn, None, None),
    "hybrid": (ml_dtypes.float8_e5m2, None, None),
}
COLORS = {"tiles": GREEN, "blocks": VERMILION, "tensor": BLUE, "hybrid": ORANGE}
LABELS = {
    "tiles": "E4M3, tiles of 1 x 128 (DeepSeek-V3)",
    "blocks": "E4M3, blocks of 128 x 128",
    "tensor": "E4M3, one scale",
    "hybrid": "E5M2, one scale",
}


def main(_) -> None:
    """Measure, write, draw."""
    folder = output.folder("scaling")
    points = [record for spread in SPREADS for record in measure(spread)]
    common = records.provenance("experiments.studies.scaling_study", "NumPy, emulated")
    records.write(folder / "scaling_study.json", [point | common for point in points])
    draw(points).savefig(folder / "scaling_study.png", dpi=110)
    print(f"Wrote {folder}/scaling_study.json and .png")


def measure(spread: float) -> list[dict[str, Any]]:
    """Return the records of one spread: the errors of both gradients for each way of scaling."""
    g_TO, x_TI, w_IO = operands(spread)
    dx_TI, dw_IO = g_TO @ w_IO.T, x_TI.T @ g_TO
    found = []
    for way, (dtype, for_input, for_weight) in WAYS.items():
        of_tokens = _norms(quantized(g_TO, dtype, for_input) @ w_IO.T - dx_TI) / _norms(dx_TI)
        of_weight = np.linalg.norm(x_TI.T @ quantized(g_TO, dtype, for_weight) - dw_IO) / np.linalg.norm(dw_IO)
        errors = {"input gradient, mean over tokens": np.mean(of_tokens), "weight gradient": of_weight}
        found += [_record(way, spread, name, 100 * float(error)) for name, error in errors.items()]
    return found


def operands(spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gradients [T, O], inputs [T, I] and weights [I, O] in FP64; the same normal numbers for every spread."""
    rng = np.random.default_rng(0)
    tokens = np.exp(spread * rng.standard_normal((NUM_TOKENS, 1)))
    shapes = (NUM_TOKENS, NUM_OUTPUTS), (NUM_TOKENS, NUM_INPUTS), (NUM_INPUTS, NUM_OUTPUTS)
    g_TO, x_TI, w_IO = (rng.standard_normal(shape) for shape in shapes)
    return tokens * g_TO, x_TI, w_IO


def quantized(x: np.ndarray, dtype: Any, group: tuple[int, int] | None) -> np.ndarray:
    """Return `x` [m, n] in FP64, rounded to `dtype` with a scale per group of (rows, columns), which divide (m, n)."""
    rows, columns = group or x.shape
    parts = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scale = abs(parts).max(axis=(1, 3), keepdims=True) / float(ml_dtypes.finfo(dtype).max)
    return ((parts / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale).reshape(x.shape)


def _norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=1)


def _record(way: str, spread: float, name: str, error: float) -> dict[str, Any]:
    shape = {"tokens": NUM_TOKENS, "outputs": NUM_OUTPUTS, "inputs": NUM_INPUTS, "spread": spread}
    return {
        "op": name,
        "mode": way,
        "precision": "fp8",
        "shape": shape,
        "value": error,
        "unit": "% relative L2",
        "yardstick": None,
    }


def draw(points: list[dict[str, Any]]) -> "Figure":
    """Return the drawing: one panel per gradient, one line per way of scaling."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    names = list(dict.fromkeys(point["op"] for point in points))
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        for way in WAYS:
            values = [point["value"] for point in points if (point["op"], point["mode"]) == (name, way)]
            axes.plot(SPREADS, values, label=LABELS[way], color=COLORS[way], marker="o", markersize=4, linewidth=1.8)
        axes.set(
            title=name[0].upper() + name[1:],
            xlabel="spread between tokens (s)",
            ylabel="relative L2 error, %",
            yscale="log",
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)
