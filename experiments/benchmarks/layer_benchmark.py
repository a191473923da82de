"""Measure one full-width MoE layer of DeepSeek-V3 as one of 64 devices computes it: `python -m
experiments.benchmarks.layer_benchmark`.

Forward and backward in FP8 on one device, without the exchange (`experiments/benchmarks/layer.py`). The yardstick is
DeepSeek's public profile: 94.5 ms of computation for four such layers on the 112 multiprocessors of an H800 that do not
communicate, which is 20 ms a layer on all 132.

A run is several calls in a row and one wait, which hides the host's work in between. The median of --steps runs is
reported, per call. Weights are quantised before. --json writes the numbers as records.
"""

import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inputs import new_file
from deepseek_jax.parallel.program import resolve
from experiments import command, recipe, session
from experiments.benchmarks import breakdown, report
from experiments.benchmarks.layer import PROFILED, Load, flops, make_inputs, make_step, make_weights, yardstick
from pallas_kernels.bench.records import provenance, write

CONFIG = recipe.Recipe("configs/deepseek_v3.py", "Configuration of the layer; its precision is FP8.")
MOST = 2**24  # tokens, rows and experts of one layer
TOKENS = flags.DEFINE_integer(
    "tokens", PROFILED.tokens, "Tokens of the device, one sequence.", lower_bound=1, upper_bound=MOST
)
ROWS = flags.DEFINE_integer("rows", PROFILED.rows, "Rows that arrive for each expert.", lower_bound=1, upper_bound=MOST)
LOCAL_EXPERTS = flags.DEFINE_integer(
    "local_experts", PROFILED.local_experts, "Routed experts on the device.", lower_bound=1, upper_bound=MOST
)
STEPS = flags.DEFINE_integer("steps", 20, "Timed runs.", lower_bound=20, upper_bound=10**6)
BREAKDOWN = flags.DEFINE_bool(
    "breakdown", True, "Also profile a few calls; on a GPU the layer is compiled once more for that."
)
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")

CALLS = 8  # of a run
WARMUP_RUNS = 2


class Measurement(NamedTuple):
    """The measurements of the layer."""

    trace_seconds: float  # cold, lowering included
    compile_seconds: float  # cold: no persistent cache
    call_seconds: list[float]
    flops: int
    bytes: int  # arguments, results and temporaries
    nonfinite: int  # results that are not finite; their time would not be representative
    events: list[breakdown.Event]


def main(_) -> None:
    """Parse, measure, report."""
    busy = os.getloadavg()[0]
    json, tree = command.path_of(JSON, new_file), CONFIG.value
    tree.execution.precision = "fp8"
    config = from_config_dict(tree)
    if not config.model.num_shared_experts:
        raise ValueError("config.model.num_shared_experts = 0: the layer has a shared expert; set it to 1")
    session.start()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are cold ones
    config = resolve(config, jax.default_backend(), expert_devices=1)
    load = Load(TOKENS.value, ROWS.value, LOCAL_EXPERTS.value)
    measurement = measure(config, load, STEPS.value, BREAKDOWN.value)
    common = provenance(
        "experiments.benchmarks.layer_benchmark", session.describe_device(jax.sharding.Mesh(jax.devices()[:1], "x"))
    )
    records = [record | common for record in describe(config, load, measurement)]
    work = f"{load.tokens} tokens, {load.local_experts} experts x {load.rows} rows"
    report.print_records(
        f"One layer of {config.name}, {config.execution.precision}, remat {config.execution.remat}, {work}", records
    )
    report.print_events(measurement.events)
    report.warn_if_busy(busy)
    if json:
        write(json, records)


def measure(config: Config, load: Load, num_runs: int, profile: bool) -> Measurement:
    """Compile the layer, warm it up, time `num_runs` of it, and profile a few more calls."""
    arguments = *make_weights(config, load), *make_inputs(config, load)
    start = time.perf_counter()
    lowered = jax.jit(make_step(config, load)).lower(*arguments)
    traced = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()

    def run(step, calls=1):
        begin = time.perf_counter()
        for _ in range(calls):
            results = step(*arguments)  # the results of the call before are freed
        jax.block_until_ready(results)
        return (time.perf_counter() - begin) / calls

    nonfinite = sum(int((~jnp.isfinite(x)).sum()) for x in jax.tree.leaves(step(*arguments)))
    seconds = [run(step, CALLS) for _ in range(WARMUP_RUNS + num_runs)][WARMUP_RUNS:]
    found = step.memory_analysis()
    size = (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )
    events = report.profile(lowered, step, run) if profile else []
    return Measurement(
        traced - start, compiled - traced, seconds, flops(config, load, arguments[0]), size, nonfinite, events
    )


def describe(config: Config, load: Load, measurement: Measurement) -> list[dict[str, Any]]:
    """Return the records of the layer; the first is its time, with the yardstick."""
    seconds = statistics.median(measurement.call_seconds)
    values = [
        ("layer, median", 1e3 * seconds, "ms"),
        ("layer, fastest", 1e3 * min(measurement.call_seconds), "ms"),
        ("linear, attention FLOPs", measurement.flops / seconds / 1e12, "TFLOP/s"),
        ("memory, compiled", measurement.bytes / 2**30, "GiB"),
        ("trace, cold", measurement.trace_seconds, "s"),
        ("compile, cold", measurement.compile_seconds, "s"),
        ("results not finite", measurement.nonfinite, "numbers"),
    ]
    if measurement.events:
        values.insert(2, ("time in kernels", sum(event.milliseconds for event in measurement.events), "ms"))
    values += report.scope_times(measurement.events)
    shape = {"tokens": load.tokens, "rows": load.rows, "local_experts": load.local_experts}
    first, *rest = (report.record(config, mode, shape, value, unit) for mode, value, unit in values)
    return [first | {"yardstick": yardstick(config, load)}, *rest]


if __name__ == "__main__":
    command.run(main)
