"""Reward models: the loss of pairs against FP64, files of pairs, scores that fail, and a model that learns."""

import dataclasses
import json
import math
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_reward_model
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.model.balance import RouterStats
from deepseek_jax.model.transformer import Output
from deepseek_jax.posttraining import model_rewards
from deepseek_jax.posttraining.conversations import PLAIN
from deepseek_jax.posttraining.model_rewards import ModelRewards, open_model_rewards
from deepseek_jax.posttraining.preferences import PairBatches, heldout_row, read_pairs, with_length
from deepseek_jax.posttraining.problems import Problems, Prompt
from deepseek_jax.posttraining.reward_model import PairNormalisers, answers_batch, pair_terms, preferences
from deepseek_jax.posttraining.reward_model_training import REWARD_MODEL_KEYS, train_reward_model
from deepseek_jax.posttraining.rewards.pool import RewardError
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.settings import claim, read
from deepseek_jax.training.checkpoint import Progress
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.workdir import claim_workdir
from tests.posttraining import test_grpo, test_sft
from tests.posttraining.test_sft import TOKENIZER, one_device, save_run
from tests.support import small
from tests.support.patience import SECONDS

OWN = {"template": "plain", "pairs": "pairs.jsonl", "heldout": 4, "epochs": 2.0}


def settings(initial="W", **changes):
    """The nano model's training of a reward model; a key is one of the section, or another's with two underlines."""
    tree = test_grpo.settings(initial)
    tree.training.update({"eval_every": 0})
    tree.posttraining = {"stage": "reward_model", "reward_model": dict(OWN)}
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (tree[section] if section else tree.posttraining.reward_model)[key] = value
    return tree


def test_the_config_file_is_valid():
    assert read(tiny_reward_model.get_config(), "W")[1].reward_model.epochs == 1.0


def write_pairs(path, count=24):
    """Pairs of which the longer answer is preferred."""
    lines = [{"question": f"q{i}", "chosen": "ab" * 6, "rejected": "ab"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_loss_and_gradient_are_those_of_bradley_and_terry():
    rng = np.random.default_rng(0)
    hidden, head = np.float32(rng.normal(size=(6, 5, 4))), np.float32(rng.normal(size=(4, 7)))
    batch = answers_batch([[1] * n for n in (2, 5, 3, 1)] + [[], []], 5, 0)
    config = small.config()
    objective = preferences(config.model, config.loss, 2)

    def loss(hidden, head):
        terms = objective.terms(Output(hidden, (), None), head, batch)
        return objective.total(terms, None, objective.normalisers(batch), None), terms

    def restated(hidden, head):
        scores = [
            hidden[i, n - 1].astype(np.float64) @ head[:, 2].astype(np.float64) for i, n in enumerate((2, 5, 3, 1))
        ]
        return -sum(math.log(1.0 / (1.0 + math.exp(scores[j + 1] - scores[j]))) for j in (0, 2)) / 2, scores

    ours = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, terms), gradients = ours(hidden, head)
    want, scores = restated(hidden, head)
    assert float(value) == pytest.approx(want, rel=1e-6)
    assert float(terms.right) == sum(scores[j] > scores[j + 1] for j in (0, 2)) == 1.0
    for which, gradient in enumerate(gradients):
        numbers = np.zeros(gradient.shape)
        for at in np.ndindex(*numbers.shape):
            ends = []
            for side in (1e-6, -1e-6):
                arrays = [hidden.astype(np.float64), head.astype(np.float64)]
                arrays[which][at] += side
                ends.append(restated(*arrays)[0])
            numbers[at] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient, numbers, atol=2e-6 * np.abs(numbers).max())
        assert np.abs(numbers).max() > 0.05
    assert not np.any(np.delete(gradients[1], 2, axis=1))  # the other columns of the head stay
    far = pair_terms(np.float32([-500.0, 500.0]), np.ones((2, 1)))
    assert float(far.loss) == 1000.0 and float(pair_terms(np.float32([500.0, -500.0]), np.ones((2, 1))).loss) == 0.0
    with pytest.raises(ValueError, match="a device has 3 rows of a micro-batch, and pairs take two"):
        pair_terms(np.zeros(3), np.ones((3, 1)))


