"""The section `r1` of a configuration: R1's stages, which `posttraining.r1` runs one after the other.

A file in `configs/` for R1's stages is an ordinary configuration, for what all stages share, with one section more:

    config.r1 = {"task": "sort_digits:4-6", "examples": 2000, "hasty": 0, "num_stages": 2, "stages": (...)}

A stage begins with the weights of an earlier one, or with random ones, and has the shared configuration with some keys
changed: those of `model.*` for a smaller model. What it is, is its kind: one of `posttraining.settings`, or "samples",
which makes conversations. In "distillation" the teacher is the name of a stage.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, convert
from deepseek_jax.inputs import shown
from deepseek_jax.posttraining.grpo_settings import Grpo, task_of
from deepseek_jax.posttraining.problems import find_problems
from deepseek_jax.posttraining.settings import SECTION, Posttraining, read
from deepseek_jax.posttraining.tasks import make_task
from deepseek_jax.training.origin import FREE_MODEL_FIELDS, model_differences

RANDOM = "random"
KINDS = "sft", "grpo", "distillation", "samples"
EXAMPLES = "examples"  # .jsonl
RESULTS = "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Rejection sampling: answers to training problems, of which the right ones become conversations.

    Attributes:
        prompts: of the training problems, the first so many.
        samples: of each prompt, at least 2.
        temperature: of the draws, above 0.
    """

    prompts: int
    samples: int
    temperature: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: of the stage and of its folder.
        kind: one of `KINDS`.
        initial: the stage whose weights it begins with; "random" for none, in SFT.
        data: of SFT: a stage of kind "samples"; "" for the conversations of the task.
        changes: dotted keys of the shared configuration with this stage's values; the seed is that of all stages.
        settings: the fields of `Samples`, or of the kind's class in `settings.Posttraining`.
    """

    name: str
    kind: str
    initial: str
    data: str = ""
    changes: dict
    settings: dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class R1:
    """The whole section.

    Attributes:
        task: as `Grpo.problems` names one; of it are the conversations of a cold start.
        examples: conversations of a cold start that show the way to the answer.
        hasty: more of them, without it (`tasks.Task.cold_start`).
        num_stages: of `stages`, the first so many run.
        stages: in their order.
    """

    task: str
    examples: int
    hasty: int
    num_stages: int
    stages: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class R1Config(Config):
    """What a configuration file for R1's stages holds, for the types of its keys."""

    r1: R1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages that run, with the configuration that they share."""

    shared: dict[str, Any]
    r1: R1

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that run."""
        return self.r1.stages[: self.r1.num_stages]

    @property
    def measure(self) -> Stage:
        """The first stage of GRPO, whose problems and reward measure all stages."""
        return next(stage for stage in self.r1.stages if stage.kind == "grpo")

    def named(self, name: str) -> Stage:
        """Return the stage of that name."""
        return next(stage for stage in self.r1.stages if stage.name == name)

    def conversations(self) -> list[dict[str, Any]]:
        """Return those of the cold start.

        Raises:
            ValueError: the task does not have so many, or no hasty way.
        """
        named = task_of(self.r1.task)
        assert named is not None  # `read_plan` refuses a file
        try:
            task = make_task(named.name, self.shared["seed"], named.shortest, named.longest)
            return task.cold_start(self.r1.examples, self.r1.hasty)
        except ValueError as error:
            raise ValueError(f"config.r1, task {self.r1.task!r}: {error}") from error

    def grpo(self, stage: Stage, workdir: Path) -> Grpo:
        """Return the settings of a stage of the kind "grpo", or how one of "distillation" draws and measures."""
        own = self.settings(stage, workdir)[1]
        if own.distillation is not None:
            return own.distillation.rollouts
        assert own.grpo is not None
        return own.grpo

    def settings(self, stage: Stage, workdir: Path) -> tuple[Config, Posttraining]:
        """Return what the driver of a stage that trains takes; the stage's folder is in `workdir`.

        Raises:
            ValueError: as `settings.read`, with the stage's name; or a change of no key.
        """
        tree = json.loads(json.dumps(self.shared))
        tree["name"] = f"{tree['name']}_{stage.name}"
        initial = workdir / (base_of(stage) if stage.initial == RANDOM else stage.initial)
        try:
            for key, value in stage.changes.items():
                _put(tree, key, value)
            if stage.kind == "sft":
                tree["data"]["sources"] = [{"path": str(workdir / f"{stage.data or EXAMPLES}.jsonl")}]
            own = dict(stage.settings)
            own |= {"teacher": str(workdir / own["teacher"])} if stage.kind == "distillation" else {}
            return read(tree | {SECTION: {"stage": stage.kind, stage.kind: own}}, str(initial))
        except ValueError as error:
            raise ValueError(f"config.r1, stage {stage.name!r}: {error}") from error


def base_of(stage: Stage) -> str:
    """Return the folder of the random weights of a stage, whose model may be its own."""
    return f"{stage.name}_random"


