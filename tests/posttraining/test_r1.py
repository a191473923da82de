"""R1's stages: what is refused, in which order they run, what is kept of samples, and what is told at the end."""

import contextlib
import dataclasses
import json
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import tiny_r1
from deepseek_jax.files import PARTIAL_MARK
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining import grpo, r1, r1_report, sft
from deepseek_jax.posttraining.r1_record import keep_plan
from deepseek_jax.posttraining.r1_settings import read_plan
from deepseek_jax.posttraining.rewards.chance import chance_reward
from deepseek_jax.posttraining.rewards.format import text_reward
from deepseek_jax.posttraining.rewards.problem import Problem, Score
from deepseek_jax.posttraining.rollouts import Sample
from deepseek_jax.training.metrics import read_rows
from experiments.studies import r1_seeds
from tests.posttraining import test_grpo, test_sft


def plan_of(folder, changes=(), reward="text", num_stages=5, **own):
    """The plan of the configuration with `changes`: (number of a stage, key, value); `own` are the section's."""
    tree = tiny_r1.get_config(reward).to_dict()
    tree["r1"] |= own
    stages = [dict(stage) for stage in tree["r1"]["stages"]]
    for number, key, value in changes:
        stages[number][key] = value
    tree["r1"] |= {"stages": tuple(stages), "num_stages": min(num_stages, len(stages))}
    return read_plan(tree, folder)


def row(share):
    ends = {"eval/accuracy_low": share - 0.05, "eval/accuracy_high": share + 0.05}
    return {"eval/accuracy": share, "eval/problems": 200, "eval/length": 33.0, "answers": [["sort 21", "12"]]} | ends


def test_stages_share_a_model_and_differ_in_what_they_name(tmp_path):
    plan = plan_of(tmp_path)
    trained = [stage for stage in plan.stages if stage.kind != "samples"]
    configs = [plan.settings(stage, tmp_path)[0] for stage in trained]
    assert len({c.model for c in configs}) == 1
    assert {end for c in configs for _, _, end in c.optimizer.bias_update_rate} == {0.0}
    begins = [c.training.initial_weights.removeprefix(f"{tmp_path}/") for c in configs]
    assert begins == ["cold_start_random", "cold_start", "cold_start", "second_sft"]
    read = [[source.path.removeprefix(f"{tmp_path}/") for source in c.data.sources] for c in configs]
    assert read[0] == ["examples.jsonl"] and read[2] == ["samples.jsonl"]
    control = plan_of(tmp_path, reward="chance")
    assert [stage.name for stage in control.stages] == ["cold_start", "reasoning"]
    _, posttraining = control.settings(control.stages[1], tmp_path)
    assert posttraining.grpo is not None
    assert posttraining.grpo.rewards == {"text": 0.0, "chance": 1.0} and posttraining.grpo.accuracy == "text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(1, "initial", "second_sft")], "initial = 'second_sft' must be an earlier stage of kind sft or grpo"),
        ([(1, "initial", "random")], "initial = 'random' must be"),
        ([(2, "initial", "cold_start")], "must be an earlier stage of kind grpo"),
        ([(1, "name", "cold_start")], "not taken, as .*'cold_start'"),
        ([(0, "name", "results")], "not taken"),
        ([(2, "name", "examples")], "not taken"),
        ([(1, "name", "cold_start_random")], "stage 'cold_start_random': a name .*not taken"),
        (
            [(1, "changes", tiny_r1.REINFORCEMENT | {"model.width": 64})],
            "'reasoning': its model is not .*'cold_start', .*\n  model.width: 128 there",
        ),
        ([(1, "changes", {"seed": 1})], "stage 'reasoning': changes: the seed, .* set config.seed"),
        ([(2, "settings", {"prompts": 2001, "samples": 2, "temperature": 1.0})], "prompts = 2001 of 2000 training"),
        (
            [(1, "settings", tiny_r1.GRPO | {"problems": "sort_digits:2-2"})],
            "'reasoning': sort_digits has no",
        ),
        ([(1, "name", "a/b")], "letters, digits and _"),
        ([(1, "kind", "ppo")], "kind = 'ppo' is unknown"),
        ([(3, "data", "reasoning")], "data = 'reasoning' must be an earlier stage of kind samples"),
        ([(1, "changes", {"optimizer.rate": 1.0})], "stage 'reasoning': changes: 'optimizer.rate' is no key"),
        ([(1, "changes", {"optimizer.b2": "much"})], "stage 'reasoning': config.optimizer.b2"),
        ([(2, "settings", {"prompts": 9, "samples": 1, "temperature": 1.0})], "samples 2"),
        ([(0, "settings", {"template": "plain", "epochs": 0.0, "mtp": "off"})], "epochs = 0.0 must be"),
    ],
)
def test_stages_that_mean_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, changes)