def test_what_is_reported_are_means_over_pairs_and_the_size_of_a_score():
    """Of the scores 3 and 1, and 0 and 4: one pair of two is in order."""
    scores_B = np.float32([3.0, 1.0, 0.0, 4.0])
    config, norms = small.config(), PairNormalisers(jnp.int32(2), jnp.int32(4))
    router = RouterStats(jnp.ones((1, 4), jnp.int32), jnp.zeros(1), jnp.zeros(1))
    objective = preferences(config.model, config.loss, 2)
    found = objective.metrics(pair_terms(scores_B, np.ones((4, 1))), router, norms)
    loss = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(4.0))) / 2
    want = {"loss": loss, "accuracy": 0.5, "margin": -1.0, "pairs": 2, "score_rms": math.sqrt(26 / 4)}
    assert {name: float(found[name]) for name in want} == pytest.approx(want)
    row = heldout_row(lambda answers: scores_B, SimpleNamespace(heldout=[([1], [2]), ([3], [4])]))
    want = {"eval/pair_loss": loss, "eval/pair_accuracy": 0.5, "eval/margin": -1.0, "eval/pairs": 2}
    assert row == pytest.approx(want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "pairs.csv"}, "pairs = 'pairs.csv' must name a .jsonl file"),
        ({"heldout": 0}, "heldout = 0 must be at least 1"),
        ({"epochs": 0.0}, "epochs = 0.0 must be a positive number"),
        ({"training__micro_batch_size": 1, "training__batch_size": (("constant", 1.0, 7),)}, "must be one even number"),
        ({"optimizer__weight_decay": 0.1}, "would shrink all columns of the head but one"),
        ({"optimizer__weight_decay": 0.1, "model__num_mtp_layers": 0}, "columns of the head"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(settings(**changes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"question": "b", "chosen": "x"}', "line 2 must be an object with"),
        ('{"question": "b", "chosen": "x", "rejected": "x"}', "line 2: both answers are the same"),
        ('{"question": "b", "chosen": "x", "rejected": ""}', "line 2: .* texts, and none is empty"),
        ('{"messages": [], "chosen": "x", "rejected": "y"}', "line 2: messages are a list"),
        ('{"messages": [{"role": "system", "content": "b"}], "chosen": "x", "rejected": "y"}', "'system', and must be"),
        ('{"question": "b", "chosen": "x", "rejected": "%s"}' % ("y" * 99), "line 2 has .* tokens, and data.sequence"),
    ],
)
def test_a_bad_line_of_pairs_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "chosen": "1", "rejected": "2"}\n' + line + "\n")
    own = read(settings(pairs=str(path)))[1].reward_model
    with pytest.raises(ValueError, match=message):
        read_pairs(own, 48, PLAIN, TOKENIZER)


