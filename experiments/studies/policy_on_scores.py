"""A policy trained on a reward model's score: the score, and what it should stand for, by update.

    python -m experiments.studies.policy_on_scores --runs=runs/policy_on_scores

Makes the first two stages of `configs/tiny_r1.py` in RUNS, the cold start and `reasoning`, unless RUNS has them: it may
be the workdir of `experiments.r1`, with the same --config. The cold start answers training problems; of each problem
that has both, a right answer is preferred to a wrong one (RUNS/pairs.jsonl). A reward model learns from these pairs
(RUNS/reward_model), and GRPO trains the cold start on its score alone (RUNS/on_scores), with the settings of
`reasoning`, whose reward is the rule that says what is right. What is done is read. Accuracy is by the rule in both.
Writes records and a drawing.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import new_folder, read_json
from deepseek_jax.palette import BLUE, VERMILION
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import r1
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.r1_settings import Plan, R1Config
from deepseek_jax.posttraining.reward_model_training import train_reward_model
from deepseek_jax.posttraining.rollouts import sample_groups
from deepseek_jax.posttraining.settings import read
from deepseek_jax.training.metrics import read_rows
from experiments import command, recipe, session
from experiments.studies import output
from experiments.studies.runs import RUNS
from experiments.studies.stages import config_name, run_stages, stop_if
from pallas_kernels.bench import records

CONFIG = recipe.Recipe("configs/tiny_r1.py", "Configuration with a section `r1`.", schema=R1Config)

PROMPTS, ANSWERS = 800, 4  # problems whose answers are compared, and answers to each
EPOCHS = 4.0
STEPS = 20  # updates of the policy; held-out accuracy of `reasoning` is known behind as many
COLD_START, RULE, REWARD, SCORE = "cold_start", "reasoning", "reward_model", "on_scores"
POLICIES = {SCORE: ("on the model's score", VERMILION), RULE: ("on the rule", BLUE)}
PAIRS = {
    "optimizer.learning_rate": (("constant", 1.0, 3e-4),),
    "optimizer.warmup_steps": 5,
    "training.batch_size": (("constant", 1.0, 32),),
    "training.micro_batch_size": 32,
    "training.eval_every": 20,
}
CURVES = {"rollout/reward_model": "score of samples", "rollout/accuracy": "", "rollout/length": "tokens of a sample"}
HELD_OUT = "eval/accuracy"
MADE_OF = "pairs_made_of.json"


def main(_) -> None:
    """Run what is not done, write, draw."""
    workdir = new_folder(RUNS.value, "--runs")
    folder = output.folder("policy_on_scores")
    session.start()
    assert CONFIG.value is not None  # it has a default
    tree = CONFIG.value.to_dict()
    tree["r1"]["num_stages"] = 2
    plan = run_stages(tree, workdir)
    pairs = write_pairs(plan, workdir)
    stop_if(train_reward_model(*reward_settings(plan, workdir), workdir / REWARD).interrupted_by)
    stop_if(train_grpo(*policy_settings(plan, workdir), workdir / SCORE).interrupted_by)
    rows = {name: read_rows(workdir / name) for name in (REWARD, *POLICIES)}
    rows[RULE] = [row for row in rows[RULE] if row["step"] <= STEPS]
    mesh = make_mesh(plan.settings(plan.stages[0], workdir)[0].mesh)
    common = records.provenance("experiments.studies.policy_on_scores", session.describe_device(mesh))
    common |= {"config": config_name(plan), "precision": "fp32"}
    found = [{"op": "pairs", "mode": REWARD, "value": pairs, "unit": "pairs"}]
    found += [record for name in rows for record in records_of(name, rows[name])]
    records.write(folder / "policy_on_scores.json", [record | common for record in found])
    draw(rows).savefig(folder / "policy_on_scores.png", dpi=100)
    for record in found:
        print(f"{record['mode']:<14}{record['op']:<40}{record['value']:>12.4g} {record['unit']}")


def write_pairs(plan: Plan, workdir: Path) -> int:
    """Let the cold start answer, and write a pair of each problem with right and wrong answers; return their number."""
    path, stage, seed = workdir / "pairs.jsonl", plan.stages[0], plan.shared["seed"] + 1
    if not path.exists():
        grpo = plan.grpo(plan.measure, workdir)
        with r1.open_sampler(plan, stage, workdir, COLD_START, grpo) as (engine, pool, problems, weights):
            engine.update_weights(weights)
            asked = problems.train[:PROMPTS]
            keyed = [(number, prompt.ids) for number, prompt in enumerate(asked)]
            drawn = sample_groups(engine, keyed, ANSWERS, grpo.max_new_tokens, seed)
            scores = pool.score([asked[s.number].problem for s in drawn], [s.text for s in drawn])
        sides: dict[int, dict[bool, str]] = {}  # of each problem, the first right answer and the first wrong one
        for sample, score in zip(drawn, scores, strict=True):
            if sample.text:
                sides.setdefault(sample.number, {}).setdefault(score.parts[grpo.accuracy] == 1.0, sample.text)
        lines = [
            json.dumps({"question": asked[i].problem.name, "chosen": both[True], "rejected": both[False]}) + "\n"
            for i, both in sides.items()
            if len(both) == 2
        ]
        write_atomically(workdir / MADE_OF, json.dumps(made_of("".join(lines), seed)) + "\n")
        write_atomically(path, "".join(lines))
    text, kept = path.read_text("utf-8"), workdir / MADE_OF
    if not kept.exists() or read_json(kept) != made_of(text, seed):
        raise ValueError(
            f"{path} does not have the pairs of {PROMPTS} problems with {ANSWERS} answers and the seed {seed}, as"
            f" {MADE_OF} would tell; remove it and what was trained on it ({REWARD}, {SCORE}), or give a new --runs"
        )
    return len(text.splitlines())


def made_of(pairs: str, seed: int) -> dict[str, Any]:
    """Return what pairs were made of, beside the cold start, which the folder's plan has."""
    return {"prompts": PROMPTS, "answers": ANSWERS, "seed": seed, "crc32": zlib.crc32(pairs.encode())}


