"""The drawing of `experiments.plan --plot`: memory and bytes of one device against the number of devices."""

from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.palette import BLUE, GRAY, GREEN, ORANGE
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import CONTEXT, ROWS
from deepseek_jax.plan.counts import bytes_per_device
from deepseek_jax.plan.liveness import gradient_bytes
from deepseek_jax.plan.meshes import Fit, find_fit
from deepseek_jax.plan.traffic import LATENTS
from deepseek_jax.plan.wire import EXCHANGE, GRADIENTS, WEIGHTS, sent_in_step

COUNTS = tuple(2**i for i in range(3, 12))  # 8 to 2,048 devices
TRACED = (8, 64, 512, 2048)  # where the gradient is traced, as far as these numbers work
GB, MB = 1e9, 1e6
COLOURS = {EXCHANGE: BLUE, WEIGHTS: ORANGE, GRADIENTS: GREEN, LATENTS: GRAY}
STYLES = {"data": ":", "context": "-.", "node": "--", "expert": "-"}  # the slowest axis first


def fits(config: Config) -> list[Fit]:
    """Return `config` on every power of two of devices from 8 to 2,048 that works, with as few sequences as work."""
    found = []
    for count in COUNTS:
        fit = find_fit(config.with_(training={"micro_batch_size": count}), count)
        if fit is not None:
            found.append(fit)
    return found


def draw(config: Config, state: Any, target: Path) -> None:
    """Draw two panels into `target`: what one device holds, and what leaves it for each token of a micro-batch.

    State is computed from the layouts, what lives beside it traced at four numbers of devices. Numbers that a run
    refuses are left out.
    """
    plans = fits(config)
    if not plans:
        raise ValueError(f"--plot: {config.name} works on no power of two of devices from 8 to 2,048; nothing is drawn")
    counts = [fit.num_devices for fit in plans]
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    held = [bytes_per_device(fit.config, state, fit.mesh) for fit in plans]
    left.plot(counts, [sum(h.values()) / GB for h in held], marker="o", color=BLUE, label="state, computed")
    traced = [(fit, h) for fit, h in zip(plans, held, strict=True) if fit.num_devices in TRACED]
    beside = [(gradient_bytes(fit.config, fit.mesh) - h["gradients"] - h.get("copies", 0)) / GB for fit, h in traced]
    left.plot([fit.num_devices for fit, _ in traced], beside, marker="s", linestyle="--", color=ORANGE,
              label="activations and temporaries, traced")  # fmt: skip
    left.set(
        xscale="log", yscale="log", xlabel="devices", ylabel="GB a device", title="Memory, as few sequences as work"
    )
    for (axis, kind), sizes in _sent(plans, state).items():
        right.plot(counts, [size / MB for size in sizes], marker="o", markersize=4,
                   color=COLOURS[kind], linestyle=STYLES[axis], label=f"{kind} over {axis}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="devices", ylabel="MB a token and device",
              title="What leaves a device in a micro-batch, computed")  # fmt: skip
    for axes in (left, right):
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{config.name}, {config.execution.precision}")
    figure.savefig(target, dpi=110)


def _sent(plans: list[Fit], state: Any) -> dict[tuple[str, str], list[float]]:
    """Return the bytes a token of one micro-batch by axis and kind, one figure for each plan; 0 becomes a gap."""
    found: dict[tuple[str, str], list[float]] = {}
    for place, fit in enumerate(plans):
        rows = fit.config.training.micro_batch_size // axis_size(fit.mesh, ROWS)
        tokens = rows * fit.config.data.sequence_length // axis_size(fit.mesh, (CONTEXT,))
        for sent in sent_in_step(fit.config, fit.mesh, state, 1, tokens):
            row = found.setdefault((sent.axis, sent.kind), [float("nan")] * len(plans))
            row[place] = sent.bytes / tokens
    return found