def test_a_smaller_model_learns_from_the_samples_and_from_the_probabilities_of_a_larger_one(tmp_path):
    plan = plan_of(tmp_path, reward="distill", num_stages=8)
    names = [stage.name for stage in plan.stages]
    assert names[3:] == ["small_sft", "small_both", "small_cold", "small_on_policy", "small_grpo"]
    small = {name: plan.settings(plan.named(name), tmp_path) for name in names[3:]}
    assert {config.model.width for config, _ in small.values()} == {64}
    assert len({config.model for config, _ in small.values()}) == 1
    assert small["small_sft"][0].data.sources[0].path == str(tmp_path / "samples.jsonl")
    for name, initial in (("small_both", "small_sft"), ("small_on_policy", "small_cold")):
        config, posttraining = small[name]
        assert config.training.initial_weights == str(tmp_path / initial)
        assert posttraining.distillation is not None
        assert posttraining.distillation.teacher == str(tmp_path / "reasoning")
        assert plan.grpo(plan.named(name), tmp_path).heldout == plan.grpo(plan.measure, tmp_path).heldout
    with pytest.raises(ValueError, match="settings.teacher = 'small_grpo' must be an earlier stage that trains"):
        other = dict(tiny_r1.SMALL_STAGES[1]["settings"]) | {"teacher": "small_grpo"}
        plan_of(tmp_path, [(4, "settings", other)], reward="distill")


def test_a_plan_that_cannot_run_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="task 'add_digits:4-5': hasty = 4000: add_digits has no hasty way; use 0"):
        plan_of(tmp_path, task="add_digits:4-5")
    with pytest.raises(ValueError, match="no stage of kind grpo, whose problems measure all stages; add one"):
        plan_of(tmp_path, stages=tiny_r1.STAGES[:1])
    assert not list(tmp_path.iterdir())


def test_a_folder_keeps_its_plan_but_may_run_more_stages_and_change_those_that_have_not_begun(tmp_path):
    other = [(0, "settings", {"template": "plain", "epochs": 9.0, "mtp": "off"})]
    keep_plan(plan_of(tmp_path, num_stages=2), tmp_path)
    keep_plan(plan_of(tmp_path, other), tmp_path)  # nothing has begun
    (tmp_path / "cold_start_random").mkdir()
    with pytest.raises(ValueError, match=r"stages.cold_start.settings.epochs is 9.0 there, and 4.0 here; .* new f"):
        keep_plan(plan_of(tmp_path), tmp_path)
    fewer = [*other, (2, "settings", {"prompts": 9, "samples": 2, "temperature": 1.0})]
    keep_plan(plan_of(tmp_path, fewer), tmp_path)
    assert json.loads((tmp_path / "r1.json").read_text())["r1"]["stages"][2]["settings"]["prompts"] == 9
    longer = [*fewer, (1, "settings", tiny_r1.GRPO | {"heldout": 100})]
    keep_plan(plan_of(tmp_path, longer), tmp_path)
    (tmp_path / r1.RESULTS).mkdir()
    with pytest.raises(ValueError, match=r"stages.reasoning.settings.heldout is 100 there, and 200 here"):
        keep_plan(plan_of(tmp_path, fewer), tmp_path)  # random weights were measured on its problems
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(ValueError, match=r"stages.samples.settings.prompts is 9 there"):
        keep_plan(plan_of(tmp_path, [*other, longer[-1]]), tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="holds a run, and stages are folders of their own"):
        keep_plan(plan_of(tmp_path), tmp_path)


