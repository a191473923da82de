"""Reinforcement learning of adapters: its gradient, its beginning, its base, and runs that continue."""

import contextlib
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.adapters import Lora, adapt, mark
from deepseek_jax.config import from_config_dict
from deepseek_jax.inputs import read_json
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining import grpo
from deepseek_jax.posttraining.choices import VARIANTS
from deepseek_jax.posttraining.grpo import train_grpo
from deepseek_jax.posttraining.policy_batches import PolicyBatches
from deepseek_jax.posttraining.policy_objective import policy
from deepseek_jax.posttraining.settings import PosttrainingConfig, check_claimed, claim, read
from deepseek_jax.posttraining.sft import train_sft
from deepseek_jax.training.adapted import first_state, merged
from deepseek_jax.training.adapters_file import ADAPTERS, AdaptersFile, claim_adapters
from deepseek_jax.training.metrics import read_rows
from deepseek_jax.training.record import read_sealed
from deepseek_jax.training.step import gradients, recipe_of
from deepseek_jax.training.trainable import find_adapters
from deepseek_jax.training.workdir import claim_workdir
from experiments import recipe
from tests.posttraining import test_sft
from tests.posttraining.test_grpo import assert_same_weights, go_back, settings
from tests.posttraining.test_sft import chat, one_device, save_run
from tests.support import small
from tests.support.drawn_adapters import check_gradients
from tests.support.failing_rewards import varied
from tests.support.grpo_runs import tiny
from tests.training.test_adapted import LORA as ONES
from tests.training.test_adapted import config, moved, weights_on

LORA = {"rank": 2, "alpha": 4.0, "targets": ("attention", "shared", "experts")}


def lora_settings(initial="W", lora=LORA, **changes):
    tree = tiny(settings(initial, **changes))
    tree.posttraining.lora = lora
    return tree


def test_a_run_from_before_adapters_could_begin_elsewhere_goes_on(tmp_path):
    config, posttraining = read(lora_settings())
    claim(tmp_path, posttraining)
    claim_workdir(tmp_path, config)
    section = read_json(tmp_path / "posttraining.json")
    assert section["lora"].pop("initial") == ""
    (tmp_path / "posttraining.json").write_text(json.dumps(section))
    check_claimed(tmp_path, posttraining)
    with pytest.raises(ValueError, match="posttraining.lora.initial: '' in the workdir, 'W@1' given"):
        check_claimed(tmp_path, read(lora_settings(lora=LORA | {"initial": "W@1"}))[1])


def test_adapters_that_a_run_began_with_may_move(tmp_path):
    config, posttraining = read(lora_settings(lora=LORA | {"initial": "W@1"}))
    claim(tmp_path, posttraining)
    claim_workdir(tmp_path, config)
    check_claimed(tmp_path, read(lora_settings(lora=LORA | {"initial": "moved/W@1"}))[1])
    with pytest.raises(ValueError, match="posttraining.lora.initial: 'W@1' in the workdir, '' given"):
        check_claimed(tmp_path, read(lora_settings())[1])


