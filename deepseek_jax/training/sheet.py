"""The sheet of curves of a run, `training.png`, drawn from its `metrics.jsonl`.

It does not need the process that trained. It is drawn without `pyplot`, so the plotting backend of a notebook stays as
it is. Noisy curves are drawn faintly, with their running mean over them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.palette import BELOW_TO_ABOVE, BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SERIES, VERMILION
from deepseek_jax.training.metrics import YARDSTICKS, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHEET_NAME = "training.png"
SMOOTHED_SHARE = 0.03  # of the points of a curve go into each point of its running mean
MOST_NAMED_LAYERS = 8  # in a legend
YARDSTICK_COLORS = {
    "yardstick/bigram_bits_per_byte": ORANGE,
    "yardstick/gzip_files_bits_per_byte": GREEN,
    "yardstick/xz_files_bits_per_byte": PURPLE,
}

Row = dict[str, Any]  # of the metrics


def draw_sheet(config: Config, workdir: Path, num_parameters: int | None = None) -> Path:
    """Draw the curves of a run into `training.png`; return its path.

    Args:
        config: the run's configuration, for title and names of layers.
        workdir: the run's folder.
        num_parameters: for the title; left out if None.

    Raises:
        ValueError: the metrics have no training line yet.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    rows = read_rows(workdir)
    training = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if row.get("eval/bits_per_byte") is not None]
    if not training:
        raise ValueError(f"{workdir} has no training line in its metrics yet; train a step first")
    figure = Figure(figsize=(17, 10), layout="constrained")
    figure.suptitle(_title(config, workdir, num_parameters, training, evaluations), fontsize=12)
    axes = figure.subplots(2, 4)
    tokens = np.array([row["tokens_seen"] for row in training]) / 1e6
    _draw_losses(axes[0, 0], tokens, training, evaluations)
    _draw_bits(axes[0, 1], rows, evaluations)
    _draw_rates(axes[0, 2], tokens, training)
    _draw_norm(axes[0, 3], tokens, training)
    _draw_speed(axes[1, 0], tokens, training)
    layers = config.model.routed_layers
    if layers:
        _draw_balance(axes[1, 1], tokens, training)
        _draw_load(axes[1, 2], tokens, training, layers)
        _draw_bias(axes[1, 3], tokens, training, layers)
    for panel in axes.flat:
        if not panel.has_data():
            panel.set_axis_off()
            continue
        panel.set_xlabel("tokens seen, millions")
        if not panel.images:
            panel.grid(alpha=0.25)
    path = workdir / SHEET_NAME
    figure.savefig(path, dpi=100)
    return path


