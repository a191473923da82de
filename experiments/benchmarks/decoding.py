"""Measure decoding: `python -m experiments.benchmarks.decoding --config=configs/v3_5b.py --batch=1,32,128`.

Weights are random, with a router that spreads tokens over the experts (normal, 0.02). The context is random, too: what
lies in the cache does not change the time. The programs of all batches are compiled side by side (the time of each is
that of a busy machine), and then each is measured on its own:

    --mode=decode     bursts of tokens, as `inference.generate` runs them, after a context of --context tokens
    --mode=engine     the same bursts, and beside them an engine with as many jobs (`engine_loop`)
    --mode=prefill    prompts of --context tokens

A burst or a prefill is timed from its call until its results are there; the median of --repeats is reported. "Prefill
in a row" is the time of one of eight whose calls do not wait for each other, as those of an engine do not. The floor
is the time of reading what must be read, once, at --read_rate: all weights but the embedding (of the routed experts
those that a batch touches on average), and in decoding the cache. In prefill it is the time of the products at
--product_rate, with weights in FP8 at twice that, if it is longer. --json writes the same numbers as records.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config, Execution, from_config_dict
from deepseek_jax.inference import prefill
from deepseek_jax.inference.cache import Cache, cache_bytes_per_token, make_cache
from deepseek_jax.inference.decode import Generation, decode_burst, decode_execution, num_rows
from deepseek_jax.inference.generate import BURST
from deepseek_jax.inference.requests import make_rows
from deepseek_jax.inference.sampling import Chosen, Sampling
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import new_file
from deepseek_jax.parallel.mesh import axis_size, make_mesh
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parameters import PARAMETERS, ROWS, P, Weights, leaf_name
from experiments import command, recipe, session
from experiments.benchmarks import breakdown, engine_loop, report
from experiments.benchmarks.random_weights import random_entries, random_weights
from pallas_kernels.bench.records import provenance, write

CONFIG = recipe.Recipe(None, "Configuration, such as configs/v3_5b.py.", required=True)
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")
MODE = flags.DEFINE_enum("mode", "decode", ["decode", "engine", "prefill"], "What is measured.")
BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "Sequences, one measurement for each number.")
CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of every sequence.", lower_bound=1, upper_bound=2**20)
PRECISION = flags.DEFINE_list("precision", None, "Precisions, one after the other; by default that of the config.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed bursts or prefills.", lower_bound=1, upper_bound=10**4)
READ_RATE = flags.DEFINE_float("read_rate", 4300.0, "GB/s that the memory of the device reads; an H200's by default.")
PRODUCT_RATE = flags.DEFINE_float("product_rate", 790.0, "TFLOP/s of products in BF16; an H200's by default.")
BREAKDOWN = flags.DEFINE_bool("breakdown", False, "Also profile; on a GPU the program is compiled once more for that.")

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
NO_EOS = -2  # no token is it
IN_A_ROW = 8  # prefills


class Program(NamedTuple):
    """A program, and how it is run."""

    lowered: Any
    arrays: tuple  # its arguments; the state at place 1 is donated
    tokens: int  # of all sequences, that a run makes or reads
    steps: int  # in the loop of the program


def main(_) -> None:
    """Parse, measure, report."""
    json = command.path_of(JSON, new_file)
    config = from_config_dict(CONFIG.value)
    batches = [_number(text) for text in BATCH.value]
    for precision in PRECISION.value or []:
        if precision not in ("fp32", "bf16", "fp8"):
            raise ValueError(f"--precision={precision} is unknown; use fp32, bf16 or fp8")
    session.start()
    mesh, records = make_mesh(config.mesh), []
    for precision in PRECISION.value or [config.execution.precision]:
        changed = config.with_(execution={"precision": precision})
        execution = decode_execution(changed, mesh)
        weights = decode_weights(config.model, execution, random_weights(changed, mesh), mesh)
        records += measure_all(changed, execution, mesh, weights, batches)
    common = provenance("experiments.benchmarks.decoding", session.describe_device(mesh))
    records = [record | common for record in records]
    report.print_records(f"{config.name}, {MODE.value}, context {CONTEXT.value}", records)
    if json:
        write(json, records)


def _number(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 2**16:
        raise ValueError(f"--batch={text} must be numbers of sequences, such as 1,32,128")
    return int(text)


def measure_all(
    config: Config, execution: Execution, mesh: jax.sharding.Mesh, weights: Weights, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the records of all batch sizes; one program is lowered while others are compiled."""
    lower = prefill_program if MODE.value == "prefill" else decode_program

    def compiled(program):
        start = time.perf_counter()
        return program.lowered.compile(), time.perf_counter() - start

    running = []
    with jax.set_mesh(mesh), ThreadPoolExecutor(len(batches)) as compilers:
        for batch in batches:
            start = time.perf_counter()
            program = lower(config, execution, mesh, weights, batch)
            running.append((batch, program, time.perf_counter() - start, compilers.submit(compiled, program)))
    records = []
    for batch, program, seconds, made in running:
        step, compile_seconds = made.result()
        records += measure(config, mesh, weights, batch, program, step, seconds + compile_seconds)
    if MODE.value == "engine":
        del running
        records += [record for batch in batches for record in beside(config, mesh, weights, batch, records)]
    return records


