"""Measure the training step: `python -m experiments.benchmarks.training_step --config=configs/tiny.py`.

Prints tokens/s, model TFLOP/s, MFU if the device's peak is known, the memory by contents, and the cold times of tracing
and compiling. Then the time by scope and pass, and by kernel. Then the rate of the loader alone, which must stay well
above the step's. --json writes the same numbers as records.

On a mesh of several devices the same work of one device is timed beside it, a step of each in turn: --noscaling leaves
that out.

A step is timed from its call until its results are there; the median of --steps is reported. Tokens are random unless
--data is given: a fresh model routes both nearly evenly.
"""

import functools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.packing import Batch
from deepseek_jax.data.pipeline import check_data, loader_throughput, open_tokenizer
from deepseek_jax.inputs import new_file, new_folder
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.flops import flops_per_token, model_flops_utilization, peak_flops
from deepseek_jax.training.optimizer import batch_size
from experiments import command, recipe, session
from experiments.benchmarks import breakdown, report
from experiments.benchmarks.batches import batches_on
from experiments.benchmarks.stepper import WARMUP_STEPS, Stepper, open_alone, rate, scaling, time_in_turn
from pallas_kernels.bench.records import provenance, write

CONFIG = recipe.Recipe(
    None, "Configuration, such as configs/tiny.py; --config.model.num_layers=8 overrides.", required=True
)
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")
STEPS = flags.DEFINE_integer("steps", 20, "Timed steps.", lower_bound=20, upper_bound=10**6)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Sequences per step; the first size of the recipe by default.", lower_bound=1
)
DATA = flags.DEFINE_bool("data", False, "Train on the configured corpus instead of random tokens.")
BREAKDOWN = flags.DEFINE_bool(
    "breakdown", True, "Also profile a few steps; on a GPU the step is compiled once more for that."
)
LOADER = flags.DEFINE_bool("loader", True, "Also measure the loader alone.")
SCALING = flags.DEFINE_bool("scaling", True, "On a mesh, also measure the same work of one device alone.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder that keeps the tokenizer and the tokenised corpus for the next time."
)


class Measurement(NamedTuple):
    """The measurements of one configuration's step."""

    trace_seconds: float  # cold, lowering included
    compile_seconds: float  # cold: no persistent cache
    step_seconds: list[float]
    memory: dict[str, int]  # bytes per device, by contents
    peak_bytes: int | None  # peak bytes in use on the device, if its allocator counts them
    first_loss: float  # nats per token
    last_loss: float
    events: list[breakdown.Event]
    alone: float | str | None  # tokens/s of one device with the same work, or why it was not measured; None: not asked


def main(_) -> None:
    """Parse, measure, report."""
    busy = os.getloadavg()[0]
    json, kept = command.path_of(JSON, new_file), command.path_of(WORKDIR, new_folder)
    config = from_config_dict(with_batch_size(CONFIG.value))
    if DATA.value or LOADER.value:
        check_data(config, kept)
    session.start()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are cold ones
    size = batch_size(config, tokens_seen=0)
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as scratch:
        workdir = kept or Path(scratch)

        read = functools.partial(batches_on, mesh, workdir if DATA.value else None)
        beside = SCALING.value and mesh.size > 1
        measurement = measure_step(config, mesh, read, STEPS.value, BREAKDOWN.value, beside)
        step_records = describe_step(config, mesh, size, measurement)
        records = step_records + (
            measure_loader(config, workdir, size, step_records[0]["value"]) if LOADER.value else []
        )
    common = provenance("experiments.benchmarks.training_step", session.describe_device(mesh))
    records = [record | common for record in records]
    work = f"{size} x {config.data.sequence_length} tokens a step, {config.model.num_mtp_layers} MTP layers"
    report.print_records(f"{config.name}, {config.execution.precision}, {work}", records)
    print_scaling(mesh, step_records[0]["value"], measurement.alone)
    report.print_events(measurement.events)
    report.warn_if_busy(busy)
    if json:
        write(json, records)


def with_batch_size(tree: ConfigDict) -> ConfigDict:
    """Return the configuration with --batch_size for all of the run; `from_config_dict` then checks it."""
    if BATCH_SIZE.value is not None:
        with tree.ignore_type():
            tree.training.batch_size = (("constant", 1.0, BATCH_SIZE.value),)
    return tree


