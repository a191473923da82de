"""Measure drafting: `python -m experiments.benchmarks.drafting --config=configs/v3_5b.py --batch=1,32,128`.

With --config, weights are random, and the MTP layer of a random model guesses nothing, so --acceptance of the drafts
are accepted, whatever they are. The contexts of --context tokens are random, too. With --workdir the model is that of a
run, prompts are pieces of the held-out text, and drafts are accepted or not by the rule. For each batch, rows decode in
three programs, as an engine runs them, one step ahead:

    plain       no drafts
    following   drafts off, while the MTP layer keeps its entries up to date: c of the MTP layer alone is the difference
    drafting    --num_drafts drafts of each row

Where an engine has bursts, the first and the last are timed in bursts, too. The head is timed in a loop of its own.

The programs of the three are compiled side by side; the steps of each are timed alone.

The speed-up is that of tokens/s. It is set beside (1 + a) / (1 + c): a drafts accepted a step and row, and c the share
of time that the MTP layer takes, alone or with the head that makes a draft of its state; or all that a step takes
longer. With the last both are the same by definition; its c is what `acceptance.worth_rows` wants. --json writes the
numbers as records, after each measurement.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.heldout import open_held_out
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.decode import decode_execution
from deepseek_jax.inference.drafting import check_drafts
from deepseek_jax.inference.row_programs import logits_of
from deepseek_jax.inference.row_sampling import DRAWN, GREEDY, choose_ids, noise_at
from deepseek_jax.inference.row_state import RowSettings, empty_state
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.speculative import MOST_DRAFTS
from deepseek_jax.inference.step import Piece
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.inputs import local_path, new_file
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from experiments import command, model_source, recipe, session
from experiments.benchmarks import report
from experiments.benchmarks.random_weights import random_entries, random_weights
from pallas_kernels.bench.records import provenance, write
from pallas_kernels.mla_decode.schedule import PAGE

CONFIG = recipe.Recipe(None, "Configuration, such as configs/v3_5b.py, of random weights; it gets an MTP layer.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run whose model has an MTP layer, instead of --config.")
JSON = flags.DEFINE_string("json", None, "Write the records to this file.")
BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "Rows that decode, one measurement for each number.")
CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of every prompt.", lower_bound=1, upper_bound=2**20)
NUM_DRAFTS = flags.DEFINE_integer("num_drafts", 1, "Drafts of a step.", lower_bound=1, upper_bound=MOST_DRAFTS)
ACCEPTANCE = flags.DEFINE_float("acceptance", 0.85, "With --config: of drafts.", lower_bound=0.0, upper_bound=1.0)
TEMPERATURE = flags.DEFINE_list("temperature", ["0"], "Of the draws, one measurement for each number; 0 is greedy.")
STEPS = flags.DEFINE_integer("steps", 64, "Timed steps.", lower_bound=2, upper_bound=10**4)

WARM_UP = 8  # steps that are not timed
BURSTS = 2  # times that a batch is timed: single steps, and bursts
REPEATS = 5  # of the head's loop
PREFILL_TOKENS = 2048
NO_EOS = 2**31 - 2  # no token is it


class Timed(NamedTuple):
    """What was measured: the median time of a step, and tokens of a row in one."""

    seconds: float
    tokens: float


class Subject(NamedTuple):
    """What drafts: a model, and the prompts that it goes on with, of --context ids; without any they are random."""

    config: Config
    mesh: jax.sharding.Mesh
    weights: Weights
    prompts: list[list[int]] | None


def main(_) -> None:
    """Parse, measure, report."""
    json = command.path_of(JSON, new_file)
    if (CONFIG.value is None) == (WORKDIR.value is None):
        raise ValueError("give --config for random weights, or --workdir for those of a run")
    batches = [int(_number(text, "batch", 1, 2**16)) for text in BATCH.value]
    temperatures = [_number(text, "temperature", 0, 100) for text in TEMPERATURE.value]
    subject = open_run(WORKDIR.value, max(batches)) if WORKDIR.value else open_random(from_config_dict(CONFIG.value))
    common = provenance("experiments.benchmarks.drafting", session.describe_device(subject.mesh))
    records: list[dict[str, Any]] = []
    for batch in batches:
        for temperature in temperatures:
            records += [record | common for record in measure(subject, batch, temperature)]
            if json:
                write(json, records)
    name, precision = subject.config.name, subject.config.execution.precision
    print(f"\n{name}, {precision}, context {CONTEXT.value}, on {common['device']}")


def _number(text: str, flag: str, least: int, most: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most or (flag == "batch" and value != int(value)):
        raise ValueError(f"--{flag}={text} must be numbers from {least} to {most}, such as 1,32")
    return value


def open_random(config: Config) -> Subject:
    """Return a model with random weights and an MTP layer."""
    config = config.with_(model={"num_mtp_layers": 1})
    session.start()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        drawn = random_weights(config, mesh)
        return Subject(
            config, mesh, decode_weights(config.model, decode_execution(config, mesh), drawn, mesh, True), None
        )


def open_run(workdir: str, num_rows: int) -> Subject:
    """Return the newest model of a run, and prompts from the text that it was not trained on.

    Raises:
        ValueError: there is no run, its model has no MTP layer, or the held-out text is too short.
    """
    source = model_source.open_named(workdir, None, None)
    config = source.config
    check_drafts(NUM_DRAFTS.value, config.model)
    session.start()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        weights = decode_weights(config.model, decode_execution(config, mesh), source.load(mesh), mesh, True)
    tokenizer, length = source.tokenizer(), CONTEXT.value
    texts = b"\n".join(open_held_out(config, tokenizer, local_path(workdir, "--workdir")).texts()).decode(
        errors="replace"
    )
    ids = tokenizer.encode(texts)
    if len(ids) < num_rows * length:
        raise ValueError(
            f"the held-out text has {len(ids):,} tokens; lower --batch or --context: {num_rows} x {length}"
        )
    gap = (len(ids) - length) // num_rows
    return Subject(config, mesh, weights, [ids[i * gap : i * gap + length] for i in range(num_rows)])


def measure(subject: Subject, batch: int, temperature: float) -> list[dict[str, Any]]:
    """Return the records of one batch size and temperature."""
    weights = subject.weights
    without = weights._replace(
        params={name: tree for name, tree in weights.params.items() if name != "mtp_layers"},
        router_bias={name: tree for name, tree in weights.router_bias.items() if name != "mtp_layers"},
    )
    forced = None if subject.prompts else ACCEPTANCE.value
    variants: list[tuple[Weights, dict[str, Any]]] = [
        (without, {}),
        (weights, {"num_drafts": NUM_DRAFTS.value, "drafting_rows": 0}),
        (weights, {"num_drafts": NUM_DRAFTS.value, "forced": forced}),
    ]

    def opened(variant):
        return at_context(subject._replace(weights=variant[0]), batch, temperature, **variant[1])

    with ThreadPoolExecutor(len(variants)) as threads:
        batches = list(threads.map(opened, variants))
    plain, following, drafting = (time_steps(found, batch) for found in batches)
    faster = drafting.tokens / drafting.seconds * plain.seconds
    share = following.seconds / plain.seconds - 1
    head = time_head(subject, batches[0].num_rows, temperature)
    with_head = (following.seconds + head) / plain.seconds - 1
    values = [
        ("plain", batch / plain.seconds, "tokens/s"),
        ("drafting", batch * drafting.tokens / drafting.seconds, "tokens/s"),
        ("step, plain", 1e3 * plain.seconds, "ms"),
        ("step, following", 1e3 * following.seconds, "ms"),
        ("step, drafting", 1e3 * drafting.seconds, "ms"),
        ("head of a draft", 1e3 * head, "ms"),
        ("a: drafts accepted", drafting.tokens - 1, "tokens"),
        ("c of the MTP layer", share, ""),
        ("c of the MTP layer and its head", with_head, ""),
        ("c of the step", drafting.seconds / plain.seconds - 1, ""),
        ("speed-up", faster, "x"),
        ("share of (1 + a) / (1 + c)", 100 * faster * (1 + share) / drafting.tokens, "%"),
        ("share with the head's c", 100 * faster * (1 + with_head) / drafting.tokens, "%"),
    ]
    if batches[0].burst > 1 and batch <= batches[0].burst_rows:
        bursts, drafted = (time_steps(found, batch, found.burst) for found in (batches[0], batches[2]))
        values += [
            ("plain, in bursts", batch * bursts.tokens / bursts.seconds, "tokens/s"),
            ("drafting, in bursts", batch * drafted.tokens / drafted.seconds, "tokens/s"),
            ("speed-up of bursts", drafted.tokens / drafted.seconds * bursts.seconds / bursts.tokens, "x"),
        ]
    shape = {"batch": batch, "context": CONTEXT.value, "num_drafts": NUM_DRAFTS.value, "temperature": temperature}
    records = [report.record(subject.config, mode, shape, value, unit) for mode, value, unit in values]
    title = f"batch {batch}, temperature {temperature:g}"
    report.print_records(title, [found | {"device": "", "jax": ""} for found in records])
    return records


def at_context(subject: Subject, num_rows: int, temperature: float, **drafts: Any) -> DeviceBatch:
    """Return a batch whose rows have their context and have decoded a token; so its programs are compiled."""
    most = (WARM_UP + STEPS.value + 3) * (drafts.get("num_drafts", 0) + 1)
    most_tokens = (BURSTS + 1) * most  # room: a row that ended in a burst would make it look shorter
    num_positions = CONTEXT.value + most_tokens
    columns = -(-(num_positions + MOST_DRAFTS) // PAGE)
    sizes = {"num_rows": num_rows, "num_pages": num_rows * columns, "num_positions": num_positions}
    sizes["most_prefill_tokens"] = PREFILL_TOKENS
    batch = DeviceBatch(subject.config, subject.weights, subject.mesh, eos=NO_EOS, **sizes, **drafts)
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0)
    nobody_B, all_B = np.zeros(batch.num_rows, bool), np.arange(batch.num_rows) < num_rows
    if subject.prompts is None:
        batch.change_pages(random_entries)
    for row in range(num_rows):
        length = CONTEXT.value if subject.prompts is None else 0
        settings = {"sampling": sampling, "max_new_tokens": most_tokens, "number": row, "length": length}
        batch.open_row(row, RowSettings(**settings))
        batch.set_table(row, list(range(row * columns, (row + 1) * columns)))
        prompt = subject.prompts[row] if subject.prompts else []
        for start in range(0, len(prompt), PREFILL_TOKENS):
            end = start + PREFILL_TOKENS
            following = prompt[end] if end < len(prompt) else None
            batch.step([Piece(row, prompt[start:end], following is None, False, following)], nobody_B).read()
    batch.step([], all_B).read()
    if batch.burst > 1 and num_rows <= batch.burst_rows:
        batch.step([], all_B, batch.burst).read()
    return batch


def time_steps(batch: DeviceBatch, num_rows: int, num_tokens: int = 1) -> Timed:
    """Time steps in which all rows decode."""
    all_B = np.arange(batch.num_rows) < num_rows
    ends, counts, ahead = [], [], batch.step([], all_B, num_tokens)
    for _ in range((WARM_UP + STEPS.value) // num_tokens):
        step, ahead = ahead, batch.step([], all_B, num_tokens)
        counts.append(step.read().counts_B[:num_rows].mean())
        ends.append(time.perf_counter())
    ahead.read()
    begin = WARM_UP // num_tokens
    return Timed(statistics.median(np.diff(ends[begin:])), float(np.mean(counts[begin + 1 :])))


def time_head(subject: Subject, num_rows: int, temperature: float) -> float:
    """Return the seconds in which a draft is made of the MTP layer's state: head and choice, the noise being there."""
    head_DV = subject.weights.params["head_DV"]
    kind = GREEDY if temperature == 0 else DRAWN
    settings = empty_state(num_rows, head_DV.shape[1]).settings
    warm_B = np.full(num_rows, temperature, np.float32)
    choice = settings.choice._replace(sampling=settings.choice.sampling._replace(temperature=warm_B))
    all_B: Any = np.ones(num_rows, bool)

    @jax.jit
    def run(head_DV, choice, x_BD):
        noise_BV = None if kind == GREEDY else noise_at(choice, jnp.zeros(num_rows, jnp.int32), head_DV.shape[1])

        def draft(x_BD, _):
            ids_B = choose_ids(kind, choice, logits_of(head_DV, x_BD), noise_BV, all_B, None)
            return x_BD.at[:, 0].set(ids_B.astype(x_BD.dtype)), None

        return lax.scan(draft, x_BD, length=STEPS.value)[0]

    with jax.set_mesh(subject.mesh):
        x_BD = jnp.ones((num_rows, len(head_DV)), head_DV.dtype)
        found = []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            run(head_DV, choice, x_BD).block_until_ready()
            found.append(time.perf_counter() - begin)
    return statistics.median(found[1:]) / STEPS.value


if __name__ == "__main__":
    command.run(main)