@pytest.mark.parametrize("name", ["tiny_lora", "tiny_r1_lora"])
def test_a_shipped_configuration_begins_with_adapters(name, monkeypatch):
    monkeypatch.setattr(recipe.Recipe, "defined", [SimpleNamespace(schema=PosttrainingConfig)])
    monkeypatch.setattr(recipe.Recipe, "overrides", [])
    recipe.take_overrides(["command", "--config.posttraining.lora.initial=run@3"])
    tree = recipe.read(f"configs/{name}.py", recipe.Recipe.overrides)
    assert read(tree, "W")[1].lora.initial == "run@3"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("base@4", {}, "'base@4' is no run of adapters; name the workdir of one with its step, .* if it has moved"),
        ("begun@4", {}, "'begun@4' is a run without a checkpoint; let it train until its first save, or name another"),
        ("run", {}, r"'run' must name a step of that run, which has \[2, 4\]: .*run@4"),
        ("run@3", {}, r"must name a step of that run, which has \[2, 4\]"),
        ("run@4", {"base": "other"}, "has adapters of another base than --initial; name theirs: .*run/config.json"),
        ("run@4", {"rank": 3}, "has rank = 2, and config.posttraining.lora.rank = 3; give 2"),
        ("run@4", {"targets": ("ffn",)}, r"has targets = \('attention', 'shared', 'experts'\), and .*; give"),
    ],
)
def test_adapters_that_cannot_be_begun_with_are_refused(tmp_path, monkeypatch, name, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for step in (2, 4):
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    for run in ("run", "begun"):
        claim_adapters(tmp_path / run, Lora(**LORA), "base")
    assert AdaptersFile(lora=Lora(**LORA), base="base") and (tmp_path / "run" / ADAPTERS).exists()
    asked = Lora(**LORA | {key: value for key, value in changes.items() if key != "base"}, initial=name)
    with pytest.raises(ValueError, match=message):
        find_adapters(asked, changes.get("base", "base"))
    folder, step = find_adapters(Lora(**LORA, initial="run@4"), "base")
    assert (folder.name, step) == ("run", 4)


@pytest.mark.slow
def test_gradients_of_the_policy_are_those_of_the_merged_weights_projected():
    """dA = s dW B^T and dB = s A^T dW of GRPO's loss, with dW by autodiff of the model with merged weights."""
    cfg, random = config(), np.random.default_rng(0)
    mesh, batch = one_device(cfg), small.batch(rows=8, length=cfg.data.sequence_length)
    objective = policy(VARIANTS["grpo"], cfg.model, cfg.loss, cfg.execution.loss_chunk, 1.0)
    shape, recipe = batch["tokens_BS"].shape, recipe_of(cfg, objective, mesh)
    own = {"old_logprobs_BS": -6.2 + 0.2 * random.normal(size=shape), "advantages_B": random.normal(size=shape[0])}
    own["reference_logprobs_BS"] = own["old_logprobs_BS"] + 0.1 * random.normal(size=shape)
    own["sampler_logprobs_BS"] = own["old_logprobs_BS"]
    with jax.set_mesh(mesh):
        weights = weights_on(mesh)
        base = mark(ONES, weights.params)
        state = moved(jax.jit(functools.partial(first_state, cfg, ONES))(base, weights.router_bias))
        adapted = adapt(base, state["params"])
        batch |= {name: np.float32(x) for name, x in own.items()}
        batch = {name: jax.device_put(x, jax.P(small.ROWS)) for name, x in batch.items()}
        program = jax.jit(functools.partial(gradients, recipe))
        grads, sums, _ = program(Weights(state["params"], state["router_bias"]), batch, small.RATES, base)
        full = program(merged(Weights(adapted, state["router_bias"])), batch, small.RATES)[0]
    assert 0 < float(sums.terms.clipped_low + sums.terms.clipped_high) < float(sums.terms.tokens)
    assert check_gradients(adapted, grads, full) == 5 + 2 + 2


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """(folder with a base, one device, what runs opened): all runs share an engine."""
    folder, seen, open_engine, open_parts = tmp_path_factory.mktemp("lora"), [], grpo.open_engine, grpo.open_parts
    engines = []

    class Recorded(PolicyBatches):
        def next_batch(self, batch_size):
            seen[-1]["batches"].append(super().next_batch(batch_size))
            return seen[-1]["batches"][-1]

    def open_once(*arguments):
        if not engines:
            engines.append(opened.enter_context(open_engine(*arguments)))
        return contextlib.nullcontext(engines[0])

    def watched(*arguments):
        parts = open_parts(*arguments)
        seen.append({"batches": [], "base": parts.train_step.base, "bytes": bytes_of(parts.train_step.base)})
        return parts

    tree = tiny(settings(""))
    del tree["posttraining"]
    base = from_config_dict(tree)
    save_run(base, folder / "base")
    with contextlib.ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "rewards_by_name", lambda names: dict.fromkeys(names, varied))
        patch.setattr(grpo, "open_engine", open_once)
        patch.setattr(grpo, "open_parts", watched)
        patch.setattr(grpo, "PolicyBatches", Recorded)
        yield folder, one_device(base), seen


def bytes_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def policy_rows(workdir):
    return [row for row in read_rows(workdir) if "policy/loss" in row]