def measure_step(
    config: Config,
    mesh: jax.sharding.Mesh,
    batches: Callable[[Config, int], Iterator[Batch]],
    num_steps: int,
    profile: bool,
    beside: bool,
) -> Measurement:
    """Compile the train step, warm it up, time `num_steps` of it, and profile a few more.

    Args:
        config: what is trained.
        mesh: of `config`.
        batches: makes the batches of a config and a number of sequences a step.
        num_steps: timed steps.
        profile: whether to profile.
        beside: whether to time the same work of one device in turn with it.
    """
    size = batch_size(config, tokens_seen=0)
    stepper = Stepper(config, mesh, batches(config, size))
    for _ in range(WARMUP_STEPS):
        stepper.run()
    peak = (mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use")  # before a device alone takes its own
    alone = open_alone(config, size, mesh, batches) if beside else None
    time_in_turn(stepper, alone if isinstance(alone, Stepper) else None, num_steps)
    timed, first, last = stepper.seconds[WARMUP_STEPS:], stepper.losses[0], stepper.losses[-1]
    alone_rate = rate(alone, num_steps) if isinstance(alone, Stepper) else alone
    del alone  # its state makes room for the profile
    memory = _memory(stepper.state, stepper.step)
    with jax.set_mesh(mesh):
        events = report.profile(stepper.lowered, stepper.step, stepper.run) if profile else []
    return Measurement(
        stepper.trace_seconds, stepper.compile_seconds, timed, memory, peak, first, last, events, alone_rate
    )


def _memory(state: Any, step: jax.stages.Compiled) -> dict[str, int]:
    """Return bytes per device: the parts of the state, and the memory that the compiled step needs beside it."""

    def local_bytes(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = step.memory_analysis()
    held = {name: local_bytes(state[name]) for name in ("params", "optimizer", "ema") if name in state}
    beside = found.argument_size_in_bytes - sum(held.values()) + found.output_size_in_bytes - found.alias_size_in_bytes
    # The state is donated, so argument and result share memory.
    return held | {"gradients, activations, copies": found.temp_size_in_bytes, "batch, metrics": beside}


def describe_step(config: Config, mesh: jax.sharding.Mesh, size: int, measurement: Measurement) -> list[dict[str, Any]]:
    """Return the records of the step; the first is its tokens per second."""
    model, length = config.model, config.data.sequence_length
    seconds = statistics.median(measurement.step_seconds)
    tokens_per_second = size * length / seconds
    flops = flops_per_token(model, length, causal=True, mtp=True)
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    values = [
        ("train step", tokens_per_second, "tokens/s"),
        ("train step, median", 1e3 * seconds, "ms"),
        ("train step, fastest", 1e3 * min(measurement.step_seconds), "ms"),
        ("model FLOPs", flops * tokens_per_second / 1e12, "TFLOP/s"),
        *((f"memory, {name}", size / 2**30, "GiB") for name, size in measurement.memory.items()),
        ("memory per device, compiled", sum(measurement.memory.values()) / 2**30, "GiB"),
        ("trace, cold", measurement.trace_seconds, "s"),
        ("compile, cold", measurement.compile_seconds, "s"),
        ("loss of step 1", measurement.first_loss, "nats/token"),
        (f"loss of step {WARMUP_STEPS + len(measurement.step_seconds)}", measurement.last_loss, "nats/token"),
    ]
    if measurement.peak_bytes:
        values.insert(-4, ("memory per device, peak", measurement.peak_bytes / 2**30, "GiB"))
    if peak:
        utilization = model_flops_utilization(flops, tokens_per_second, peak * mesh.size)
        values.insert(4, ("MFU of the BF16 peak", 100 * utilization, "%"))
    values += report.scope_times(measurement.events)
    records = [_record(config, mode, size, value, unit) for mode, value, unit in values]
    return [record | {"mesh": split_axes(mesh)} for record in records + _scaling(config, mesh, size, measurement)]


def split_axes(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Return the axes of a mesh that have more than one device."""
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def _scaling(config: Config, mesh: jax.sharding.Mesh, size: int, measurement: Measurement) -> list[dict[str, Any]]:
    """Return the record of one device's rate, and that of the rate per device of the mesh in % of it, if measured."""
    if not isinstance(measurement.alone, float):
        return []
    tokens_per_second = size * config.data.sequence_length / statistics.median(measurement.step_seconds)
    percent, _ = scaling(mesh.size, tokens_per_second, measurement.alone)
    yardstick = {"name": "one device with the same work, in turn", "version": None, "value": measurement.alone}
    each = _record(config, "train step, per device", size, tokens_per_second / mesh.size, "tokens/s")
    return [each | {"yardstick": yardstick}, _record(config, "scaling", size, percent, "%")]


def print_scaling(mesh: jax.sharding.Mesh, tokens_per_second: float, alone: float | str | None) -> None:
    """Print the rate of the mesh beside that of one device, or why there is none."""
    if alone is not None:
        print(f"\n{alone if isinstance(alone, str) else scaling(mesh.size, tokens_per_second, alone)[1]}")


def measure_loader(config: Config, workdir: Path, size: int, step_rate: float) -> list[dict[str, Any]]:
    """Return the loader's tokens per second, with the step's as the yardstick."""
    rate = loader_throughput(config, open_tokenizer(config, workdir), workdir, size)
    yardstick = {"name": "train step of the same run", "version": None, "value": step_rate}
    return [_record(config, "loader alone", size, rate, "tokens/s") | {"yardstick": yardstick}]


def _record(config: Config, mode: str, size: int, value: float, unit: str) -> dict[str, Any]:
    shape = {"batch": size, "sequence": config.data.sequence_length, "mtp_layers": config.model.num_mtp_layers}
    return report.record(config, mode, shape, value, unit)


if __name__ == "__main__":
    command.run(main)
