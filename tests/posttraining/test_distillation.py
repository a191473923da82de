"""On-policy distillation: what is refused, and whole runs of a student that learns, is killed, and continues."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import tiny_distillation
from deepseek_jax.config import from_config_dict
from deepseek_jax.posttraining import distillation
from deepseek_jax.posttraining.conversations import PLAIN
from deepseek_jax.posttraining.distillation import train_distillation
from deepseek_jax.posttraining.distillation_settings import check_same_tokens, find_teacher, own_names
from deepseek_jax.posttraining.problems import find_problems, open_problems
from deepseek_jax.posttraining.scoring import refuse_mesh
from deepseek_jax.posttraining.settings import read
from deepseek_jax.posttraining.student_answers import DISTILLATION_KEYS, Answers
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.workdir import claim_workdir
from tests.posttraining import test_grpo, test_sft
from tests.posttraining.test_sft import TOKENIZER, one_device, save_run

OWN = {
    key: test_grpo.GRPO[key] for key in ("template", "problems", "num_problems", "heldout", "accuracy", "group_size")
}
OWN |= {"steps": 4, "max_new_tokens": 8, "rows": 8}
NO_MTP = {"num_mtp_layers": 0}
STUDENT = {"width": 16, "num_layers": 2}


def settings(initial="W", teacher="T", **changes):
    """The nano model's distillation; a key is one of the section, or another's with two underlines."""
    tree = test_grpo.settings(initial)
    tree.posttraining = {"stage": "distillation", "distillation": OWN | {"teacher": str(teacher)}}
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (tree[section] if section else tree.posttraining.distillation)[key] = value
    return tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ""}, "distillation.teacher is empty; name a run's workdir"),
        ({"teacher": "state:runs/a@3"}, "leave 'state:' out"),
        (
            {"group_size": 3},
            "posttraining.distillation.group_size = 3 does not divide the 8 samples of a rollout: training.batch",
        ),
        ({"steps": 0}, "posttraining.distillation.steps = 0 must be at least 1"),
        ({"problems": "sorting:2-3"}, "posttraining.distillation.problems = 'sorting:2-3' is no task"),
        ({"accuracy": "nice"}, "posttraining.distillation.accuracy = 'nice' is unknown; choose one of"),
        ({"temperature": 0.5}, "temperature"),
        ({"optimizer__weight_decay": 0.1}, "would shrink MTP layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(settings(**changes))


def test_what_is_wrong_with_problems_a_mesh_or_a_position_is_told_in_this_stages_words():
    config, posttraining = read(settings(max_new_tokens=30))
    grpo = posttraining.distillation.rollouts
    with (
        pytest.raises(ValueError, match="with config.posttraining.distillation.max_new_tokens = 30 does not"),
        own_names(),
    ):
        open_problems(config, grpo, PLAIN, TOKENIZER)
    with pytest.raises(ValueError, match="mesh.tensor = 2: distillation needs 1"):
        refuse_mesh(SimpleNamespace(shape={"tensor": 2}), "distillation")
    problems = open_problems(config, read(settings())[1].distillation.rollouts, PLAIN, TOKENIZER)
    answers = Answers(grpo, problems, None, 48, 0, "teacher")
    with pytest.raises(ValueError, match="teacher has changed since its checkpoint; .* name the step: 'workdir@step'"):
        answers.restore(answers.state() | {"teacher": "other"})
    with pytest.raises(ValueError, match="the run's problems have changed since"):
        answers.restore(answers.state() | {"problems": "other"})


def test_only_heldout_problems_have_answers_that_can_be_judged(tmp_path):
    path, lines = tmp_path / "p.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(8)]
    path.write_text("".join(map("{}\n".format, map(json.dumps, lines))))
    rollouts = read(settings(problems=str(path), num_problems=0))[1].distillation.rollouts
    train, heldout = ({problem.name for problem in part} for part in find_problems(0, rollouts))
    for unanswered, fails in ((train, False), (heldout, True)):
        written = [line | {"answer": " "} if line["question"] in unanswered else line for line in lines]
        path.write_text("".join(map("{}\n".format, map(json.dumps, written))))
        with pytest.raises(ValueError, match="the reward 'text' reads") if fails else contextlib.nullcontext():
            find_problems(0, rollouts)


def test_the_config_file_needs_a_teacher_alone():
    tree = tiny_distillation.get_config()
    with pytest.raises(ValueError, match="distillation.teacher is empty"):
        read(tree, "W")
    tree.posttraining.distillation.teacher = "T"
    assert read(tree, "W")[1].stage == "distillation"


def base_config(**model):
    tree = test_sft.settings()
    tree.data.sequence_length = 48
    tree.training.initial_weights = ""
    tree.model.update(model)
    del tree["posttraining"]
    return from_config_dict(tree)


def test_a_teacher_that_is_not_there_or_does_not_fit_is_named(tmp_path):
    config, posttraining = read(settings(teacher=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"the teacher: config.posttraining.distillation.teacher = .*none' does not"):
        find_teacher(posttraining.distillation, config)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3}))
    with pytest.raises(ValueError, match="the teacher: "):
        find_teacher(read(settings(teacher=folder))[1].distillation, config)
    workdir = tmp_path / "larger"
    workdir.mkdir()
    TOKENIZER.save(workdir / "tokenizer.json")
    claim_workdir(workdir, base_config(vocab_size=300))
    with pytest.raises(ValueError, match="has model.vocab_size = 300, and the student 262: .*fine-tune it"):
        find_teacher(read(settings(teacher=workdir))[1].distillation, config)


def test_ids_must_stand_for_the_same_texts():
    settings_ = read(settings())[1].distillation
    ours = {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "truncation": None})}
    theirs = {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 1, "b": 0}}})}
    check_same_tokens(settings_, ours, {"tokenizer.json": json.dumps({"model": {"vocab": {"b": 1, "a": 0}}})})
    with pytest.raises(ValueError, match="another tokenizer than the student \\('model' of tokenizer.json differs"):
        check_same_tokens(settings_, theirs, ours)


@pytest.mark.slow
def test_a_killed_run_ends_where_the_uninterrupted_one_does_and_comes_nearer_to_its_teacher(tmp_path, monkeypatch):
    """The whole loop: a teacher, a smaller student, an engine, and an update of each batch of answers."""
    engines, open_engine = [], distillation.open_engine

    def open_once(*arguments):  # both runs give it their weights at each batch
        engines.append(engines[0] if engines else open_engine(*arguments))
        return contextlib.nullcontext(engines[0])

    monkeypatch.setattr(distillation, "open_engine", open_once)
    save_run(base_config(**NO_MTP), tmp_path / "teacher")
    save_run(base_config(**NO_MTP, **STUDENT), tmp_path / "base")

    def run(workdir, teacher="teacher"):
        own = {f"model__{key}": value for key, value in (NO_MTP | STUDENT).items()}
        own |= {"optimizer__learning_rate": (("constant", 1.0, 1e-2),), "optimizer__warmup_steps": 1}
        own |= {"training__micro_batch_size": 4}
        config, posttraining = read(settings(tmp_path / "base", tmp_path / teacher, **own))
        return train_distillation(config, posttraining, tmp_path / workdir, one_device(config))

    result = run("run")
    rows = [row for row in read_rows(tmp_path / "run") if "distillation/loss" in row]
    assert [row["rollout/first_prompt"] for row in rows] == [0, 2, 4, 6]
    assert rows[0].keys() <= DISTILLATION_KEYS.keys() and rows[0]["distillation/tokens"] > 16
    losses = [row["distillation/loss"] for row in rows]
    assert losses[-1] < losses[0] and min(losses) > 0.0
    assert abs(rows[0]["distillation/sampled_kl"] - losses[0]) < 1.0
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    again = run("run")
    for a, b in zip(*(jax.tree.leaves(r.state["params"]) for r in (result, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    save_run(base_config(**NO_MTP, init_std=0.05), tmp_path / "another")
    with pytest.raises(ValueError, match="the run's teacher has changed since its checkpoint"):
        run("run", "another")
    with pytest.raises(ValueError, match="does not exist"):
        run("never", "nowhere")
    assert not (tmp_path / "never").exists()
    engines[0].close()
