"""Measure drafting: `python -m experiments.benchmarks.drafting --config=configs/v3_5b.py --batch=1,32,128`.

Weights are random, and the MTP layer of a random model guesses nothing, so --acceptance of the drafts are accepted,
whatever they are. For each batch, rows with a prompt of --context tokens decode in three programs, as an engine runs
them, one step ahead:

    plain       no drafts
    following   drafts off, while the MTP layer keeps its entries up to date: c of the MTP layer alone is the difference
    drafting    --num_drafts drafts of each row

The programs of the three are compiled side by side; the steps of each are timed alone.

The speed-up is that of tokens/s. It is set beside (1 + a) / (1 + c): a drafts accepted a step and row, and c either the
share of time that the MTP layer takes, or all that a step takes longer. With the second both are the same by
definition; its c is what `speculative.worth_rows` wants. --json writes the numbers as records.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.row_state import RowSettings
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.speculative import MOST_DRAFTS
from deepseek_jax.inference.step import Piece
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import new_file
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from experiments import command, recipe, session
from experiments.benchmarks import report
from experiments.benchmarks.random_weights import random_weights
from pallas_kernels.bench.records import provenance, write
from pallas_kernels.mla_decode.schedule import PAGE

CONFIG = recipe.Recipe(None, "Configuration, such as configs/v3_5b.py; it gets an MTP layer.", required=True)
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")
BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "Rows that decode, one measurement for each number.")
CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of every prompt.", lower_bound=1, upper_bound=2**20)
NUM_DRAFTS = flags.DEFINE_integer("num_drafts", 1, "Drafts of a step.", lower_bound=1, upper_bound=MOST_DRAFTS)
ACCEPTANCE = flags.DEFINE_float("acceptance", 0.85, "Of the drafts.", lower_bound=0.0, upper_bound=1.0)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the draws; 0 is greedy.", lower_bound=0.0, upper_bound=100.0)
STEPS = flags.DEFINE_integer("steps", 64, "Timed steps.", lower_bound=2, upper_bound=10**4)

WARM_UP = 8  # steps that are not timed
PREFILL_TOKENS = 2048
NO_EOS = 2**31 - 2  # no token is it


class Timed(NamedTuple):
    """What was measured: the median time of a step, and tokens of a row in one."""

    seconds: float
    tokens: float


def main(_) -> None:
    """Parse, measure, report."""
    json = command.path_of(JSON, new_file)
    config = from_config_dict(CONFIG.value).with_(model={"num_mtp_layers": 1})
    for text in BATCH.value:
        if not text.isdecimal() or not 0 < int(text) <= 2**16:
            raise ValueError(f"--batch={text} must be numbers of rows, such as 1,32,128")
    session.start()
    mesh, records = make_mesh(config.mesh), []
    with jax.set_mesh(mesh):
        execution, drawn = decode_execution(config, mesh), random_weights(config, mesh)
        weights = decode_weights(config.model, execution, drawn, mesh, drafts=True)
    del drawn
    for text in BATCH.value:
        records += measure(config, mesh, weights, int(text))
    common = provenance("experiments.benchmarks.drafting", session.describe_device(mesh))
    print(f"\n{config.name}, {config.execution.precision}, context {CONTEXT.value}, on {common['device']}")
    if json:
        write(json, [record | common for record in records])


def measure(config: Config, mesh: jax.sharding.Mesh, weights: Weights, batch: int) -> list[dict[str, Any]]:
    """Return the records of one batch size."""
    without = weights._replace(
        params={name: tree for name, tree in weights.params.items() if name != "mtp_layers"},
        router_bias={name: tree for name, tree in weights.router_bias.items() if name != "mtp_layers"},
    )
    variants: list[tuple[Weights, dict[str, Any]]] = [
        (without, {}),
        (weights, {"num_drafts": NUM_DRAFTS.value, "drafting_rows": 0}),
        (weights, {"num_drafts": NUM_DRAFTS.value, "forced": ACCEPTANCE.value}),
    ]
    with ThreadPoolExecutor(len(variants)) as threads:
        batches = list(threads.map(lambda variant: prefilled(config, mesh, variant[0], batch, **variant[1]), variants))
    plain, following, drafting = (time_steps(found, batch) for found in batches)
    faster = drafting.tokens / drafting.seconds * plain.seconds / plain.tokens
    share = following.seconds / plain.seconds - 1
    values = [
        ("plain", batch * plain.tokens / plain.seconds, "tokens/s"),
        ("drafting", batch * drafting.tokens / drafting.seconds, "tokens/s"),
        ("step, plain", 1e3 * plain.seconds, "ms"),
        ("step, following", 1e3 * following.seconds, "ms"),
        ("step, drafting", 1e3 * drafting.seconds, "ms"),
        ("a: drafts accepted", drafting.tokens - 1, "tokens"),
        ("c of the MTP layer", share, ""),
        ("c of the step", drafting.seconds / plain.seconds - 1, ""),
        ("speed-up", faster, "x"),
        ("share of (1 + a) / (1 + c)", 100 * faster * (1 + share) / drafting.tokens, "%"),
    ]
    shape = {"batch": batch, "context": CONTEXT.value, "num_drafts": NUM_DRAFTS.value}
    records = [report.record(config, mode, shape, value, unit) for mode, value, unit in values]
    report.print_records(f"batch {batch}", [found | {"device": "", "jax": ""} for found in records])
    return records


def prefilled(config: Config, mesh: jax.sharding.Mesh, weights: Weights, num_rows: int, **drafts: Any) -> DeviceBatch:
    """Return a batch whose rows have read their prompts and decoded a token; so its programs are compiled."""
    most = (WARM_UP + STEPS.value + 3) * (drafts.get("num_drafts", 0) + 1)
    num_positions = CONTEXT.value + most
    columns = -(-(num_positions + MOST_DRAFTS) // PAGE)
    sizes = {"num_rows": num_rows, "num_pages": num_rows * columns, "num_positions": num_positions}
    sizes["most_prefill_tokens"] = PREFILL_TOKENS
    batch = DeviceBatch(config, weights, mesh, eos=NO_EOS, **sizes, **drafts)
    sampling = Sampling(temperature=TEMPERATURE.value, top_k=0, top_p=1.0)
    prompts = np.random.default_rng(0).integers(0, batch.vocab_size, (num_rows, CONTEXT.value)).tolist()
    nobody_B, all_B = np.zeros(batch.num_rows, bool), np.arange(batch.num_rows) < num_rows
    for row, prompt in enumerate(prompts):
        batch.open_row(row, RowSettings(sampling=sampling, max_new_tokens=most, number=row))
        batch.set_table(row, list(range(row * columns, (row + 1) * columns)))
        for start in range(0, len(prompt), PREFILL_TOKENS):
            end = start + PREFILL_TOKENS
            following = prompt[end] if end < len(prompt) else None
            batch.step([Piece(row, prompt[start:end], following is None, False, following)], nobody_B).read()
    batch.step([], all_B).read()
    return batch


def time_steps(batch: DeviceBatch, num_rows: int) -> Timed:
    """Time steps in which all rows decode."""
    all_B = np.arange(batch.num_rows) < num_rows
    ends, counts, ahead = [], [], batch.step([], all_B)
    for _ in range(WARM_UP + STEPS.value):
        step, ahead = ahead, batch.step([], all_B)
        counts.append(step.read().counts_B[:num_rows].mean())
        ends.append(time.perf_counter())
    ahead.read()
    return Timed(statistics.median(np.diff(ends[WARM_UP:])), float(np.mean(counts[WARM_UP + 1 :])))


if __name__ == "__main__":
    command.run(main)