@pytest.mark.slow
def test_runs_of_adapters_begin_as_the_base_leave_it_alone_and_continue(loop):
    """Two updates of each of two rollouts, killed within a rollout; then a run that begins with its adapters."""
    folder, mesh, seen = loop
    tree = lora_settings(f"{folder / 'base'}@1", replay_routes=True, optimizer__warmup_steps=1)
    tree.optimizer.learning_rate = (("constant", 1.0, 1e-2),)
    config, posttraining = read(tree)
    result = train_grpo(config, posttraining, folder / "run", mesh)
    rows, (run,) = policy_rows(folder / "run"), seen
    first, later = run["batches"][0], run["batches"][2]
    assert first["reference_logprobs_BS"].tobytes() == first["old_logprobs_BS"].tobytes()  # B is 0
    assert np.any(later["reference_logprobs_BS"] != later["old_logprobs_BS"])
    for row in rows[::2]:
        assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6) and abs(row["policy/old_kl"]) < 1e-6
    assert rows[0]["policy/kl"] < 1e-9 < rows[3]["policy/kl"] and rows[1]["policy/ratio_std"] > 1e-6
    assert max(row["rollout/sampler_difference_max"] for row in rows) < 1e-5  # after updates, too
    assert run["bytes"] == bytes_of(run["base"])
    arrays = read_sealed(folder / "run" / "checkpoints" / "4" / "run")["fingerprints"]
    assert not any(name in path for path in arrays for name in ("embed", "head", "norm", "router_DE"))
    assert len([path for path in arrays if "lora_" in path]) == 3 * 2 * (5 + 2 + 2)  # parameters and both moments
    go_back(folder / "run", (2, 3, 4))
    assert_same_weights(result, train_grpo(config, posttraining, folder / "run", mesh))
    tree.posttraining.lora.initial = f"{folder / 'run'}@4"
    tree.posttraining.grpo.steps = 1
    onward = train_grpo(*read(tree), folder / "onward", mesh)
    begun = seen[-1]["batches"][0]  # its reference is the adapters that it began with
    assert begun["reference_logprobs_BS"].tobytes() == begun["old_logprobs_BS"].tobytes()
    assert begun["old_logprobs_BS"].tobytes() != first["old_logprobs_BS"].tobytes()
    pairs = zip(*(jax.tree.leaves(r.state["params"]) for r in (onward, result)), strict=True)
    assert 0 < max(np.abs(a - b).max() for a, b in pairs) < 2.1e-2  # one update of Adam at its rate
    (folder / "run").rename(folder / "moved")
    tree.posttraining.grpo.steps = 2
    for name, message in (
        ("run@4", "lora.initial = .*run@4' is no run of adapters; .* where it is now if it has moved"),
        ("moved@3", "posttraining.lora.initial or .* are other weights than this run began with"),
    ):
        tree.posttraining.lora.initial = str(folder / name)
        with pytest.raises(ValueError, match=message):
            train_grpo(*read(tree), folder / "onward", mesh)
    tree.posttraining.lora.initial = f"{folder / 'moved'}@4"
    assert train_grpo(*read(tree), folder / "onward", mesh).step == 2


@pytest.mark.slow
def test_rollouts_of_adapters_beside_training_are_reproducible(loop):
    """With a staleness of 1 and references of its own: a killed run ends with the same bits."""
    folder, mesh, _ = loop
    options = {"updates": 1, "staleness": 1, "reference_every": 2, "steps": 4, "optimizer__warmup_steps": 1}
    config, posttraining = read(lora_settings(f"{folder / 'base'}@1", **options))
    result = train_grpo(config, posttraining, folder / "beside", mesh)
    rows = policy_rows(folder / "beside")
    assert [row["rollout/version"] for row in rows] == [0, 0, 1, 2]
    assert max(row["rollout/sampler_difference_max"] for row in rows) < 1e-5  # each by its own adapters
    assert rows[0]["policy/ratio_std"] < 1e-6 < min(row["policy/ratio_std"] for row in rows[1:])
    go_back(folder / "beside", (3, 4))
    assert_same_weights(result, train_grpo(config, posttraining, folder / "beside", mesh))


@pytest.mark.slow
def test_a_run_begins_with_the_adapters_of_fine_tuning(loop):
    folder, mesh, seen = loop
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(i, f"{i}!")) + "\n" for i in range(40)))
    tree = tiny(test_sft.settings(folder / "chats.jsonl", f"{folder / 'base'}@1", num_tokens=2.0 * 8 * 48))
    tree.data.sequence_length = 48
    tree.posttraining.sft.mtp = "off"
    tree.posttraining.lora = LORA
    tuned = train_sft(*read(tree), folder / "tuned", mesh)
    lora = LORA | {"initial": f"{folder / 'tuned'}@{tuned.step}"}
    config, posttraining = read(lora_settings(f"{folder / 'base'}@1", lora=lora, steps=2))
    result = train_grpo(config, posttraining, folder / "after", mesh)
    first = seen[-1]["batches"][0]
    assert first["reference_logprobs_BS"].tobytes() == first["old_logprobs_BS"].tobytes()
    pairs = zip(*(jax.tree.leaves(r.state["params"]) for r in (result, tuned)), strict=True)
    assert 0 < max(np.abs(a - b).max() for a, b in pairs) < 2.5e-3  # two updates of Adam at 1e-3