def test_stages_run_in_order_until_a_signal_and_are_done_once(tmp_path, monkeypatch):
    plan, done, told, sizes = plan_of(tmp_path), [], [], []
    end = {"second_sft": signal.SIGTERM}

    def train(config, posttraining, workdir, mesh):
        sizes.append(mesh.size)
        done.append((workdir.name, config.name, posttraining.stage))
        return SimpleNamespace(interrupted_by=end.get(workdir.name))

    def measure(plan, stage, workdir, folder, tell, devices):
        (workdir / r1.RESULTS).mkdir(exist_ok=True)
        (workdir / r1.RESULTS / f"{folder}.json").write_text(json.dumps(row(0.5)))

    monkeypatch.setattr(r1, "prepare", lambda *arguments: None)
    monkeypatch.setattr(r1, "train_sft", train)
    monkeypatch.setattr(r1, "train_grpo", train)
    monkeypatch.setattr(r1, "measure", measure)
    monkeypatch.setattr(r1, "keep_right_answers", lambda *arguments: done.append("samples"))
    assert r1.run_stages(plan, tmp_path, told.append) is signal.SIGTERM
    names = [entry if entry == "samples" else entry[0] for entry in done]
    assert names == ["cold_start", "reasoning", "samples", "second_sft"]
    end.clear()
    done.clear()
    assert r1.run_stages(plan, tmp_path, told.append, jax.devices()[:1]) is None
    assert sizes == [8, 8, 8, 1, 1]
    assert [entry for entry in done if entry != "samples"] == [
        ("second_sft", "tiny_r1_second_sft", "sft"),
        ("second_rl", "tiny_r1_second_rl", "grpo"),
    ]
    assert [line.split()[0] for line in r1_report.table(plan, tmp_path).splitlines()[1:]] == [
        "cold_start_random",
        "cold_start",
        "reasoning",
        "second_sft",
        "second_rl",
    ]


def test_right_answers_that_end_are_kept_once(monkeypatch):
    problems = [Problem(f"sort {n}", ({"role": "user", "content": f"sort {n}"},), str(n)) for n in (12, 34)]
    train = [SimpleNamespace(problem=problem, ids=[1]) for problem in problems]
    good = "<think>1x1 2x1</think><answer>12</answer>"
    texts = [(0, good, "stop"), (0, good, "stop"), (0, good + "!", "stop"), (1, good, "stop")]
    texts += [(1, good.replace("12", "34"), "length"), (1, good.replace("12", "34"), "stop")]
    drawn = [Sample(n, 0, [1], [2], [0.0], text, reason, 0, None, 0) for n, text, reason in texts]
    seeds = []

    def sample_groups(engine, keyed, group_size, max_new_tokens, seed, temperature):
        seeds.append(seed)
        return drawn

    def score(asked, texts):
        return [Score(0.0, {"text": text_reward(*pair)}) for pair in zip(asked, texts, strict=True)]

    monkeypatch.setattr(r1, "sample_groups", sample_groups)
    grpo = SimpleNamespace(max_new_tokens=48, accuracy="text")
    made = SimpleNamespace(samples=3, temperature=1.0)
    pool, all_problems = SimpleNamespace(score=score), SimpleNamespace(train=train)
    kept = r1._right_answers(None, pool, all_problems, range(2), grpo, made, 7)
    assert [[message["content"] for message in line["messages"]] for line in kept] == [
        ["sort 12", good],
        ["sort 34", good.replace("12", "34")],
    ]
    assert seeds == [7]


