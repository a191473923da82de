"""From text to a model that reasons: pre-training, SFT and GRPO at 0.3B parameters, measured behind each stage.

    python -m experiments.studies.gsm8k --gsm8k=train.jsonl --runs=runs/gsm8k

GSM8K's file has one JSON object a line, with "question" and "answer". Of it, 500 problems are held out by a hash of
their questions, and are in no text and no conversation. The other problems are made by code
(`posttraining.word_problems`); 500 of those are held out by a hash of their calculations, so no held-out chain of
calculations is trained on, in whatever words. Both are answered greedily behind each stage (`configs/gsm8k_r1.py`), and
the task once more by a draw at temperature 1, as GRPO samples:

    base        pre-training on text
    sft         fine-tuning on conversations: GSM8K's solutions, and the task's, with steps and (twice as many) without
    grpo        reinforcement learning on the task: it has questions and answers alone
    control     the same from the weights of `sft`, with a reward that is a coin: what it learns is not from being right
    steps       fine-tuning from `base` on what has steps alone
    steps_grpo  `grpo`, from there
    zero        `grpo`, from `base`

`sft` shows two ways to answer the task, and nothing tells which is better, as in `configs/tiny_r1.py`. The first token
decides on a way: greedy answers have the frequent one nearly always, where draws have both. `steps` shows one way, as
R1's cold start does, and `zero` none, as R1-Zero. A stage that is done is read, one that was stopped continues. Records
have accuracy with Wilson's 95% interval, and tokens/s.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import gsm8k_r1
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.files import write_atomically
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import LENGTH, Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inputs import local_path, new_folder, read_json
from deepseek_jax.palette import BLACK, BLUE, GRAY, GREEN, ORANGE, VERMILION, YELLOW
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.accuracy import wilson
from deepseek_jax.posttraining.conversations import find_template
from deepseek_jax.posttraining.grpo import open_engine, open_pool, train_grpo
from deepseek_jax.posttraining.grpo_settings import task_of
from deepseek_jax.posttraining.problems import Problems, Prompt
from deepseek_jax.posttraining.settings import SECTION, read
from deepseek_jax.posttraining.sft import train_sft
from deepseek_jax.training.journal import say
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.pretrain import Result, train
from deepseek_jax.training.state import weights_of
from experiments import command, session
from experiments.studies import output
from experiments.studies.gsm8k_data import HeldOut, Sizes, prepare
from experiments.studies.runs import RUNS
from pallas_kernels.bench import records

GSM8K = flags.DEFINE_string("gsm8k", None, "GSM8K's training split, .jsonl.", required=True)

STAGES = tuple(gsm8k_r1.STAGES)
REINFORCED = {"grpo": GREEN, "control": GRAY, "steps_grpo": VERMILION, "zero": BLACK}  # and their colours
COLOURS = {"base": BLUE, "sft": ORANGE, "steps": YELLOW} | REINFORCED
DATA, RESULTS = "data", "results"
MOST_NEW_TOKENS = 320  # of an answer; GSM8K's solutions have 100 on average
STEP = "<<"  # a calculation that is written down
DRAW = Sampling(temperature=1.0, top_k=0, top_p=1.0)
SHOWN = 2  # answers of each set in a result
SPEEDS = {  # keys of the metrics
    "speed/step_seconds": ("step, rollout included", "s"),
    "rollout/seconds": ("rollout", "s"),
    "rollout/tokens_per_second": ("sampling", "tokens/s"),
    "rollout/sampler_difference": ("sampler's and trainer's log-probabilities, mean difference", "nats"),
}
CURVES = {
    "accuracy of samples (line), held out (dots)": {"rollout/accuracy": "-", "eval/accuracy": "o"},
    "tokens of a sample": {"rollout/length": "-"},
    "entropy, nats a token": {"policy/entropy": "-"},
}

Row = dict[str, Any]


def main(_) -> None:
    """Run what is not done; write records."""
    gsm8k, runs = local_path(GSM8K.value, "--gsm8k"), new_folder(RUNS.value, "--runs")
    folder = output.folder("r1")
    session.start()
    stopped = run(gsm8k_r1.get_config, gsm8k, runs, Sizes(), say)
    if stopped is not None:
        say(f"\nstopped by {stopped.name}; the same command continues")
        sys.exit(128 + stopped)
    mesh = make_mesh(from_config_dict(tree_of(gsm8k_r1.get_config, "base", runs)).mesh)
    common = records.provenance("experiments.studies.gsm8k", session.describe_device(mesh))
    records.write(folder / "gsm8k.json", [record | common for record in records_of(runs)])
    draw(runs).savefig(folder / "gsm8k.png", dpi=100)


def run(
    get_config: Callable[[str], ConfigDict], gsm8k: Path, runs: Path, sizes: Sizes, tell: Callable[[str], None]
) -> Any:
    """Make the data, run the stages that are not done, and measure behind each; return the signal that ended it early.

    Args:
        get_config: of the names of `STAGES`.
        gsm8k: file of problems.
        runs: folder; made if it does not exist.
        sizes: of the data.
        tell: takes the result of each stage as text.

    Raises:
        ValueError, RewardError, NonFiniteError, SaveError, OSError: as the stages.
    """
    trees = {stage: tree_of(get_config, stage, runs) for stage in STAGES}
    task = task_of(trees["grpo"][SECTION]["grpo"]["problems"])
    assert task is not None  # of the configuration
    vocab_size, seed = trees["base"]["model"]["vocab_size"], trees["base"]["seed"]
    held = prepare(runs / DATA, gsm8k, task, vocab_size, seed, sizes)
    with contextlib.ExitStack() as resources:
        measure = Measure(trees["grpo"], runs, held, resources)
        for stage in STAGES:
            path = runs / RESULTS / f"{stage}.json"
            if path.exists():
                continue
            result = train_stage(stage, trees[stage], runs / stage)
            if result.interrupted_by is not None:
                return result.interrupted_by
            row = measure(weights_of(result.state), result.mesh)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(row, indent=1) + "\n")
            tell(result_lines(stage, row))
            del result  # a state on the device less
    return None


def tree_of(get_config: Callable[[str], ConfigDict], stage: str, runs: Path) -> dict[str, Any]:
    """Return a stage's configuration with the paths of `runs`, as a dict."""
    text, there = json.dumps(get_config(stage).to_dict()), json.dumps(f"{runs}/")[1:-1]
    return json.loads(text.replace(f"{gsm8k_r1.RUNS}/", there))