def test_pairs_of_a_prompt_are_on_one_side_and_a_position_continues(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"question": f"q{i % 6}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, posttraining = read(settings(pairs=str(path)))
    pairs = read_pairs(posttraining.reward_model, 48, PLAIN, TOKENIZER)
    assert [len(part) for part in pairs] == [8, 16]
    asked = [{TOKENIZER.decode(ids).split("\n")[1] for pair in part for ids in pair} for part in pairs]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 6
    assert with_length(config, posttraining.reward_model, pairs).training.num_tokens == 2 * 8 * 2 * 48
    whole, other = (PairBatches(pairs, 48, 0, 5) for _ in range(2))
    first = [whole.next_batch(8) for _ in range(3)]
    other.next_batch(8)
    again = PairBatches(pairs, 48, 0, 5)
    again.restore(json.loads(json.dumps(other.state())))
    for batch in first[1:]:
        for name, array in again.next_batch(8).items():
            np.testing.assert_array_equal(array, batch[name])
    last = first[0]["last_BS"]
    assert (first[0]["tokens_BS"][last > 0] == TOKENIZER.eos).all() and (last.sum(1) == 1).all()
    with pytest.raises(ValueError, match="the run's pairs, template or tokenizer have changed"):
        again.restore({"pair": 3, "pairs": "other"})


def policy_settings(**changes):
    own = {"rewards": {"text": 1.0, "model": 0.5}, "reward_model": "R"}
    return dataclasses.replace(read(test_grpo.settings(**(own | changes)))[1].grpo, reward_workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": ""}, "the reward 'model' is the score of a reward model; name its workdir"),
        ({"rewards": {"text": 1.0}}, "reward_model = 'R' and rewards = .*; name its workdir, or leave both out"),
        ({"accuracy": "model"}, "accuracy = 'model' must be one of the rewards by rules, .*'text'"),
    ],
)
def test_the_reward_of_a_model_needs_a_model(changes, message):
    with pytest.raises(ValueError, match=message):
        policy_settings(**changes)


def test_a_score_that_fails_or_hangs_stops_or_counts_as_zero():
    problem = Problem("sort 21", ({"role": "user", "content": "sort 21"},), "12")
    texts = ["<think>?</think><answer>12</answer>", "nan", "<think>?</think><answer>21</answer>"]

    back, end = threading.Event(), threading.Event()

    def scores(pairs):
        if any(text == "hang" for _, text in pairs):
            end.wait(10 * SECONDS)
        if any(text == "late" for _, text in pairs):
            back.wait(10 * SECONDS)
        if any(text == "raise" for _, text in pairs):
            raise RuntimeError("out of memory")
        return np.array([math.nan if text == "nan" else 4.0 for _, text in pairs])

    zero = dataclasses.replace(policy_settings(on_failure="zero"), reward_seconds=SECONDS)
    quick = dataclasses.replace(zero, reward_seconds=1.0)
    with ModelRewards(zero, 2, scores) as pool:
        found = pool.score([problem] * 3, texts)
        assert [score.total for score in found] == [3.0, 0.0, 2.0]
        assert [score.parts for score in found][0] == {"text": 1.0, "model": 4.0}
        assert [score.failed for score in found] == [(), ("model",), ()]
        assert [s.failed for s in pool.score([problem] * 3, ["raise", "a", "b"])] == [("model",), ("model",), ()]
    with ModelRewards(quick, 2, scores) as pool:
        assert pool.score([problem], ["late"])[0].failed == ("model",)
        late, join = pool._late, pool._late.join
        late.join = lambda seconds: (
            back.set(),
            join(seconds),
        )  # it returns when it is waited for: the model is asked again
        pool._grpo = zero
        assert pool.score([problem], ["b"])[0].parts["model"] == 4.0
        pool._grpo = quick
        for _ in range(2):  # "zero" does not train on with nothing but zeros
            with pytest.raises(RewardError, match="program has not come back 1.0 s after .* larger .*reward_seconds"):
                pool.score([problem] * 3, ["hang", "a", "b"])
    quick, stop = (dataclasses.replace(settings, on_failure="stop") for settings in (quick, zero))
    with ModelRewards(stop, 2, scores) as pool:
        with pytest.raises(RewardError, match="reward 'model' of problem 'sort 21' returned nan; text: 'nan'"):
            pool.score([problem] * 3, texts)
        with pytest.raises(RewardError, match="raised RuntimeError: out of memory"):
            pool.score([problem], ["raise"])
    with ModelRewards(quick, 2, scores) as pool, pytest.raises(RewardError, match="took longer than 1.0 s for 1 answ"):
        pool.score([problem], ["hang"])
    end.set()