def reward_settings(plan: Plan, workdir: Path):
    """Return what the training of the reward model takes."""
    tree = json.loads(json.dumps(plan.shared))
    for key, value in PAIRS.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    own = {"template": "folder", "pairs": str(workdir / "pairs.jsonl"), "heldout": 100, "epochs": EPOCHS}
    tree["posttraining"] = {"stage": "reward_model", "reward_model": own}
    return read(tree, str(workdir / COLD_START))


def policy_settings(plan: Plan, workdir: Path):
    """Return what the training of the policy takes: those of `reasoning` with another reward."""
    own = {"steps": STEPS, "rewards": {"text": 0.0, "model": 1.0}, "reward_model": str(workdir / REWARD)}
    stage = dataclasses.replace(plan.measure, settings=plan.measure.settings | own)
    return plan.settings(stage, workdir)


def records_of(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a run."""
    if name == REWARD:
        last = [row for row in rows if "eval/pair_accuracy" in row][-1]
        return [
            {"op": f"{key}, {last['eval/pairs']} held-out pairs", "mode": name, "value": last[key], "unit": unit}
            for key, unit in (("eval/pair_accuracy", "share"), ("eval/pair_loss", "nats"))
        ]
    updates = [row for row in rows if "policy/loss" in row]
    found = [
        {"op": f"{key}, updates {part[0]['step']} to {part[-1]['step']}", "value": mean_of(part, key), "unit": "mean"}
        for key in CURVES
        if key in updates[0]
        for part in (updates[:5], updates[-5:])
    ]
    for row in [row for row in rows if HELD_OUT in row]:
        interval = {"low": row[f"{HELD_OUT}_low"], "high": row[f"{HELD_OUT}_high"]}
        what = {"op": f"held-out accuracy at {row['step']}", "value": row[HELD_OUT], "unit": "share"}
        found.append(what | interval)
    return [record | {"mode": name} for record in found]


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    """Return the mean over some updates."""
    return float(np.mean([row[key] for row in rows]))


def draw(rows: dict[str, list[dict[str, Any]]]):
    """Draw the curves of both policies; held-out accuracy as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        for name, (label, colour) in POLICIES.items():
            updates = [row for row in rows[name] if key in row]
            axes.plot([row["step"] for row in updates], [row[key] for row in updates], color=colour, label=label)
            if key == "rollout/accuracy":
                seen = [row for row in rows[name] if HELD_OUT in row]
                axes.plot([row["step"] for row in seen], [row[HELD_OUT] for row in seen], "o", color=colour)
        axes.set(title=title, xlabel="update")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set(ylim=(0, 1), title="right: samples (line), held out (dots)")
    figure.axes[1].legend(frameon=False, title="trained", loc="lower right")
    return figure


if __name__ == "__main__":
    command.run(main)
