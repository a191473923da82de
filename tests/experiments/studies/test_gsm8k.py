"""The study of GSM8K: what is held out is in no file, a whole chain of stages runs, and its records are of its runs."""

import json

import jax
import numpy as np
import pytest

from configs import gsm8k_r1
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference import opening
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import grpo, sft
from deepseek_jax.posttraining.grpo import open_pool
from deepseek_jax.posttraining.grpo_settings import TaskName
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.settings import read
from deepseek_jax.training import pretrain
from deepseek_jax.training.metrics import read_rows
from experiments.studies import gsm8k
from experiments.studies.gsm8k_data import Sizes, prepare
from tests.training import nano

SIZES = Sizes(texts=200, with_steps=20, hasty=20, gsm8k_heldout=6, heldout=4)


def write_problems(path, num=40):
    """Problems in GSM8K's form."""
    rows = [
        {
            "question": f"Kim has {n} red and {n + 3} blue pens. How many pens is that?",
            "answer": f"Kim has {n}+{n + 3} = <<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3} pens.\n#### {2 * n + 3}",
        }
        for n in range(1, num + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(stage):
    """The study's stages with the nano model, and a few steps each."""
    config = gsm8k_r1.get_config(stage)
    config.model.update(nano.get_config("").model.to_dict() | {"vocab_size": 512, "num_mtp_layers": 0})
    config.model.update({"num_layers": 1, "num_dense_layers": 0})
    config.execution.update({"precision": "fp32", "remat": "none", "attention": "xla", "attention_chunk": 192})
    config.execution.update({"expert_block": 8, "expert_wave": 8, "loss_chunk": 64})
    config.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8, "eval_every": 0})
    config.data.sequence_length = 192
    if stage == "base":  # its step is that of `sft`, and compiled once
        config.data.update({"sources": config.data.sources[:2], "heldout_fraction": 0.1})
        config.data.update({"mask_documents": True, "reset_positions": True})
        config.loss.sequence_balance_weight = 0.0
        config.optimizer.weight_decay = 0.0
        config.training.update({"num_tokens": 6 * 8 * 192.0, "eval_batches": 1})
    if stage in ("sft", "steps"):
        config.posttraining.sft.epochs = 2.0
    if stage in gsm8k.REINFORCED:
        sizes = {"num_problems": 20, "heldout": 5, "group_size": 4, "steps": 6, "max_new_tokens": 8, "rows": 8}
        config.posttraining.grpo.update({"problems": "word_problems:1-2", "reward_workers": 1} | sizes)
    return config


def test_the_configurations_are_ones():
    for stage in gsm8k.STAGES:
        tree = gsm8k.tree_of(gsm8k_r1.get_config, stage, "elsewhere")
        assert gsm8k_r1.RUNS not in json.dumps(tree)
        if stage != "base":
            config, posttraining = read(tree)
            kind = "grpo" if stage in gsm8k.REINFORCED else "sft"
            begins = {"grpo": "sft", "control": "sft", "steps_grpo": "steps"}.get(stage, "base")
            assert posttraining.stage == kind and config.training.initial_weights == f"elsewhere/{begins}"


def test_the_control_is_grpo_with_a_coin_for_a_reward():
    ours, control = ({"name": ""} | gsm8k.tree_of(gsm8k_r1.get_config, stage, "r") for stage in ("grpo", "control"))
    settings, posttraining = control["posttraining"]["grpo"], read(control)[1]
    assert settings.pop("rewards") == {"gsm8k": 0.0, "chance": 1.0}
    assert ours["posttraining"]["grpo"].pop("rewards") == {"gsm8k": 1.0}
    assert control.pop("name") == "gsm8k_control" and ours.pop("name") == "gsm8k_grpo" and control == ours
    with open_pool(posttraining.grpo) as pool:
        problem = Problem(name="one and one", messages=[], answer="#### 2")
        scores = pool.score([problem] * 64, [f"That is {n}.\n#### {n % 2 + 1}" for n in range(64)])
    right, totals = ([score.parts["gsm8k"] for score in scores], [score.total for score in scores])
    assert sum(right) == 32 and set(totals) == {0.0, 1.0} and abs(np.corrcoef(right, totals)[0, 1]) < 0.3