def test_a_reward_model_is_trained_has_room_and_keeps_its_template(tmp_path, monkeypatch):
    """Of a folder as its training leaves it, without the arrays."""
    config, posttraining = read(settings())
    claim(tmp_path, posttraining)
    claim_workdir(tmp_path, config)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "huggingface").mkdir()
    kept = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content }}!{% endfor %}")  # not what "plain" is now
    (tmp_path / "huggingface" / "chat_template.jinja").write_text(kept.source)
    problem = Problem("sort 21", ({"role": "user", "content": "sort 21"},), "12")
    problems, mesh, seen = Problems([Prompt(problem, [])], []), one_device(config), []

    def program(weights, batch):
        seen.append(np.asarray(batch["tokens_BS"]))
        return np.ones(len(seen[-1]), np.float32)

    monkeypatch.setattr(model_rewards, "score_program", lambda *arguments: program)
    monkeypatch.setattr(
        model_rewards, "restore_weights", lambda *arguments: (None, Progress(step=3, tokens_seen=0, data=None))
    )
    grpo = policy_settings(reward_model=str(tmp_path))
    with pytest.raises(ValueError, match="has no checkpoint of a reward model that was trained; let its run train"):
        open_model_rewards(grpo, problems, mesh)  # whose training was killed before its first save
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint of a reward model"):
        open_model_rewards(grpo, problems, mesh)
    (tmp_path / "checkpoints" / "3").mkdir()
    ids = kept.encode(TOKENIZER, problem.messages)
    with pytest.raises(ValueError, match=f"sequence_length = 48 tokens, .* = {48 - len(ids)} needs 49; train one with"):
        open_model_rewards(dataclasses.replace(grpo, max_new_tokens=48 - len(ids)), problems, mesh)
    with open_model_rewards(dataclasses.replace(grpo, max_new_tokens=47 - len(ids)), problems, mesh) as pool:
        pool.score([problem], ["<think>?</think><answer>12</answer>"[:20]])
    assert seen[-1][0, : len(ids)].tolist() == ids


@pytest.mark.slow
def test_a_reward_model_learns_continues_and_scores_answers_of_a_policy(tmp_path):
    tree = test_sft.settings()
    tree.data.sequence_length = 48
    tree.training.initial_weights = ""
    del tree["posttraining"]
    save_run(from_config_dict(tree), tmp_path / "base")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    own = {"optimizer__learning_rate": (("constant", 1.0, 1e-2),), "optimizer__warmup_steps": 1, "pairs": pairs}
    config, posttraining = read(settings(tmp_path / "base", **own))
    mesh = one_device(config)
    result = train_reward_model(config, posttraining, tmp_path / "run", mesh)
    rows = read_rows(tmp_path / "run")
    steps, seen = ([row for row in rows if key in row] for key in ("reward_model/loss", "eval/pair_accuracy"))
    assert len(steps) == 10 and steps[0].keys() <= REWARD_MODEL_KEYS.keys()
    assert steps[-1]["reward_model/loss"] < 0.5 * steps[0]["reward_model/loss"]
    assert seen[-1]["eval/pair_accuracy"] == 1.0 and seen[-1]["eval/pairs"] == 4
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    for step in range(5, 11):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step), ignore_errors=True)
    again = train_reward_model(config, posttraining, tmp_path / "run", mesh)
    for a, b in zip(*(jax.tree.leaves(r.state["params"]) for r in (result, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    problem = Problem("q99", ({"role": "user", "content": "q99"},), "12")
    grpo = policy_settings(reward_model=str(tmp_path / "run"), on_failure="zero")
    with open_model_rewards(grpo, Problems([Prompt(problem, [])], []), mesh) as pool:
        found = pool.score([problem] * 3, ["ab" * 6, "ab", "ab" * 40])
    assert found[0].parts["model"] > found[1].parts["model"] and found[2].failed == ("model",)
    with pytest.raises(ValueError, match="base' holds no reward model; train one"):
        open_model_rewards(policy_settings(reward_model=str(tmp_path / "base")), Problems([], []), mesh)