def smoothed(values: np.ndarray, share: float = SMOOTHED_SHARE) -> np.ndarray:
    """Return the running mean of `values` over a window of `share` of them, centred and cut at both ends.

    NaNs are left out of the means; where a window has nothing else, the mean is NaN.
    """
    reach = int(len(values) * share / 2)
    kept = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(kept, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(kept)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    total, count = sums[last] - sums[first], counts[last] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _title(
    config: Config, workdir: Path, num_parameters: int | None, training: list[Row], evaluations: list[Row]
) -> str:
    """Say which run this is: name and workdir, parameters, data, and what it reached."""
    size = f", {num_parameters / 1e6:,.1f}M parameters" if num_parameters else ""
    sources = [Path(source.path).name or source.path for source in config.data.sources]
    named = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    last = training[-1]
    result = f"{last['tokens_seen'] / 1e6:,.1f}M tokens of {named}, {last['step']:,} steps"
    if evaluations and (bits := evaluations[-1]["eval/bits_per_byte"]) is not None:
        result += f": {bits:.3f} held-out bits per byte"
    return f"{config.name}{size}, {config.execution.precision.upper()}, in {workdir}\n{result}"


def _column(rows: list[Row], key: str) -> np.ndarray:
    """Return the values of a key over the rows as floats; null becomes NaN, which leaves a gap in a curve."""
    return np.array([row[key] for row in rows], dtype=float)


def _draw_noisy(panel: "Axes", tokens: np.ndarray, values: np.ndarray, color: str, label: str | None) -> None:
    panel.plot(tokens, values, linewidth=0.8, alpha=0.3, color=color)
    panel.plot(tokens, smoothed(values), linewidth=1.6, color=color, label=label)


def _draw_losses(panel: "Axes", tokens: np.ndarray, training: list[Row], evaluations: list[Row]) -> None:
    _draw_noisy(panel, tokens, _column(training, "train/loss"), SERIES[0], "next token")
    depths = _column(training, "train/mtp_loss").reshape(len(training), -1).T
    for depth, curve in enumerate(depths, start=1):
        _draw_noisy(panel, tokens, curve, SERIES[depth % len(SERIES)], f"MTP {depth}")
    seen = [row["tokens_seen"] / 1e6 for row in evaluations]
    panel.plot(seen, _column(evaluations, "eval/loss"), "o", color=BLACK, markersize=4, label="next token, held-out")
    panel.set(title="Cross entropy", ylabel="nats per token")
    panel.legend(frameon=False)


def _draw_bits(panel: "Axes", rows: list[Row], evaluations: list[Row]) -> None:
    """Draw held-out bits per byte, and as lines the yardsticks, which were measured at the end."""
    if not evaluations:
        return
    seen = [row["tokens_seen"] / 1e6 for row in evaluations]
    panel.plot(seen, _column(evaluations, "eval/bits_per_byte"), "o-", color=BLUE, markersize=4, label="this run")
    measured = next((row for row in reversed(rows) if "yardstick/bigram_bits_per_byte" in row), {})
    for key, color in YARDSTICK_COLORS.items():
        if measured.get(key) is not None:
            panel.axhline(measured[key], color=color, linewidth=1.4, linestyle="--", label=YARDSTICKS[key])
    panel.set(title="Held-out bits per byte", ylabel="bits per byte")
    panel.legend(frameon=False)


def _draw_rates(panel: "Axes", tokens: np.ndarray, training: list[Row]) -> None:
    panel.plot(tokens, _column(training, "optimizer/learning_rate"), color=BLUE, linewidth=1.6)
    panel.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
    _mark_end_of_gamma(panel, tokens, training)


def _draw_norm(panel: "Axes", tokens: np.ndarray, training: list[Row]) -> None:
    norms = _column(training, "optimizer/grad_norm")
    _draw_noisy(panel, tokens, norms, BLUE, None)
    if np.nanmax(norms, initial=0.0) > 0.0:
        panel.set_yscale("log")
    panel.set(title="Gradient norm, before clipping", ylabel="L2 norm")


def _draw_speed(panel: "Axes", tokens: np.ndarray, training: list[Row]) -> None:
    _draw_noisy(panel, tokens, _column(training, "speed/tokens_per_second"), BLUE, None)
    panel.set(title="Speed", ylabel="tokens per second", ylim=(0, None))


def _draw_balance(panel: "Axes", tokens: np.ndarray, training: list[Row]) -> None:
    max_vio = _column(training, "router/max_vio")
    sequences = _column(training, "router/max_vio_sequence")
    _draw_noisy(panel, tokens, max_vio.mean(axis=1), BLUE, "per batch, mean over layers")
    _draw_noisy(panel, tokens, max_vio.max(axis=1), VERMILION, "per batch, worst layer")
    _draw_noisy(panel, tokens, sequences.mean(axis=1), GREEN, "per sequence, mean over layers")
    panel.set(title="MaxVio: imbalance of the experts", ylabel="(max load - mean load) / mean load", ylim=(0, None))
    _mark_end_of_gamma(panel, tokens, training)
    panel.legend(frameon=False)


def _draw_load(panel: "Axes", tokens: np.ndarray, training: list[Row], layers: tuple[str, ...]) -> None:
    """Draw a heat map: one row per expert of each layer, colour is load over the mean load of the layer."""
    load_TLE = _column(training, "router/load")
    relative_TLE = load_TLE / np.maximum(load_TLE.mean(axis=2, keepdims=True), 1e-9)
    num_layers, num_experts = load_TLE.shape[1:]
    left = tokens[0] - (tokens[1] - tokens[0] if len(tokens) > 1 else tokens[0])
    image = panel.imshow(
        relative_TLE.reshape(len(tokens), -1).T,
        aspect="auto",
        interpolation="nearest",
        cmap=BELOW_TO_ABOVE,
        vmin=0.0,
        vmax=2.0,
        extent=(left, tokens[-1], num_layers * num_experts, 0),
    )
    for layer in range(1, num_layers):
        panel.axhline(layer * num_experts, color=BLACK, linewidth=0.8)
    panel.set_yticks([(layer + 0.5) * num_experts for layer in range(num_layers)], layers[:num_layers])
    panel.set(title=f"Load of each of {num_experts} experts per layer")
    panel.figure.colorbar(image, ax=panel, label="load / mean load of the layer", extend="max")


def _draw_bias(panel: "Axes", tokens: np.ndarray, training: list[Row], layers: tuple[str, ...]) -> None:
    lowest, highest = _column(training, "router/bias_min"), _column(training, "router/bias_max")
    for index, name in enumerate(layers[: lowest.shape[1]]):
        color = SERIES[index % len(SERIES)]
        panel.plot(tokens, highest[:, index], linewidth=1.2, color=color, label=name)
        panel.plot(tokens, lowest[:, index], linewidth=1.2, color=color)
        panel.fill_between(tokens, lowest[:, index], highest[:, index], alpha=0.08, color=color)
    panel.axhline(0.0, color=BLACK, linewidth=0.8)
    panel.set(title="Range of the router biases", ylabel="bias")
    _mark_end_of_gamma(panel, tokens, training)
    if lowest.shape[1] <= MOST_NAMED_LAYERS:
        panel.legend(frameon=False)


def _mark_end_of_gamma(panel: "Axes", tokens: np.ndarray, training: list[Row]) -> None:
    """Draw a line where gamma, the step of the router biases, becomes 0: the biases stand still after it."""
    gamma = _column(training, "optimizer/bias_update_rate")
    still = np.flatnonzero((gamma[:-1] > 0) & (gamma[1:] == 0))
    if len(still):
        panel.axvline(tokens[still[-1] + 1], color=GRAY, linewidth=1.2, linestyle=":", label="gamma becomes 0")