def train_stage(stage: str, tree: dict[str, Any], workdir: Path) -> Result:
    """Train a stage to its end, or until a signal."""
    if stage == "base":
        return train(from_config_dict(tree), workdir)
    return (train_grpo if stage in REINFORCED else train_sft)(*read(tree), workdir)


class Measure:
    """Answers both held-out sets greedily, and draws. Its engine is opened when it is first called, and kept."""

    def __init__(self, tree: dict[str, Any], runs: Path, held: HeldOut, resources: contextlib.ExitStack):
        """Take the configuration of GRPO; the engine and the rewards end with `resources`."""
        self._config, posttraining = read(tree)
        assert posttraining.grpo is not None
        self._grpo = dataclasses.replace(posttraining.grpo, max_new_tokens=MOST_NEW_TOKENS)
        self._held, self._resources = held, resources
        self._tokenizer_path = runs / DATA / TOKENIZER_FILES[0]
        self._engine: Engine | None = None

    def __call__(self, weights: Weights, mesh: jax.sharding.Mesh) -> Row:
        """Return the row of weights."""
        tokenizer, template = Tokenizer.load(self._tokenizer_path), find_template("plain", None)
        asked = [*self._held.gsm8k, *(problem for part in self._held.task.values() for problem in part)]
        prompts = [Prompt(problem, template.encode(tokenizer, problem.messages)) for problem in asked]
        if self._engine is None:
            longest = max(len(prompt.ids) for prompt in prompts) + MOST_NEW_TOKENS
            length = {"sequence_length": max(longest, self._config.data.sequence_length)}
            config = self._config.with_(data=length)  # GSM8K's may be longer than a row of GRPO
            with jax.set_mesh(mesh):
                engine = open_engine(config, self._grpo, Problems(prompts, []), weights, tokenizer, mesh)
            self._engine = self._resources.enter_context(engine)
            self._pool = self._resources.enter_context(open_pool(self._grpo))
        self._engine.update_weights(weights)
        rows = self._answers(prompts, GREEDY)
        end = len(self._held.gsm8k)
        found = {"gsm8k": summary(rows[:end]), "task": summary(rows[end:])}
        for steps, part in self._held.task.items():
            begin, end = end, end + len(part)
            found[f"task, {steps} calculations"] = summary(rows[begin:end])
        found["task, drawn"] = summary(self._answers(prompts[len(self._held.gsm8k) :], DRAW))
        return found

    def _answers(self, prompts: list[Prompt], sampling: Sampling) -> list[Row]:
        """Return an answer to each prompt, and whether it is right."""
        assert self._engine is not None
        shared = {"max_new_tokens": MOST_NEW_TOKENS, "sampling": sampling, "keep_end": True}
        jobs = [Job(prompt=p.ids, own=Request(seed=n), **shared) for n, p in enumerate(prompts)]
        answers = self._engine.generate(jobs)
        asked = [prompt.problem for prompt in prompts]
        scores = self._pool.score(asked, [answer.text for answer in answers])
        return [
            {
                "question": problem.name,
                "answer": answer.text,
                "right": score.parts[self._grpo.accuracy] == 1.0,
                "tokens": len(answer.ids),
                "cut_off": answer.finish_reason == LENGTH,
            }
            for problem, answer, score in zip(asked, answers, scores, strict=True)
        ]


