"""The final table and the sheet of curves of a run, both made from its `metrics.jsonl`.

Neither needs the process that trained. The sheet is drawn without `pyplot`, so the plotting backend of a notebook stays
as it is.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deepseek_jax.training.metrics import read_rows

SHEET_NAME = "training.png"


def final_table(workdir: Path, corpus_hash: str, checkpoint_steps: list[int]) -> str:
    """Return the summary of a complete run as lines of two columns."""
    rows = read_rows(workdir)
    evaluations = [row for row in rows if "eval/bits_per_byte" in row]
    training = [row for row in rows if "train/loss" in row]
    yardsticks = next(row for row in reversed(rows) if "yardstick/bigram_bits_per_byte" in row)
    before, after = evaluations[0], evaluations[-1]
    speeds = [row["speed/tokens_per_second"] for row in training]
    step_seconds = [row["speed/step_seconds"] for row in training]
    compile_seconds = [row["speed/compile_seconds"] for row in training if "speed/compile_seconds" in row]
    bigram, bits = yardsticks["yardstick/bigram_bits_per_byte"], after["eval/bits_per_byte"]
    lines = [
        ("held-out bits per byte, before", f"{before['eval/bits_per_byte']:.3f}"),
        ("held-out bits per byte, after", f"{bits:.3f}"),
        (
            "  bigram of the tokens seen",
            "not counted: too many tokens" if bigram is None else f"{bigram:.3f}  ({bits / bigram - 1.0:+.1%})",
        ),
        ("  gzip -9 of pieces of the model's context", f"{yardsticks['yardstick/gzip_pieces_bits_per_byte']:.3f}"),
        ("  gzip -9 of whole files", f"{yardsticks['yardstick/gzip_files_bits_per_byte']:.3f}"),
        ("  xz -9 of whole files", f"{yardsticks['yardstick/xz_files_bits_per_byte']:.3f}"),
        ("tokens seen, steps", f"{after['tokens_seen']:,}, {after['step']:,}"),
        ("tokens/s (median)", f"{median(speeds):,.0f}"),
        (
            "step time (median), compile time",
            f"{median(step_seconds):.3f} s, {' + '.join(f'{value:.1f}' for value in compile_seconds)} s",
        ),
        ("corpus (SHA-256)", corpus_hash[:16]),
        ("checkpoints", ", ".join(str(step) for step in checkpoint_steps)),
        ("metrics, curves", f"{workdir / 'metrics.jsonl'}, {workdir / SHEET_NAME}"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def draw_sheet(workdir: Path) -> Path:
    """Draw losses, imbalance, load per expert and bias range over time into `training.png`; return its path.

    Raises:
        ValueError: the metrics have no training line yet.
    """
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    rows = read_rows(workdir)
    training = [row for row in rows if "train/loss" in row]
    if not training:
        raise ValueError(f"{workdir} has no training line in its metrics yet; train a step first")
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    tokens = np.array([row["tokens_seen"] for row in training]) / 1e6
    _draw_losses(axes[0, 0], tokens, training, [row for row in rows if "eval/loss" in row])
    _draw_balance(axes[0, 1], tokens, training)
    _draw_load(axes[1, 0], tokens, training)
    _draw_bias(axes[1, 1], tokens, training)
    for panel in axes.flat:
        panel.set_xlabel("tokens seen, millions")
    path = workdir / SHEET_NAME
    figure.savefig(path, dpi=110)
    return path


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """Return the values of a key over the rows as floats; null becomes NaN, which leaves a gap in a curve."""
    return np.array([row[key] for row in rows], dtype=float)


def _draw_losses(panel, tokens, training, evaluations) -> None:
    panel.plot(tokens, _column(training, "train/loss"), linewidth=1, label="main head")
    for depth, curve in enumerate(_column(training, "train/mtp_loss").reshape(len(training), -1).T, start=1):
        panel.plot(tokens, curve, linewidth=1, label=f"MTP, depth {depth}")
    panel.plot(
        [row["tokens_seen"] / 1e6 for row in evaluations],
        _column(evaluations, "eval/loss"),
        "ko",
        markersize=5,
        label="main head, held-out",
    )
    panel.set(title="Cross entropy", ylabel="nats per token")
    panel.legend()
    panel.grid(alpha=0.3)


def _draw_balance(panel, tokens, training) -> None:
    max_vio = _column(training, "router/max_vio")
    panel.plot(tokens, max_vio.mean(axis=1), linewidth=1, label="MaxVio per batch, mean over layers")
    panel.plot(tokens, max_vio.max(axis=1), linewidth=1, alpha=0.6, label="MaxVio per batch, worst layer")
    panel.plot(
        tokens,
        _column(training, "router/max_vio_sequence").mean(axis=1),
        linewidth=1,
        label="MaxVio per sequence, mean over layers",
    )
    panel.set(title="Imbalance of the experts", ylabel="(max load - mean load) / mean load", ylim=(0, None))
    panel.legend()
    panel.grid(alpha=0.3)


def _draw_load(panel, tokens, training) -> None:
    """Draw a heat map: one row per expert of each layer, colour is load over the mean load of the layer."""
    load_TLE = _column(training, "router/load")
    relative_TLE = load_TLE / np.maximum(load_TLE.mean(axis=2, keepdims=True), 1e-9)
    num_layers, num_experts = load_TLE.shape[1:]
    left = tokens[0] - (tokens[1] - tokens[0] if len(tokens) > 1 else tokens[0])
    image = panel.imshow(
        relative_TLE.reshape(len(tokens), -1).T,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0.0,
        vmax=2.0,
        extent=(left, tokens[-1], num_layers * num_experts, 0),
    )
    for layer in range(1, num_layers):
        panel.axhline(layer * num_experts, color="black", linewidth=0.8)
    panel.set_yticks(
        [(layer + 0.5) * num_experts for layer in range(num_layers)], [f"layer {layer}" for layer in range(num_layers)]
    )
    panel.set(title=f"Load of each expert ({num_experts} per layer; MTP layers last)")
    panel.figure.colorbar(image, ax=panel, label="load / mean load of the layer", extend="max")


def _draw_bias(panel, tokens, training) -> None:
    lowest, highest = _column(training, "router/bias_min"), _column(training, "router/bias_max")
    for layer in range(lowest.shape[1]):
        (upper,) = panel.plot(tokens, highest[:, layer], linewidth=1, label=f"layer {layer}")
        panel.plot(tokens, lowest[:, layer], linewidth=1, color=upper.get_color())
        panel.fill_between(tokens, lowest[:, layer], highest[:, layer], alpha=0.06, color=upper.get_color())
    panel.axhline(0.0, color="black", linewidth=0.8)
    panel.set(title="Range of the router biases", ylabel="bias")
    if lowest.shape[1] <= 8:
        panel.legend()
    panel.grid(alpha=0.3)