def beside(
    config: Config, mesh: jax.sharding.Mesh, weights: Weights, batch: int, records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records of an engine with `batch` jobs, beside those of the bare loop."""
    (bare,) = (found["value"] for found in records if (found["mode"], found["shape"]["batch"]) == ("decode", batch))
    value = engine_loop.measure(
        engine_loop.open_batch(config, mesh, weights, batch, CONTEXT.value), batch, CONTEXT.value
    )
    values = [("engine", value, "tokens/s"), ("share of the bare loop", 100 * value / bare, "%")]
    shape = {"batch": batch, "context": CONTEXT.value}
    found = [report.record(config, mode, shape, number, unit) for mode, number, unit in values]
    report.print_records(f"engine, batch {batch}", [record | {"device": "", "jax": ""} for record in found])
    return found


def measure(
    config: Config,
    mesh: jax.sharding.Mesh,
    weights: Weights,
    batch: int,
    program: Program,
    step: Any,
    compile_seconds: float,
) -> list[dict[str, Any]]:
    """Return the records of one batch size; `step` is the compiled program."""
    with jax.set_mesh(mesh):
        seconds, arrays = [], program.arrays
        for _ in range(REPEATS.value + 2):
            start = time.perf_counter()
            made = jax.block_until_ready(step(*arrays))
            seconds.append(time.perf_counter() - start)
            arrays = following(arrays, made)
        median = statistics.median(seconds[2:])
        queued = []
        if _bare_mode() == "prefill":
            found, arrays = in_a_row(step, arrays)
            queued = [("prefill in a row", program.tokens / found, "tokens/s")]
        events = []
        if BREAKDOWN.value:
            state = [arrays]

            def again(compiled):
                state[0] = following(state[0], compiled(*state[0]))

            events = report.profile(program.lowered, step, again)
            report.print_events(events)
    floor = floor_seconds(config, weights, batch) * program.steps
    count = breakdown.kernels_of_a_run if _bare_mode() == "prefill" else breakdown.kernels_of_a_step
    values = [
        (_bare_mode(), program.tokens / median, "tokens/s"),
        *queued,
        ("floor", program.tokens / floor, "tokens/s"),
        ("share of the floor", 100 * floor / median, "%"),
        ("time", 1e3 * median / program.steps, "ms"),
        ("time, fastest", 1e3 * min(seconds[2:]) / program.steps, "ms"),
        ("trace and compile", compile_seconds, "s"),
        ("kernels of a layer", count(step.as_text()) / config.model.num_layers, ""),
        *((mode, value / program.steps, unit) for mode, value, unit in report.scope_times(events)),
    ]
    shape = {"batch": batch, "context": CONTEXT.value}
    records = [report.record(config, mode, shape, value, unit) for mode, value, unit in values]
    report.print_records(
        f"{config.execution.precision}, batch {batch}", [r | {"device": "", "jax": ""} for r in records]
    )
    return records


def _bare_mode() -> str:
    return "prefill" if MODE.value == "prefill" else "decode"


def following(arrays: tuple, made: tuple) -> tuple:
    """Return the arguments of the next run from those of the last and what it made, once they are there."""
    result, state = made
    if isinstance(state, Cache):
        state = state._replace(length_B=0 * state.length_B)
        return jax.block_until_ready((arrays[0], state, result, *arrays[3:]))
    state = state._replace(cache=state.cache._replace(length_B=arrays[-1] + 0))
    return jax.block_until_ready((arrays[0], state, *arrays[2:]))


def in_a_row(step: Any, arrays: tuple) -> tuple[float, tuple]:
    """Return the median seconds of a prefill where the host calls the next before the last has ended, and arguments.

    The difference to one that waits is what the host takes to call it.
    """
    weights, cache, logits_BV, *new = arrays
    seconds, empty_B = [], cache.length_B + 0
    for _ in range(REPEATS.value):
        lengths = jax.block_until_ready([empty_B + 0 for _ in range(IN_A_ROW)])
        start = time.perf_counter()
        for length_B in lengths:
            logits_BV, cache = step(weights, cache._replace(length_B=length_B), logits_BV, *new)
        jax.block_until_ready((logits_BV, cache))
        seconds.append((time.perf_counter() - start) / IN_A_ROW)
    return statistics.median(seconds), (weights, cache._replace(length_B=empty_B), logits_BV, *new)


def floor_seconds(config: Config, weights: Weights, batch: int) -> float:
    """Return the time of reading, once, what a step must read; in prefill that of the products, if it is longer."""
    model, products = config.model, 0.0
    read = sum(leaf.nbytes for name, leaf in weights.params.items() if name in ("head_DV", "final_norm_D"))
    tokens = batch * (CONTEXT.value if MODE.value == "prefill" else 1)

    def cost_of(leaf):
        """Return the arithmetic of a product in that of BF16."""
        return 2 * tokens * leaf.size / (2 if leaf.dtype.itemsize == 1 else 1)

    for path, leaf in jax.tree.leaves_with_path(
        [weights.params.get(name, []) for name in ("dense_layers", "moe_layers")]
    ):
        share = 1.0
        if PARAMETERS[leaf_name(path)].per_expert:
            num_all = leaf.shape[0]
            always = num_all - model.num_experts  # the shared expert
            touched = model.num_experts * (1 - (1 - model.experts_per_token / model.num_experts) ** tokens)
            share = (always + touched) / num_all
            products += cost_of(leaf) * (always + model.experts_per_token) / num_all
        elif leaf.ndim > 1:
            products += cost_of(leaf)
        read += share * leaf.nbytes
    if _bare_mode() == "decode":
        read += batch * (CONTEXT.value + BURST // 2) * cache_bytes_per_token(model, config.execution)
    seconds = read / (READ_RATE.value * 1e9)
    if _bare_mode() == "decode":
        return seconds
    pairs = model.num_layers * tokens * CONTEXT.value / 2  # of a token and one before it
    products += 2 * pairs * model.num_heads * (model.query_dim + model.value_dim)
    return max(seconds, products / (PRODUCT_RATE.value * 1e12))


def decode_program(
    config: Config, execution: Execution, mesh: jax.sharding.Mesh, weights: Weights, batch: int
) -> Program:
    """Lower a burst over sequences of --context tokens; each of its runs begins there."""
    model, rows = config.model, num_rows(batch, mesh)
    cache = make_cache(model, execution, rows, CONTEXT.value + BURST)
    cache = cache._replace(pages=random_entries(cache.pages))
    there_B = np.arange(rows) < batch
    length_B, finished_B, tokens_B = (
        jax.device_put(x, P(ROWS)) for x in (np.int32(CONTEXT.value * there_B), ~there_B, np.zeros(rows, np.int32))
    )
    state = Generation(cache._replace(length_B=length_B + 0), tokens_B, finished_B)
    drawn = jax.device_put(make_rows([], 0, rows), P(ROWS))
    burst: Any = jit_on(measured_burst, execution, mesh, model, execution, GREEDY, donate=(1,))
    arrays = weights, state, drawn, length_B
    return Program(burst.lower(*arrays), arrays, batch * BURST, BURST)


def measured_burst(model, execution, sampling, weights, state, rows, length_B) -> tuple[Chosen, Generation]:
    """A burst of `inference.decode`; `length_B`, with which each run begins, is not read."""
    return decode_burst(model, execution, sampling, BURST, weights, state, rows, NO_EOS, BURST)


def prefill_program(
    config: Config, execution: Execution, mesh: jax.sharding.Mesh, weights: Weights, batch: int
) -> Program:
    """Lower a prefill of prompts of --context tokens."""
    model, rows = config.model, num_rows(batch, mesh)
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, CONTEXT.value))
    new_tokens = [*prompts, *[()] * (rows - batch)]
    found = prefill.calls(new_tokens, np.zeros(rows, int), axis_size(mesh, ROWS), prefill.MOST_TOKENS)
    if len(found) > 1:
        raise ValueError(
            f"--batch={batch} prompts of --context={CONTEXT.value} tokens take {len(found)} runs of prefill; measure"
            f" at most {prefill.MOST_TOKENS} tokens a device"
        )
    cache = make_cache(model, execution, rows, CONTEXT.value)
    logits_BV = np.zeros((rows, model.vocab_size), np.float32)
    arrays = weights, cache, *jax.device_put((logits_BV, found[0].tokens_T, found[0].new_B), P(ROWS))
    execution = prefill.prefill_execution(config, mesh)
    program: Any = prefill.prefill_program(model, execution, mesh, found[0])
    return Program(program.lower(*arrays), arrays, batch * CONTEXT.value, 1)


if __name__ == "__main__":
    command.run(main)