def summary(rows: list[Row]) -> Row:
    """Return accuracy with its interval, how the answers look, and some of them."""
    interval = wilson(sum(row["right"] for row in rows), len(rows))
    return interval._asdict() | {
        "problems": len(rows),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "with_steps": float(np.mean([STEP in row["answer"] for row in rows])),
        "cut_off": float(np.mean([row["cut_off"] for row in rows])),
        "shown": [[row["question"], row["answer"]] for row in rows[:SHOWN]],
    }


def result_lines(stage: str, row: Row) -> str:
    """Return a result as lines for a person."""
    lines = [
        f"{stage}, {name}: {one['share']:.1%} of {one['problems']} held-out problems right (95%: {one['low']:.1%} to"
        f" {one['high']:.1%}); {one['with_steps']:.0%} with steps, {one['tokens']:.0f} tokens"
        for name, one in row.items()
    ]
    shown = [f"  {question!r} -> {answer!r}" for name in ("gsm8k", "task") for question, answer in row[name]["shown"]]
    return "\n".join([*lines, *shown])


def records_of(runs: Path) -> list[dict[str, Any]]:
    """Return the records of the stages that are done: accuracy, and the speed of training and of rollouts."""
    found = []
    for stage in _done(runs):
        for name, one in read_json(runs / RESULTS / f"{stage}.json").items():
            values = {"value": one.pop("share"), "unit": "share", "shape": {"problems": one.pop("problems")}}
            if name not in ("gsm8k", "task"):  # whose answers are shown already
                del one["shown"]
            found.append({"config": "gsm8k_r1", "op": f"{name}, behind {stage}", "mode": stage} | values | one)
        found += speeds(stage, read_rows(runs / stage))
    return found


def speeds(stage: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over the updates of a run, without the first three; sampling is of drawn tokens.

    Training counts padding. A step of GRPO is measured until the next rollout has ended, which waits for the update:
    what an update takes alone is the time of the last one.
    """
    updates = [row for row in rows if "speed/step_seconds" in row]
    if len(updates) < 5:
        return []
    values = {key: [row[key] for row in updates[3:] if key in row] for key in (*SPEEDS, "tokens_seen")}
    middle = {key: float(np.median(x)) for key, x in values.items() if x}
    found = {(op, unit): middle[key] for key, (op, unit) in SPEEDS.items() if key in middle}
    alone = updates[-1]["speed/step_seconds"] if "rollout/seconds" in middle else middle["speed/step_seconds"]
    found["training", "tokens/s"] = float(np.median(np.diff(values["tokens_seen"]))) / alone
    shared = {"config": "gsm8k_r1", "mode": stage, "shape": {"updates": len(updates)}}
    return [{"op": op, "value": value, "unit": unit} | shared for (op, unit), value in found.items()]


def draw(runs: Path) -> Any:
    """Return a figure: accuracy behind each stage that is done, by the number of calculations, and GRPO's curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    bars, *panels = figure.subplots(2, 2).flat
    stages = _done(runs)
    for place, stage in enumerate(stages):
        results = read_json(runs / RESULTS / f"{stage}.json")
        shares, width = [one["share"] for one in results.values()], 0.8 / len(stages)
        places = np.arange(len(shares)) + width * (place - (len(stages) - 1) / 2)
        bars.bar(places, shares, 0.95 * width, color=COLOURS[stage], label=stage)
        bars.set_xticks(
            range(len(shares)), [name.removeprefix("task, ").replace("calculations", "calc.") for name in results]
        )
    figure.legend(*bars.get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS))
    bars.set(title="held-out accuracy behind each stage", ylim=(0, 1))
    rows = {stage: read_rows(runs / stage) for stage in stages if stage in REINFORCED}
    for axes, (title, keys) in zip(panels, CURVES.items(), strict=True):
        for stage, key in itertools.product(rows, keys):
            found = [row for row in rows[stage] if key in row]
            curve = [row["step"] for row in found], [row[key] for row in found]
            axes.plot(*curve, keys[key], color=COLOURS[stage], label=stage)
        axes.set(title=title, xlabel="update")
        axes.set_ylim(bottom=0)
    return figure


def _done(runs: Path) -> list[str]:
    return [stage for stage in STAGES if (runs / RESULTS / f"{stage}.json").exists()]


if __name__ == "__main__":
    command.run(main)
