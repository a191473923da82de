"""GRPO's settings and problems, what is refused before anything is written, and a whole run that is killed."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import tiny_grpo
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import grpo
from deepseek_jax.posttraining.conversations import PLAIN
from deepseek_jax.posttraining.grpo import train_grpo, with_steps
from deepseek_jax.posttraining.policy_metrics import POLICY_KEYS
from deepseek_jax.posttraining.problems import find_problems, open_problems, read_problems, split
from deepseek_jax.posttraining.rewards.problem import Case
from deepseek_jax.posttraining.settings import check_claimed, claim, read
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.origin import read_origin
from deepseek_jax.training.workdir import claim_workdir
from tests.posttraining import test_sft
from tests.posttraining.test_sft import one_device, save_run
from tests.support.failing_rewards import varied

TOKENIZER = byte_tokenizer()
OPEN_ENGINE = grpo.open_engine  # others share one
GRPO = {
    "variant": "grpo",
    "overrides": {},
    "template": "plain",
    "problems": "sort_digits:2-3",
    "num_problems": 20,
    "heldout": 4,
    "rewards": {"text": 1.0},
    "accuracy": "text",
    "on_failure": "stop",
    "reward_seconds": 30.0,
    "reward_workers": 1,
    "group_size": 4,
    "updates": 2,
    "steps": 4,
    "max_new_tokens": 8,
    "rows": 8,
}


def settings(initial="W", **changes):
    """The nano model's reinforcement learning; a key is one of the section, or another's with two underlines."""
    tree = test_sft.settings(initial=initial)
    tree.data.sequence_length = 48
    tree.optimizer.learning_rate = (("constant", 1.0, 1e-3),)
    tree.training.update({"checkpoint_every": 1, "log_every": 1})
    own = {key: value for key, value in changes.items() if "__" not in key}
    tree.posttraining = {"stage": "grpo", "grpo": GRPO | own}
    for path, value in changes.items():
        if "__" in path:
            section, key = path.split("__")
            tree[section][key] = value
    return tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size = 1 must be at least 2: an output is compared"),
        ({"group_size": 3}, "group_size = 3 does not divide the 16 samples of a rollout"),
        ({"variant": "ppo"}, "variant = 'ppo' is unknown; choose one of"),
        ({"overrides": {"clip": 0.2}}, "overrides.clip = 0.2 is a float; it must be a str"),
        ({"overrides": {"clip_hi": 0.2}}, "clip_hi"),
        ({"overrides": {"clip_low": 0.0}}, "overrides.clip_low = 0.0 must be above 0"),
        ({"problems": "sorting:2-3"}, "problems = 'sorting:2-3' is no task; write one of"),
        ({"problems": "sort_digits"}, "is no task; .*for example 'sort_digits:4-6'"),
        ({"problems": "sort_digits:3-2"}, "3 to 2 digits"),
        ({"problems": "a.jsonl"}, "num_problems = 20 is for tasks"),
        ({"rewards": {"nice": 1.0}}, "rewards = {'nice': 1.0}: name each with its weight, of"),
        ({"rewards": {}}, "rewards = {}: name each"),
        ({"rewards": {"text": float("nan")}}, "rewards.text = nan must be a finite number"),
        ({"rewards": {"text": 0.0}}, "all weights are 0"),
        ({"accuracy": "format"}, "accuracy = 'format' must be one of the rewards"),
        ({"on_failure": "retry"}, "on_failure = 'retry' is unknown"),
        ({"max_new_tokens": 48}, "max_new_tokens = 48 leaves no room for a prompt"),
        (
            {"variant": "dapo"},
            "grpo.max_new_tokens = 8 and .*grpo.overrides: overlong_buffer = 4096 is more than the 8",
        ),
        ({"problems": "sort_digits:6-4"}, "grpo.problems = 'sort_digits:6-4': 6 to 4 digits"),
        ({"steps": 0}, "steps = 0 must be at least 1"),
        ({"reward_seconds": 0.0}, "reward_seconds = 0.0 must be positive"),
        ({"initial": ""}, "post-training begins with weights: give --initial"),
        ({"optimizer__weight_decay": 0.1}, "weight_decay = 0.1 would shrink MTP layers"),
        ({"training__batch_size": (("constant", 0.5, 8), ("constant", 1.0, 16))}, "must be one number"),
        ({"group_sizes": 2}, "group_sizes"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0 and finite: greedy outputs"),
        ({"top_k": -1}, "top_k = -1 must be at least 0"),
        ({"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"arithmetic": "slow"}, "arithmetic = 'slow' is unknown; choose one of"),
        ({"arithmetic": "exact", "top_p": 0.9}, "top_p = 0.9 does not go with .*set it to 1.0, or use 'fast'"),
        ({"arithmetic": "exact", "staleness": 1}, "staleness = 1 does not go with"),
        (
            {"arithmetic": "exact", "execution__precision": "bf16"},
            "needs execution.precision = 'fp32', and it is 'bf16'",
        ),
        ({"replay_routes": True, "execution__interleave": 2}, "interleave = 2: routes are replayed"),
        ({"staleness": -1}, "staleness = -1 must be at least 0"),
        ({"staleness": 4, "steps": 6, "updates": 3}, "staleness = 4, and the last rollout of 6 steps .* at most 3, or"),
        ({"rows": 17}, "rows = 17 is more than there is to draw at once: a rollout has 16 samples .* lower it to 16"),
        ({"rows": 41, "heldout": 40}, "and 40 problems are held out; lower it to 40"),
        (
            {"reference_every": 2, "overrides": {"kl_weight": 0.0}},
            "reference_every = 2 replaces a reference that is not there",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(settings(**changes))


def test_the_config_file_is_valid_and_overrides_are_those_of_the_variant():
    config, posttraining = read(tiny_grpo.get_config(), "W")
    assert posttraining.grpo.choices.kl_weight == 0.0 and posttraining.grpo.choices.clip_high == 0.2
    assert {end for _, _, end in config.optimizer.bias_update_rate} == {0.0}  # frozen
    assert with_steps(config, posttraining.grpo).training.num_tokens == posttraining.grpo.steps * 64 * 128


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    config, posttraining = read(settings())
    claim(tmp_path, posttraining)
    claim_workdir(tmp_path, config)
    section = json.loads((tmp_path / "posttraining.json").read_text())
    del section["grpo"]["staleness"]
    (tmp_path / "posttraining.json").write_text(json.dumps(section))
    check_claimed(tmp_path, posttraining)
    with pytest.raises(ValueError, match="posttraining.grpo.staleness: 0 in the workdir, 1 given"):
        check_claimed(tmp_path, read(settings(staleness=1))[1])
    other = dataclasses.replace(posttraining, stage="sft", grpo=None)
    with pytest.raises(ValueError, match="holds a run of the stage 'grpo', and this is one of 'sft'; choose another"):
        check_claimed(tmp_path, other)


def test_a_file_of_problems_may_move_and_a_task_stays(tmp_path):
    of_file = {"problems": "a.jsonl", "num_problems": 0}
    config, posttraining = read(settings(**of_file))
    claim(tmp_path, posttraining)
    claim_workdir(tmp_path, config)
    check_claimed(tmp_path, read(settings(**of_file | {"problems": "moved/a.jsonl"}))[1])
    with pytest.raises(
        ValueError, match="posttraining.grpo.problems: 'a.jsonl' in the workdir, 'sort_digits:2-3' given"
    ):
        check_claimed(tmp_path, read(settings(problems="sort_digits:2-3"))[1])


def test_training_and_heldout_problems_are_disjoint_and_fit():
    config, posttraining = read(settings())
    problems = open_problems(config, posttraining.grpo, PLAIN, TOKENIZER)
    asked = [{tuple(p.ids) for p in part} for part in problems]
    assert not asked[0] & asked[1] and [len(part) for part in problems] == [20, 4]
    assert TOKENIZER.decode(problems.train[0].ids).endswith("Assistant:\n")
    config, posttraining = read(settings(max_new_tokens=30))
    with pytest.raises(ValueError, match="max_new_tokens = 30 does not fit data.sequence_length = 48"):
        open_problems(config, posttraining.grpo, PLAIN, TOKENIZER)


def test_problems_of_a_file_are_split_by_their_text(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"question": f"q{i}", "answer": str(i)} for i in range(9)]
    lines.append({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "answer": "9"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = read_problems(path)
    train, heldout = split(problems, 3)
    assert len(train) == 7 and {p.answer for p in train} | {p.answer for p in heldout} == set("0123456789")
    assert {p.answer for p in split(problems[::-1], 3)[1]} == {p.answer for p in heldout}  # whatever the order
    with pytest.raises(ValueError, match="heldout = 10 of 10 problems leaves none"):
        split(problems, 10)


def test_a_file_of_problems_has_what_each_reward_reads(tmp_path):
    path = tmp_path / "p.jsonl"
    tests = {"function": "f", "cases": [{"arguments": [2, "a"], "expected": [3]}], "script": "f(2)"}

    def found(reward, **more):
        path.write_text("".join(json.dumps({"question": f"q{i}"} | more) + "\n" for i in range(3)))
        settled = settings(problems=str(path), num_problems=0, heldout=1, rewards={reward: 1.0}, accuracy=reward)
        config, posttraining = read(settled)
        return open_problems(config, posttraining.grpo, PLAIN, TOKENIZER)

    problems = found("code", tests=tests)
    read_tests = problems.train[0].problem.tests
    assert (read_tests.function, read_tests.cases, read_tests.script) == ("f", (Case((2, "a"), [3]),), "f(2)")
    assert problems.fingerprint != found("code", tests=tests | {"script": "f(3)"}).fingerprint
    assert found("language", answer="a", language="en").train[0].problem.language == "en"
    for reward, more in (
        ("code", {"answer": "a"}),
        ("language", {"answer": "a"}),
        ("language", {"answer": "a", "language": "xx"}),
        ("text", {"answer": " "}),
        ("mathematics", {"tests": tests}),
    ):
        with pytest.raises(ValueError, match=f"the reward '{reward}' reads .* and problem 'q"):
            found(reward, **more)


@pytest.mark.parametrize("reward", ["mathematics", "gsm8k"])
@pytest.mark.parametrize(
    ("answer", "message"),
    [("so \\boxed{18}", "write what is in it"), ("9 * 2 = 18\n####", "behind its last"), ("1" * 501, "more than 500")],
)
def test_an_answer_that_no_completion_can_equal_is_refused(tmp_path, reward, answer, message):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": answer}) + "\n" for i in range(3)))
    grpo = dataclasses.replace(
        read(settings())[1].grpo, problems=str(path), heldout=1, rewards={reward: 1.0}, accuracy=reward
    )
    with pytest.raises(ValueError, match=f"problem 'q.' of .* can never be met by the reward '{reward}': .*{message}"):
        find_problems(0, grpo)


COOK = {"role": "cook", "content": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"question": "b"}', 'line 2 has no text "answer"'),
        ('{"question": "b", "answer": 3}', 'line 2 has no text "answer"'),
        ('{"question": "b", "messages": [], "answer": "3"}', "line 2 must be an object with"),
        ('{"question": "b", "anwser": "3"}', "line 2 must be an object with"),
        ('{"messages": [{"role": "assistant", "content": "b"}], "answer": "3"}', "the last is the user's"),
        ('{"question": "", "answer": "3"}', "line 2: messages are objects"),
        ('{"question": "a", "answer": "3"}', "line 2 asks what an earlier line asks"),
        ('{"question": "b", "answer": "3", "language": 1}', '"language" must be a text'),
        (json.dumps({"messages": [COOK, {"role": "user", "content": "c"}], "answer": "3"}), "line 2: messages.0. has"),
        ('{"question": "b", "tests": {"function": "f", "cases": [3]}}', 'line 2: "tests" = .* must be'),
        ('{"question": "b", "tests": {"function": "f"}}', "line 2: the tests of f have neither cases nor a script"),
    ],
)
def test_a_bad_line_of_problems_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_problems(path)


@pytest.mark.parametrize(
    ("num_devices", "more_ids", "message"),
    [
        (8, 0, "exact arithmetic is for .* on one CPU device, and this is 'fp32' on 8 of 'cpu'"),
        (1, 1, "model.vocab_size = .*: the sampler's softmax is over the"),
    ],
)
def test_exact_arithmetic_is_refused_before_weights_are_read(tmp_path, monkeypatch, num_devices, more_ids, message):
    config, posttraining = read(settings(arithmetic="exact"))
    config = config.with_(model={"vocab_size": TOKENIZER.vocab_size + more_ids})
    monkeypatch.setattr(grpo, "checked", lambda config, *_: config)
    monkeypatch.setattr(grpo, "tokenizer_and_template", lambda *_: (TOKENIZER, None))
    monkeypatch.setattr(grpo, "open_problems", lambda *_: pytest.fail("went on"))
    mesh = jax.make_mesh((num_devices,), ("data",), devices=jax.devices()[:num_devices])
    with pytest.raises((ValueError, NotImplementedError), match=message):
        train_grpo(config, posttraining, tmp_path / "run", mesh)


@pytest.mark.slow
def test_in_exact_arithmetic_the_trainer_has_the_samplers_numbers(tmp_path, monkeypatch):
    """Of each rollout: the first update's ratios are 1 to the last bit, and the second's are of other weights."""
    monkeypatch.setattr(grpo, "open_engine", OPEN_ENGINE)
    monkeypatch.setattr(grpo, "rewards_by_name", lambda names: dict.fromkeys(names, varied))
    tree = test_sft.settings()
    tree.data.sequence_length = 48
    tree.training.initial_weights = ""
    del tree["posttraining"]
    save_run(from_config_dict(tree), tmp_path / "base")
    changes = {"arithmetic": "exact", "overrides": {"kl_weight": 0.0}}
    config, posttraining = read(settings(tmp_path / "base", **changes))
    assert train_grpo(config, posttraining, tmp_path / "run", one_device(config)).step == 4
    rows = [row for row in read_rows(tmp_path / "run") if "policy/loss" in row]
    for row in rows:
        assert row["rollout/sampler_difference_max"] == 0.0 and row["rollout/route_flips"] == 0.0
    for row in rows[::2]:
        assert row["policy/ratio_mean"] == 1.0 and row["policy/ratio_std"] == row["policy/old_kl"] == 0.0
    for row in rows[1::2]:
        assert row["policy/ratio_std"] > 1e-6


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """(folder with the weights in `base`, one device): all runs share an engine, and take their weights into it."""
    folder, engines, open_engine = tmp_path_factory.mktemp("loop"), [], grpo.open_engine

    def open_once(*arguments):
        if not engines:
            engines.append(opened.enter_context(open_engine(*arguments)))
        return contextlib.nullcontext(engines[0])

    tree = test_sft.settings()
    tree.data.sequence_length, tree.training.initial_weights = 48, ""
    del tree["posttraining"]
    config = from_config_dict(tree)
    save_run(config, folder / "base")
    with contextlib.ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rewards_by_name", lambda names: dict.fromkeys(names, varied))
        patch.setattr(grpo, "open_engine", open_once)
        yield folder, one_device(config)


def go_back(workdir, steps):
    """Leave a run as if it had been killed before these checkpoints."""
    shutil.rmtree(workdir / "tensorboard")
    for step in steps:
        shutil.rmtree(workdir / "checkpoints" / str(step))


def assert_same_weights(*results):
    for a, b in zip(*(jax.tree.leaves(r.state["params"]) for r in results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.xdist_group("grpo_loop")
def test_a_killed_run_ends_where_the_uninterrupted_one_does_with_frozen_biases(loop):
    """The whole loop: a model, an engine, rewards in a process, two updates of each of two rollouts."""
    folder, mesh = loop
    config, posttraining = read(settings(folder / "base", top_p=0.9, replay_routes=True))
    result = train_grpo(config, posttraining, folder / "run", mesh)
    assert result.step == 4
    rows = [row for row in read_rows(folder / "run") if "policy/loss" in row]
    assert [row["rollout/first_prompt"] for row in rows] == [0, 0, 4, 4]
    assert rows[0].keys() <= POLICY_KEYS.keys() and rows[0]["rollout/reward_std"] > 0
    assert max(row["rollout/sampler_difference_max"] for row in rows) < 1e-5
    for row in rows[::2]:  # the policy is the one that sampled, and in the first update the reference, too
        assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6) and abs(row["policy/old_kl"]) < 1e-6
    assert abs(rows[1]["policy/old_kl"]) > 1e-6 and rows[0]["policy/kl"] < 1e-9 < rows[3]["policy/kl"]
    with jax.set_mesh(mesh):
        before = read_origin(config, mesh).weights
    biases = [jax.tree.leaves(jax.device_get(x)) for x in (before.router_bias, result.state["router_bias"])]
    assert [leaf.tobytes() for leaf in biases[0]] == [leaf.tobytes() for leaf in biases[1]] and np.any(biases[0][0])
    assert not np.array_equal(before.params["head_DV"], result.state["params"]["head_DV"])
    go_back(folder / "run", (2, 3, 4))  # the first is in the middle of a rollout
    assert_same_weights(result, train_grpo(config, posttraining, folder / "run", mesh))
    with pytest.raises(ValueError, match="posttraining.grpo.group_size: 4 in the workdir, 8 given"):
        train_grpo(*read(settings(folder / "base", group_size=8)), folder / "run", mesh)
    (folder / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        other = settings(folder / "base", problems=str(folder / "bad.jsonl"), num_problems=0)
        train_grpo(*read(other), folder / "never", mesh)
    assert not (folder / "never").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("grpo_loop")
def test_rollouts_beside_training_are_reproducible(loop):
    """With a staleness of 1, by the real engine in its thread: a killed run ends with the same bits."""
    folder, mesh = loop
    options = {"updates": 1, "staleness": 1, "reference_every": 3, "steps": 6}
    config, posttraining = read(settings(folder / "base", **options))
    result = train_grpo(config, posttraining, folder / "beside", mesh)
    rows = [row for row in read_rows(folder / "beside") if "policy/loss" in row]
    assert [row["rollout/version"] for row in rows] == [0, 0, 1, 2, 3, 4]
    assert max(row["rollout/sampler_difference_max"] for row in rows) < 1e-5  # each by its own weights
    assert rows[0]["policy/ratio_std"] < 1e-6 < 1e-4 < min(row["policy/ratio_std"] for row in rows[1:])
    go_back(folder / "beside", (3, 4, 5, 6))
    assert_same_weights(result, train_grpo(config, posttraining, folder / "beside", mesh))


@pytest.mark.slow
@pytest.mark.xdist_group("grpo_loop")
def test_a_run_on_two_devices_is_that_of_one(loop, monkeypatch):
    """From the same weights: the same samples and the same updates, up to the order of sums."""
    folder, mesh = loop
    results = []
    for axes in ({"data": 1}, {"data": 1, "expert": 2}):
        tree = settings(folder / "base", updates=1, steps=2)
        tree.mesh.update(axes)
        config, posttraining = read(tree)
        if len(axes) > 1:
            mesh = make_mesh(config.mesh, jax.devices()[:2])
            monkeypatch.setattr(grpo, "open_engine", OPEN_ENGINE)
        workdir = folder / f"of_{mesh.size}"
        result = train_grpo(config, posttraining, workdir, mesh)
        rows = [row for row in read_rows(workdir) if "policy/loss" in row]
        results.append((rows, jax.tree.leaves(jax.device_get(result.state["params"]))))
    for row, other in zip(results[1][0], results[0][0], strict=True):
        for key in ("rollout/reward", "rollout/length", "policy/tokens", "rollout/first_prompt"):
            assert row[key] == other[key], key  # the samples are the same ones
        for key in ("policy/entropy", "optimizer/grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), key
        assert row["rollout/sampler_difference_max"] < 1e-5
    for a, b in zip(results[1][1], results[0][1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
