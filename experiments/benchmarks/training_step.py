"""Measure the training step: `python -m experiments.benchmarks.training_step --config=configs/tiny.py`.

Prints tokens/s, model TFLOP/s, MFU if the device's peak is known, the memory by contents, and the cold times of tracing
and compiling. Then the time by scope and pass, and by kernel. Then the rate of the loader alone, which must stay well
above the step's. --json writes the same numbers as records.

A step is timed from its call until its results are there; the median of --steps is reported. Tokens are random unless
--data is given: a fresh model routes both nearly evenly.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.packing import Batch, Rows, next_token_batch
from deepseek_jax.data.pipeline import check_data, loader_throughput, make_train_loader, open_tokenizer
from deepseek_jax.inputs import new_file, new_folder
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.flops import flops_per_token, model_flops_utilization, peak_flops
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import batch_size, rates
from deepseek_jax.training.state import create_state
from deepseek_jax.training.step import jit_train_step
from experiments import command, recipe, session
from experiments.benchmarks import breakdown, report
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
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder that keeps the tokenizer and the tokenised corpus for the next time."
)

WARMUP_STEPS = 3  # the first steps touch fresh memory, and the clocks still rise
NUM_RANDOM_BATCHES = 4


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
        batches = corpus_batches(config, workdir, size) if DATA.value else random_batches(config, size)
        measurement = measure_step(config, mesh, batches, STEPS.value, BREAKDOWN.value)
        step_records = describe_step(config, mesh, size, measurement)
        records = step_records + (
            measure_loader(config, workdir, size, step_records[0]["value"]) if LOADER.value else []
        )
    common = provenance("experiments.benchmarks.training_step", session.describe_device(mesh))
    records = [record | common for record in records]
    work = f"{size} x {config.data.sequence_length} tokens a step, {config.model.num_mtp_layers} MTP layers"
    report.print_records(f"{config.name}, {config.execution.precision}, {work}", records)
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


def random_batches(config: Config, size: int) -> Iterator[Batch]:
    """Yield a few batches of uniformly random tokens, over and over; the same on every machine."""
    rng = np.random.default_rng(config.seed)
    shape = size // jax.process_count(), config.data.sequence_length + 1
    rows = [rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(NUM_RANDOM_BATCHES)]
    ones = np.ones(shape, np.int32)
    batches = [next_token_batch(Rows(tokens, segments=ones, weights=ones), config.data) for tokens in rows]
    while True:
        yield from batches


def corpus_batches(config: Config, workdir: Path, size: int) -> Iterator[Batch]:
    """Yield the batches that training would see first."""
    loader = make_train_loader(
        config, open_tokenizer(config, workdir), workdir, jax.process_index(), jax.process_count()
    )
    while True:
        yield loader.next_batch(size)


def measure_step(
    config: Config, mesh: jax.sharding.Mesh, batches: Iterator[Batch], num_steps: int, profile: bool
) -> Measurement:
    """Compile the train step, warm it up, time `num_steps` of it, and profile a few more."""
    losses, seconds = [], []
    with jax.set_mesh(mesh):
        state = create_state(config)
        batch = place_batch(next(batches), mesh)
        start = time.perf_counter()
        lowered = jit_train_step(config, pretraining(config), mesh).lower(state, batch, rates(config, 0, 0))
        traced = time.perf_counter()
        step = lowered.compile()
        compiled = time.perf_counter()

        def run(step):
            nonlocal state
            arguments = (
                place_batch(next(batches), mesh),
                rates(config, len(losses), len(losses) * batch["tokens_BS"].size),
            )
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, *arguments))
            seconds.append(time.perf_counter() - begin)
            losses.append(float(metrics["loss"]))

        for _ in range(WARMUP_STEPS + num_steps):
            run(step)
        memory, peak = _memory(state, step), (mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use")
        timed, first, last = seconds[WARMUP_STEPS:], losses[0], losses[-1]
        events = report.profile(lowered, step, run) if profile else []
    return Measurement(traced - start, compiled - traced, timed, memory, peak, first, last, events)


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
    return [_record(config, mode, size, value, unit) for mode, value, unit in values]


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