def read_plan(config_dict: Any, workdir: Path) -> Plan:
    """Convert an `ml_collections.ConfigDict` (or a dict of its shape) strictly, and check every stage; write nothing.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    tree = dict(config_dict.to_dict() if hasattr(config_dict, "to_dict") else config_dict)
    if "r1" not in tree:
        raise ValueError("the configuration has no section 'r1'; begin with configs/tiny_r1.py")
    r1 = convert(R1, tree.pop("r1"), "config.r1")
    if task_of(r1.task) is None:
        raise ValueError(f"config.r1.task = {shown(repr(r1.task))} is a file, and a cold start is of a task; name one")
    if r1.examples < 1 or r1.hasty < 0:
        raise ValueError(f"config.r1.examples = {r1.examples} and hasty = {r1.hasty}: at least 1, and at least 0")
    if not 1 <= r1.num_stages <= len(r1.stages):
        raise ValueError(f"config.r1.num_stages = {r1.num_stages} must be 1 to {len(r1.stages)}")
    plan = Plan(tree, r1)
    _check_names(r1.stages)
    configs: dict[str, Config] = {}
    for i, stage in enumerate(r1.stages):
        _check_stage(stage, r1.stages[:i])
        if stage.kind != "samples":
            configs[stage.name] = plan.settings(stage, workdir)[0]
            if stage.initial != RANDOM:
                _check_model(stage, configs)
    if not any(stage.kind == "grpo" for stage in r1.stages):
        raise ValueError("config.r1.stages has no stage of kind grpo, whose problems measure all stages; add one")
    plan.conversations()
    _check_problems(plan, workdir)
    return plan


def samples_of(stage: Stage) -> Samples:
    """Return the settings of a stage of the kind "samples"."""
    return convert(Samples, stage.settings, f"config.r1, stage {stage.name!r}")


def _check_names(stages: tuple[Stage, ...]) -> None:
    """Refuse names whose folders and files would be those of another stage, or of all."""
    taken = {EXAMPLES, RESULTS, *(base_of(stage) for stage in stages)}
    for stage in stages:
        if not stage.name.isidentifier() or stage.name in taken:
            raise ValueError(
                f"config.r1, stage {shown(repr(stage.name))}: a name is of letters, digits and _, and not taken, as"
                f" {sorted(taken)} are; choose another"
            )
        taken.add(stage.name)


def _check_problems(plan: Plan, workdir: Path) -> None:
    """Refuse stages that ask for more problems than there are."""
    nums = {}
    for stage in plan.r1.stages:
        where = f"config.r1, stage {stage.name!r}"
        if stage.kind in ("grpo", "distillation"):
            try:
                nums[stage.name] = len(find_problems(plan.shared["seed"], plan.grpo(stage, workdir))[0])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if stage.kind == "samples" and (prompts := samples_of(stage).prompts) > nums[stage.initial]:
            raise ValueError(
                f"{where}: prompts = {prompts} of {nums[stage.initial]} training problems of {stage.initial!r}; lower"
                " it, or give that stage more problems"
            )


def _check_stage(stage: Stage, before: tuple[Stage, ...]) -> None:
    kinds, where = {other.name: other.kind for other in before}, f"config.r1, stage {stage.name!r}"
    if stage.kind not in KINDS:
        raise ValueError(f"{where}: kind = {shown(repr(stage.kind))} is unknown; choose one of {KINDS}")
    trained = "sft", "grpo", "distillation"
    begins = {"sft": (RANDOM, *trained), "samples": ("grpo",)}.get(stage.kind, trained)
    if (kinds | {RANDOM: RANDOM}).get(stage.initial) not in begins:
        raise ValueError(
            f"{where}: initial = {shown(repr(stage.initial))} must be an earlier stage of kind {' or '.join(begins)}"
        )
    if stage.data and (stage.kind != "sft" or kinds.get(stage.data) != "samples"):
        raise ValueError(f"{where}: data = {shown(repr(stage.data))} must be an earlier stage of kind samples, in sft")
    teacher = str(stage.settings.get("teacher"))
    if stage.kind == "distillation" and kinds.get(teacher) not in trained:
        raise ValueError(f"{where}: settings.teacher = {shown(repr(teacher))} must be an earlier stage that trains")
    if stage.kind == "samples":
        made = samples_of(stage)
        if made.prompts < 1 or made.samples < 2 or not made.temperature > 0.0:
            raise ValueError(f"{where}: {made}; prompts must be at least 1, samples 2, and the temperature above 0")
        if stage.changes:
            raise ValueError(f"{where}: samples have the configuration of {stage.initial!r}; leave changes empty")
    if "seed" in stage.changes:
        raise ValueError(f"{where}: changes: the seed, which chooses the problems, is of all stages; set config.seed")


def _check_model(stage: Stage, configs: dict[str, Config]) -> None:
    """Refuse a model that is not that of the weights with which the stage begins."""
    there, ours = configs[stage.initial], configs[stage.name]
    differences = model_differences(dataclasses.asdict(there.model), ours.model)
    if differences.keys() - FREE_MODEL_FIELDS:
        raise ValueError(
            f"config.r1, stage {stage.name!r}: its model is not that of {stage.initial!r}, with which it begins; give"
            f" its changes the same values, or another initial ('there' is {stage.initial!r}):\n"
            + "\n".join(differences.values())
        )


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    inner: Any = tree
    for name in sections:
        inner = inner.get(name) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or last not in inner:
        raise ValueError(f"changes: {shown(repr(key))} is no key of the configuration; name one, 'optimizer.b2' say")
    inner[last] = value
