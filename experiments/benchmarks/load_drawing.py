"""The drawing of a server under load: latency and goodput against the rate of requests."""

from typing import TYPE_CHECKING, Any

from deepseek_jax.palette import BLUE, GRAY, GREEN, ORANGE
from experiments.benchmarks.load import FIRST_LIMIT, PACE_LIMIT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = {50: BLUE, 95: ORANGE, 99: GREEN}
PANELS = {"time to first token": FIRST_LIMIT, "time per token": PACE_LIMIT}


def draw(records: list[dict[str, Any]]) -> "Figure":
    """Return the drawing of the records of `experiments.benchmarks.serving`, one model at several rates."""
    from matplotlib.figure import Figure  # slow to import, and only drawing needs it

    def line(mode: str) -> tuple[list[float], list[float]]:
        points = sorted((record["shape"]["rate"], record["value"]) for record in records if record["mode"] == mode)
        return [rate for rate, _ in points], [value for _, value in points]

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *panels, speed = figure.subplots(1, 3)
    style = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    for axes, (name, limit) in zip(panels, PANELS.items(), strict=True):
        for q, color in PERCENTILES.items():
            axes.plot(*line(f"{name}, p{q}"), label=f"p{q}", color=color, **style)
        axes.axhline(limit, color=GRAY, linestyle="--", linewidth=1, label=f"limit of a good one, {limit:g} s")
        axes.set(title=name[0].upper() + name[1:], ylabel="seconds")
    rates, _ = line("goodput")
    speed.plot(rates, rates, color=GRAY, linestyle="--", linewidth=1, label="asked for")
    speed.plot(*line("completed"), label="completed", color=BLUE, **style)
    speed.plot(*line("goodput"), label="completed in time (goodput)", color=GREEN, **style)
    speed.set(title="Requests a second", ylabel="requests/s", ylim=(0, None))
    panels[0].set(yscale="log")  # from milliseconds to minutes
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[1].set(ylim=(0, None))
    for axes in (*panels, speed):
        axes.set(xlabel="load, requests/s")
        axes.grid(alpha=0.3)
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize="small")
    shape = records[0]["shape"]
    figure.suptitle(
        f"{records[0]['config']}: prompts {shape['prompt_tokens']}, answers {shape['output_tokens']} tokens"
    )
    return figure