def test_what_is_held_out_is_in_no_file(tmp_path):
    path = write_problems(tmp_path / "gsm8k.jsonl")
    held = prepare(tmp_path / "data", path, TaskName("word_problems", 1, 2), 512, 0, SIZES)
    assert len(held.gsm8k) == 6 and [len(part) for part in held.task.values()] == [2, 2]
    texts = "".join(file.read_text() for file in (tmp_path / "data").glob("*.jsonl"))
    asked = [problem.name for part in (held.gsm8k, *held.task.values()) for problem in part]
    assert not any(name in texts for name in asked)
    every = [json.loads(line)["question"] for line in path.read_text().splitlines()]
    assert sum(question in texts for question in every) == 34
    files = sorted(file.name for file in (tmp_path / "data").iterdir() if not file.name.startswith("tokenizer"))
    assert files == ["data.json", "gsm8k.jsonl", "hasty.jsonl", "solutions.jsonl", "texts.jsonl"]
    replies = {
        name: [json.loads(line)["messages"][-1]["content"] for line in text.splitlines()]
        for name in ("solutions", "hasty")
        for text in [(tmp_path / "data" / f"{name}.jsonl").read_text()]
    }
    assert len(replies["solutions"]) == 34 + 20 and all(gsm8k.STEP in reply for reply in replies["solutions"])
    assert len(replies["hasty"]) == 20 and all(reply.startswith("#### ") for reply in replies["hasty"])
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer.json")
    ids = tokenizer.encode("48/2 = <<48/2=24>>")
    assert sum(tokenizer.decode([i]).isdigit() for i in ids) == 8  # every digit is a token
    assert prepare(tmp_path / "data", path, TaskName("word_problems", 1, 2), 512, 0, SIZES) == held
    longer, fewer = TaskName("word_problems", 1, 3), SIZES._replace(gsm8k_heldout=3)
    for task, seed, sizes, key in ((longer, 0, SIZES, "task"), (None, 1, SIZES, "seed"), (None, 0, fewer, "sizes")):
        with pytest.raises(ValueError, match=f"data that were made with {key} = .*a new folder as --runs"):
            prepare(tmp_path / "data", path, task or TaskName("word_problems", 1, 2), 512, seed, sizes)
    for change in (lambda: write_problems(path, 41), (tmp_path / "data" / "data.json").unlink):
        change()
        with pytest.raises(ValueError, match="data that were made with gsm8k = "):
            prepare(tmp_path / "data", path, TaskName("word_problems", 1, 2), 512, 0, SIZES)


def test_speeds_are_medians_behind_the_first_updates():
    rows = [{"step": n, "tokens_seen": 100 * n, "speed/step_seconds": 2.0, "rollout/seconds": 1.5} for n in range(1, 9)]
    rows[0]["speed/step_seconds"], rows[-1]["speed/step_seconds"] = 90.0, 0.25  # no rollout follows the last
    found = {record["op"]: record["value"] for record in gsm8k.speeds("grpo", [{"step": 0}, *rows])}
    assert found == {"step, rollout included": 2.0, "rollout": 1.5, "training": 400.0}
    assert gsm8k.speeds("grpo", rows[:3]) == []


@pytest.mark.slow
def test_all_stages_run_are_measured_and_are_not_run_again(tmp_path, monkeypatch):
    for module in (pretrain, sft, grpo):
        monkeypatch.setattr(module, "make_mesh", lambda layout: make_mesh(layout, jax.devices()[:1]))
    monkeypatch.setattr(gsm8k, "MOST_NEW_TOKENS", 160)  # with a question longer than a row of GRPO
    monkeypatch.setattr(opening, "compile_batch", lambda batch, silent: None)  # only what is used is compiled
    path, told = write_problems(tmp_path / "gsm8k.jsonl"), []
    runs = tmp_path / "runs"
    assert gsm8k.run(small, path, runs, SIZES, told.append) is None
    assert [text.partition(",")[0] for text in told] == list(gsm8k.STAGES)
    records = gsm8k.records_of(runs)
    shares = {record["op"]: record for record in records if record["unit"] == "share"}
    assert len(shares) == 7 * 5
    assert all(0 <= r["low"] <= r["value"] + 1e-12 and r["value"] <= r["high"] <= 1 for r in shares.values())
    assert shares["gsm8k, behind base"]["shape"] == {"problems": 6}
    results = json.loads((runs / gsm8k.RESULTS / "base.json").read_text())
    (asked, greedy), (again, drawn) = results["task"]["shown"][0], results["task, drawn"]["shown"][0]
    assert asked == again and greedy != drawn
    speeds = {(record["mode"], record["op"]): record["value"] for record in records if record["unit"] != "share"}
    assert speeds["grpo", "sampling"] > 0 and speeds["sft", "training"] > 0
    assert speeds["control", "sampling"] > 0
    first = [next(row for row in read_rows(runs / stage) if row["step"] == 1) for stage in ("grpo", "control")]
    assert first[0]["rollout/length"] == first[1]["rollout/length"]  # the same prompts, seeds and weights
    assert 0 < first[1]["rollout/reward"] < 1 and "rollout/accuracy" in first[1]
    assert speeds["grpo", "sampler's and trainer's log-probabilities, mean difference"] < 1e-5
    assert gsm8k.run(small, path, runs, SIZES, told.append) is None and len(told) == 7
    gsm8k.draw(runs).savefig(tmp_path / "drawing.png")
    assert (tmp_path / "drawing.png").stat().st_size > 1000
