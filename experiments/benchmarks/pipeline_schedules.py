"""What each schedule of a pipeline costs: `python -m experiments.benchmarks.pipeline_schedules --devices=8
--micro_batches=32 --drawing=schedules.png`.

It prints a table in Markdown, made from the very tables that an executor runs, and draws them. Durations are those of
a P-th of the model; the unit is the time of its forward pass.
"""

from dataclasses import replace

from absl import flags

from deepseek_jax.inputs import new_file
from deepseek_jax.pipeline.drawing import draw
from deepseek_jax.pipeline.schedules import SCHEDULES, schedule
from deepseek_jax.pipeline.simulation import Durations, cost
from deepseek_jax.pipeline.table import Table
from experiments import command

DEVICES = flags.DEFINE_integer("devices", 8, "Devices of the pipeline.", lower_bound=1, upper_bound=256)
MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 32, "Micro-batches of a step.", lower_bound=1, upper_bound=4096)
SCHEDULE = flags.DEFINE_list("schedule", list(SCHEDULES), "Which schedules, by name.")
INPUTS = flags.DEFINE_float("inputs", 1.0, "Time of the gradients of inputs.")
WEIGHTS = flags.DEFINE_float("weights", 1.0, "Time of the gradients of weights.")
OVERLAPPED = flags.DEFINE_float(
    "overlapped", 2.5, "Time of a forward pass and another's backward pass that overlap; the sum is without overlap."
)
DRAWING = flags.DEFINE_string("drawing", None, "Draw the schedules into this file, such as schedules.png.")

HEAD = (
    "| Schedule | Idle, F&B = {whole:g} | Idle, F&B = {overlapped:g} | Step | Step, neighbours wait | Activations |"
    " Parameters | Ticks |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)


def main(_) -> None:
    """Make the tables, print what they cost, draw them."""
    drawing = command.path_of(DRAWING, new_file)
    tables = [schedule(name, DEVICES.value, MICRO_BATCHES.value) for name in SCHEDULE.value]
    durations = Durations(inputs=INPUTS.value, weights=WEIGHTS.value, overlapped=OVERLAPPED.value)
    print(markdown(tables, durations))
    if drawing:
        draw(tables, durations).savefig(drawing, dpi=150)


def markdown(tables: list[Table], durations: Durations) -> str:
    """Return what tables cost, a line each: with pairs that take `durations.overlapped`, and without overlap."""
    apart = replace(durations, overlapped=None)
    head = HEAD.format(whole=apart.pair, overlapped=durations.pair)
    return "\n".join([head, *(_line(table, apart, durations) for table in tables)])


def _line(table: Table, apart: Durations, overlapped: Durations) -> str:
    first, second = cost(table, apart), cost(table, overlapped)
    times = f"{first.idle:g} | {second.idle:g} | {second.makespan:g} | {second.makespan_in_step:g}"
    return f"| {table.name} | {times} | {first.activations:g} | {first.parameters:g}x | {table.num_ticks} |"


if __name__ == "__main__":
    command.run(main)