def test_a_reward_of_chance_is_half_and_the_same_again():
    problem = Problem("sort 21", (), "12")
    rewards = np.array([chance_reward(problem, f"text {i}") for i in range(4000)])
    assert set(rewards) == {0.0, 1.0} and abs(rewards.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    assert (rewards == [chance_reward(problem, f"text {i}") for i in range(4000)]).all()
    other = np.array([chance_reward(Problem("sort 31", (), "13"), f"text {i}") for i in range(4000)])
    assert abs((rewards == other).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)  # a text is not good or bad in itself


def test_curves_are_drawn_and_the_mean_of_seeds_has_students_interval(tmp_path):
    plan = plan_of(tmp_path, num_stages=2)
    assert r1_report.draw(plan, tmp_path) is None
    (tmp_path / "reasoning").mkdir()
    keys = dict.fromkeys(r1_report.PANELS, 1.0) | {"policy/loss": 0.0}
    rows = [{"step": 1, "tokens_seen": 1} | keys, {"step": 1, "tokens_seen": 1, "eval/accuracy": 0.5}]
    (tmp_path / "reasoning" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert r1_report.draw(plan, tmp_path) == tmp_path / "r1.png" and (tmp_path / "r1.png").stat().st_size > 1000
    stages = [{"cold_start": row(0.3), "reasoning": row(0.3 + gain)} for gain in (0.5, 0.6, 0.7, 0.0)]
    found = r1_seeds.records_of(dict(zip([*(f"seed_{n}" for n in range(3)), "chance"], stages, strict=True)))
    (tmp_path / "samples.jsonl").write_text("{}\n" * 7)
    kept = r1_seeds.kept_of("seed_0", plan_of(tmp_path), tmp_path)
    assert [(record["value"], record["unit"]) for record in kept] == [(7, "answers")]
    # 0.6 +- 4.3027 * 0.1 / sqrt(3), without the control
    assert {key: round(found[-1][key], 4) for key in ("value", "low", "high")} == {
        "value": 0.6,
        "low": 0.3516,
        "high": 0.8484,
    }


def test_sampling_that_was_killed_goes_on_behind_the_blocks_that_are_done(tmp_path, monkeypatch):
    made = {"prompts": 250, "samples": 2, "temperature": 1.0}
    plan, begun, told = plan_of(tmp_path, [(2, "settings", made)]), [], []
    stage = plan.stages[2]

    @contextlib.contextmanager
    def sampler(plan, origin, workdir, folder, grpo, devices):
        assert (origin.name, folder, grpo.accuracy) == ("reasoning", "reasoning", "text")
        engine = SimpleNamespace(update_weights=lambda weights: None)
        yield engine, None, SimpleNamespace(train=range(250)), None

    def right_answers(engine, pool, problems, numbers, grpo, settings, seed):
        begun.append(numbers[0])
        if begun == [0, 100]:
            torn = tmp_path / "samples" / f"000100.jsonl{PARTIAL_MARK}host-1-0"
            torn.write_text('{"messages": [')
            raise KeyboardInterrupt
        return [{"number": number, "seed": seed} for number in numbers]

    monkeypatch.setattr(r1, "open_sampler", sampler)
    monkeypatch.setattr(r1, "_right_answers", right_answers)
    with pytest.raises(KeyboardInterrupt):
        r1.keep_right_answers(plan, stage, tmp_path, told.append)
    assert not (tmp_path / "samples.jsonl").exists()
    for _ in range(2):  # the second time there is nothing to do
        r1.keep_right_answers(plan, stage, tmp_path, told.append)
    assert begun == [0, 100, 100, 200] and told == ["samples: 250 different right answers of 500 kept"]
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(250))
    seeds = {line["seed"] for line in lines}
    others = r1.sampling_seed(plan, dataclasses.replace(stage, name="more")), plan.shared["seed"]
    assert seeds == {r1.sampling_seed(plan, stage)} and not seeds & {*others}


def nano_plan(folder):
    """A real plan that takes seconds: a coin says what is right."""
    tree = test_sft.settings(initial="").to_dict()
    del tree["posttraining"]
    tree["model"]["vocab_size"] = 320
    tree["data"] |= {"sequence_length": 48, "tokenizer": "bpe"}
    changes = {"training.batch_size": (("constant", 1.0, 8),), "training.micro_batch_size": 8}
    own = test_grpo.GRPO | {"template": "folder", "rewards": {"chance": 1.0}, "accuracy": "chance", "updates": 1}
    sampled = {"prompts": 12, "samples": 2, "temperature": 1.0}
    rows = [
        ("cold_start", "sft", "random", changes, {"template": "plain", "epochs": 1.0, "mtp": "off"}),
        ("reasoning", "grpo", "cold_start", changes, own | {"steps": 2, "max_new_tokens": 20}),
        ("samples", "samples", "reasoning", {}, sampled),
    ]
    stages = tuple(dict(zip(("name", "kind", "initial", "changes", "settings"), row, strict=True)) for row in rows)
    tree["r1"] = {"task": "sort_digits:2-3", "examples": 40, "hasty": 0, "num_stages": 3, "stages": stages}
    return read_plan(tree, folder)


@pytest.mark.slow
def test_stages_that_were_killed_end_where_the_uninterrupted_ones_do(tmp_path, monkeypatch):
    """Random weights, fine-tuning, reinforcement learning, samples and all measurements, for real."""
    for module in (r1, sft, grpo):
        monkeypatch.setattr(module, "make_mesh", lambda layout, devices=None: make_mesh(layout, jax.devices()[:1]))
    monkeypatch.setattr(r1, "BLOCK", 6)
    engines, open_engine = [], grpo.open_engine

    def open_once(*arguments):  # compiled once; who opens it gives it weights
        engines.append(engines[0] if engines else open_engine(*arguments))
        return contextlib.nullcontext(engines[0])

    for module in (r1, grpo):
        monkeypatch.setattr(module, "open_engine", open_once)
    found = []
    for name in ("whole", "killed"):
        workdir, told = tmp_path / name, []
        workdir.mkdir()
        plan = nano_plan(workdir)

        def tell(text, told=told, kills=name == "killed"):
            told.append(text)
            if kills and text.startswith("cold_start: "):
                raise KeyboardInterrupt

        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(r1, "claim_workdir", lambda folder, config: 1 / 0)
                r1.run_stages(plan, workdir, tell)
            assert (workdir / "cold_start_random" / "checkpoints").exists()
            with pytest.raises(KeyboardInterrupt):
                r1.run_stages(plan, workdir, tell)
        assert r1.run_stages(plan, workdir, tell) is None
        assert [text.split(":")[0] for text in told] == ["cold_start_random", "cold_start", "reasoning", "samples"]
        files = [*sorted((workdir / r1.RESULTS).iterdir()), workdir / "samples.jsonl", workdir / "examples.jsonl"]
        found.append({path.name: path.read_text() for path in files})
        rows = [row for row in read_rows(workdir / "reasoning") if "policy/loss" in row]
        found[-1]["losses"] = [(row["policy/loss"], row["rollout/reward"]) for row in rows]
    assert found[0] == found[1] and len(found[0]["losses"]) == 2 and len(found[0]) == 6
    assert 0 < len(found[0]["samples.jsonl"].splitlines()) < 24
    times = (workdir / "examples.jsonl").stat().st_mtime_ns
    assert r1.run_stages(plan, workdir, tell) is None and (workdir / "examples.jsonl").stat().st_mtime_ns == times
