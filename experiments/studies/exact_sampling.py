"""What exact arithmetic costs: CPU seconds of sampling and scoring, exact and fast, and how far both are apart.

    python -m experiments.studies.exact_sampling

Random weights of `configs/tiny.py` sample groups of prompts that begin alike, in FP32 on one CPU device. Fast samples
are scored by the trainer's program, exact ones by the engine's (`posttraining.scoring`). Ways take turns, and medians
are kept.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from configs import tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import expert_mesh, known_ids
from deepseek_jax.model.transformer import init
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import P, Weights, partition_specs
from deepseek_jax.posttraining.choices import GRPO
from deepseek_jax.posttraining.policy_objective import policy
from deepseek_jax.posttraining.rollouts import Sample, make_batch, routes_of, sample_groups
from deepseek_jax.posttraining.scoring import Scored, exact_scores, flipped, jit_score, score_rows
from experiments import command, session
from experiments.studies import output
from pallas_kernels.bench import records

PROMPTS = flags.DEFINE_integer("prompts", 8, "Groups, each of eight samples.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 48, "Of a sample, at most.", lower_bound=1)
DRAFTS = flags.DEFINE_list("drafts", ["0", "1"], "Tokens that the MTP layer drafts.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each way.", lower_bound=1)

GROUP, MICRO_BATCH, SHARED, OWN = 8, 16, 70, 10  # the last two are tokens of a prompt


def main(_) -> None:
    """Sample and score in turns, and write."""
    session.start()
    tree: Any = tiny.get_config()
    # the engine draws no other ids, and the trainer's softmax is over all
    tree.model.update({"vocab_size": byte_tokenizer().vocab_size})
    config = from_config_dict(tree)
    folder = output.folder("exact")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        drawn = drawn_weights(config)
        specs = Weights(partition_specs(drawn.params), jax.tree.map(lambda _: P(), drawn.router_bias))
        weights = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), drawn, specs)
        program = jit_score(config, policy(GRPO, config.model, config.loss, config.execution.loss_chunk), mesh)
    ways = [(arithmetic, int(drafts)) for drafts in DRAFTS.value for arithmetic in ("fast", "exact")]
    turns = {way: open_way(config, weights, *way) for way in ways}
    found: dict[tuple, list[dict]] = {way: [] for way in ways}
    for number in range(ROUNDS.value + 1):  # the first compiles
        for way, (engine, samples_of) in turns.items():
            score = functools.partial(by_trainer, program, weights, mesh) if way[0] == "fast" else None
            measured = take_turn(engine, samples_of, score)
            found[way] += [measured] if number else []
    common = records.provenance("experiments.studies.exact_sampling", session.describe_device(mesh))
    common |= {"config": config.name, "precision": "fp32"}
    rows = []
    for (arithmetic, drafts), turns_of in found.items():
        for name, unit in (("sampling", "CPU s"), ("scoring", "CPU s"), ("largest difference", "nats")):
            value = statistics.median(turn[name] for turn in turns_of)
            rows.append(common | {"mode": f"{arithmetic}, {drafts} drafts", "op": name, "value": value, "unit": unit})
        for name in ("equal", "tokens", "flips"):
            mode = f"{arithmetic}, {drafts} drafts"
            rows.append(common | {"mode": mode, "op": name, "value": turns_of[-1][name], "unit": "count"})
    records.write(folder / f"{config.name}.json", rows)
    for row in rows:
        print(f"{row['mode']:<18}{row['op']:<20}{row['value']:>14.6g} {row['unit']}")
    for engine, _ in turns.values():
        engine.close()


def drawn_weights(config: Config) -> Weights:
    """Return random weights: gains of 1, other parameters as wide as the recipe's."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(functools.partial(init, config.model), jax.eval_shape(lambda: jax.random.key(0)))

    def draw(path, leaf):
        wide = config.model.init_std * rng.normal(size=leaf.shape)
        return np.full(leaf.shape, 1.0 if "norm" in path[-1].key else wide, np.float32)

    return jax.tree.map_with_path(draw, abstract)


def open_way(config: Config, weights: Weights, arithmetic: str, drafts: int) -> tuple[Engine, Callable]:
    """Return an engine, and what samples from it; programs are compiled when they are first used."""
    tokenizer, rows = byte_tokenizer(), PROMPTS.value * GROUP
    mesh = expert_mesh(config.model, 1)
    with jax.set_mesh(mesh):
        known = known_ids(weights, tokenizer)
    sizes = {"num_rows": rows, "num_pages": 4 * rows + 8, "num_positions": SHARED + OWN + TOKENS.value}
    options = {"num_drafts": drafts, "exact": arithmetic == "exact", "eos": tokenizer.eos}
    engine = Engine(DeviceBatch(config, known, mesh, **sizes, **options), tokenizer)
    rng = np.random.default_rng(0)
    shared = rng.integers(6, 250, SHARED).tolist()
    prompts = [(i, [*shared, *rng.integers(6, 250, OWN).tolist()]) for i in range(PROMPTS.value)]
    return engine, lambda seed: sample_groups(engine, prompts, GROUP, TOKENS.value, seed, routes=True)


def by_trainer(program: Any, weights: Weights, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> Scored:
    """Score by the trainer's program."""
    with jax.set_mesh(mesh):
        return score_rows(program, weights, batch, MICRO_BATCH, mesh)


def take_turn(engine: Engine, samples_of: Callable[[int], Sequence[Sample]], score: Any) -> dict[str, float]:
    """Sample and score once; return CPU seconds of all threads, and how the numbers compare."""
    start = time.process_time()
    samples = samples_of(1)
    sampled = time.process_time()
    ones, length = np.ones(len(samples)), SHARED + OWN + TOKENS.value
    batch = make_batch(samples, ones, ones > 0, length, 0)
    scoring = time.process_time()
    scored = exact_scores(engine, batch) if score is None else score(batch)
    end = time.process_time()
    carries = batch["loss_weights_BS"] > 0
    apart = np.abs(scored.logprobs_BS - batch["sampler_logprobs_BS"])[carries]
    flips = flipped(batch, routes_of(samples, length), scored.routes_BSLK)
    return {
        "sampling": sampled - start,
        "scoring": end - scoring,
        "largest difference": float(apart.max()),
        "equal": int((apart == 0).sum()),
        "tokens": len(apart),
        "flips": flips,
    }


if __name__ == "__main__":
    command.run(main)
