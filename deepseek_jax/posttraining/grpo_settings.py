"""The settings of GRPO, and what is refused before anything is written."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Config, convert
from deepseek_jax.inputs import shown
from deepseek_jax.posttraining.advantages import punishment
from deepseek_jax.posttraining.choices import VARIANTS, Choices, check
from deepseek_jax.posttraining.rewards import NAMES
from deepseek_jax.posttraining.rewards.pool import POLICIES
from deepseek_jax.posttraining.tasks import TASKS, make_task

PATH = "config.posttraining.grpo"
TASK = re.compile(r"(?P<name>\w+):(?P<shortest>\d{1,3})-(?P<longest>\d{1,3})")
FILE = ".jsonl"
ARITHMETICS = "fast", "exact"
MODEL = "model"  # the reward that `Grpo.reward_model` gives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Reinforcement learning in groups, with rewards by rules.

    Attributes:
        variant: a row of `choices.VARIANTS`.
        overrides: fields of `choices.Choices` with other values than the variant's.
        template: as that of SFT; it writes the prompts.
        problems: a task made by code with the fewest and most digits, "sort_digits:4-6", or a .jsonl file
            (`problems.read_problems`).
        num_problems: different problems to train on; 0 for a file, of which all are.
        heldout: problems on which accuracy is measured, greedily; never trained on.
        rewards: name to weight, of `rewards.NAMES`.
        accuracy: the reward that is 1 for a right answer.
        on_failure: what a reward that fails does: "stop" the run, or count as "zero".
        reward_seconds: limit of one reward of one text; of the reward "model", of one batch, which has
            training.micro_batch_size texts of its run.
        reward_workers: processes that reward.
        group_size: samples of a prompt, at least 2.
        updates: optimizer steps, each of training.batch_size samples, that share one rollout.
        steps: optimizer steps of the run; training.num_tokens may end it before.
        max_new_tokens: of a sample, EOS included.
        rows: samples that are drawn at once.
        staleness: updates that the weights which sample may be behind those of the rollout's first update; 0:
            synchronous. Above it, rollouts are made while the trainer trains (`policy_batches`).
        reference_every: the KL's reference is replaced by the policy every so many updates; 0: never.
        temperature: of the draws.
        top_k: a token is drawn of so many most probable ones; 0: of all.
        top_p: a token is drawn of the fewest most probable ones that reach this probability; 1: of all.
        replay_routes: updates and scores take the experts that the sampler chose (`model.router.Replay`).
        arithmetic: "exact" has the sampler's log-probabilities and routes in training, bit for bit, on a CPU in FP32
            (`inference.exact`); "fast" has two programs, which differ by rounding.
        reward_model: workdir of a reward model whose score is the reward "model"; "" without one.
    """

    variant: str
    overrides: dict
    template: str
    problems: str
    num_problems: int
    heldout: int
    rewards: dict
    accuracy: str
    on_failure: str
    reward_seconds: float
    reward_workers: int
    group_size: int
    updates: int
    steps: int
    max_new_tokens: int
    rows: int
    staleness: int = 0
    reference_every: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    replay_routes: bool = False
    arithmetic: str = "fast"
    reward_model: str = ""

    @property
    def judged(self) -> tuple[str, ...]:
        """The parts of `problems.Problems` whose answers rewards read."""
        return "train", "heldout"

    @property
    def is_exact(self) -> bool:
        """Whether sampler and trainer have the same numbers."""
        return self.arithmetic == "exact"

    @property
    def drawing(self) -> dict[str, Any]:
        """How samples are drawn: options of `rollouts.sample_groups`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def choices(self) -> Choices:
        """The variant with its overrides; a ValueError names what is unknown."""
        if self.variant not in VARIANTS:
            raise ValueError(f"{PATH}.variant = {shown(repr(self.variant))} is unknown; choose one of {list(VARIANTS)}")
        fields = dataclasses.asdict(VARIANTS[self.variant]) | self.overrides
        choices = convert(Choices, fields, f"{PATH}.overrides")
        check(choices, f"{PATH}.overrides")
        return choices


class TaskName(NamedTuple):
    """A task as `Grpo.problems` names it."""

    name: str
    shortest: int
    longest: int


def task_of(problems: str) -> TaskName | None:
    """Return the task that `Grpo.problems` names; None for a file.

    Raises:
        ValueError: it is neither.
    """
    if problems.endswith(FILE):
        return None
    found = TASK.fullmatch(problems)
    if not found or found["name"] not in TASKS:
        raise ValueError(
            f"{PATH}.problems = {shown(repr(problems))} is no task; write one of {sorted(TASKS)} with the fewest and"
            f" most digits, for example 'sort_digits:4-6', or name a {FILE} file"
        )
    return TaskName(found["name"], int(found["shortest"]), int(found["longest"]))


@contextlib.contextmanager
def _told_of(keys: str) -> Iterator[None]:
    """Let an error name the keys that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{keys}: {error}") from error


def check_grpo(grpo: Grpo, config: Config) -> None:
    """Refuse settings that do not go together or would not do what they say.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    choices = grpo.choices

    def refuse(key: str, remedy: str):
        raise ValueError(f"{PATH}.{key} = {shown(repr(getattr(grpo, key)))} {remedy}")

    if grpo.group_size < 2:
        refuse("group_size", "must be at least 2: an output is compared with others of its prompt")
    for key in ("heldout", "updates", "steps", "max_new_tokens", "rows", "reward_workers"):
        if getattr(grpo, key) < 1:
            refuse(key, "must be at least 1")
    for key in ("staleness", "reference_every"):
        if getattr(grpo, key) < 0:
            refuse(key, "must be at least 0")
    if grpo.reference_every and not choices.kl_weight:
        refuse(
            "reference_every", f"replaces a reference that is not there: {PATH}.overrides.kl_weight is 0; set it to 0"
        )
    check_drawing(grpo, config)
    if not 0.0 < grpo.reward_seconds < math.inf:
        refuse("reward_seconds", "must be positive and finite")
    if grpo.on_failure not in POLICIES:
        refuse("on_failure", f"is unknown; choose one of {POLICIES}")
    if not grpo.template:
        refuse("template", "is empty; name a template, 'folder' or 'plain' for example")
    check_rewards(grpo)
    if task := task_of(grpo.problems):
        with _told_of(f"{PATH}.problems = {grpo.problems!r}"):
            make_task(task.name, config.seed, task.shortest, task.longest)
        if grpo.num_problems < 1:
            refuse("num_problems", "must be at least 1 for a task")
    elif grpo.num_problems:
        refuse("num_problems", f"is for tasks, and {grpo.problems!r} is a file, of which all are taken; set it to 0")
    if grpo.max_new_tokens >= config.data.sequence_length:
        refuse("max_new_tokens", f"leaves no room for a prompt in data.sequence_length = {config.data.sequence_length}")
    with _told_of(f"{PATH}.max_new_tokens = {grpo.max_new_tokens} and {PATH}.overrides"):
        punishment(choices, np.zeros(1), grpo.max_new_tokens)  # refuses a buffer that is too long
    schedule: Any = config.training.batch_size
    if len(schedule) != 1 or schedule[0][0] != "constant":
        raise ValueError(f"config.training.batch_size = {schedule} must be one number: samples of an update")
    samples = int(schedule[0][2]) * grpo.updates
    if samples % grpo.group_size:
        refuse(
            "group_size",
            f"does not divide the {samples} samples of a rollout: training.batch_size x {grpo.updates}; change one",
        )
    check_used(grpo, samples)
    if config.model.num_mtp_layers and config.optimizer.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay = {config.optimizer.weight_decay} would shrink MTP layers, which do not learn"
            " here; set it to 0"
        )


def check_used(grpo: Grpo, samples: int) -> None:
    """Refuse more rows than anything fills, and rollouts that are further behind than a run gets.

    Args:
        grpo: with positive sizes.
        samples: of a rollout.
    """
    most = max(samples, grpo.heldout)
    if grpo.rows > most:
        raise ValueError(
            f"{PATH}.rows = {grpo.rows} is more than there is to draw at once: a rollout has {samples} samples"
            f" (training.batch_size x {grpo.updates}), and {grpo.heldout} problems are held out; lower it to {most}"
        )
    first = (grpo.steps - 1) // grpo.updates * grpo.updates
    if grpo.staleness > first:
        raise ValueError(
            f"{PATH}.staleness = {grpo.staleness}, and the last rollout of {grpo.steps} steps is taken from update"
            f" {first} on, so no weights are older by that many; use at most {first}, or raise {PATH}.steps"
        )


def check_drawing(grpo: Grpo, config: Config) -> None:
    """Refuse ways of drawing that are none, and exact arithmetic or routes where they cannot be kept."""

    def refuse(key: str, remedy: str):
        raise ValueError(f"{PATH}.{key} = {shown(repr(getattr(grpo, key)))} {remedy}")

    if not 0.0 < grpo.temperature < math.inf:
        refuse("temperature", "must be above 0 and finite: greedy outputs of a group are all equal; use 1")
    if grpo.top_k < 0:
        refuse("top_k", "must be at least 0, which draws of all tokens")
    if not 0.0 < grpo.top_p <= 1.0:
        refuse("top_p", "must be above 0 and at most 1, which draws of all tokens")
    if grpo.arithmetic not in ARITHMETICS:
        refuse("arithmetic", f"is unknown; choose one of {ARITHMETICS}")
    if grpo.replay_routes and not config.model.num_moe_layers:
        refuse("replay_routes", "replays experts, and the model has none; set it to False")
    if (grpo.replay_routes or grpo.is_exact) and config.execution.interleave > 1:
        raise ValueError(
            f"config.execution.interleave = {config.execution.interleave}: routes are replayed for rows that pass the"
            " layers together; use 1"
        )
    if not grpo.is_exact:
        return
    for key, value in (("staleness", 0), ("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("replay_routes", False)):
        if getattr(grpo, key) != value:
            refuse(key, f"does not go with {PATH}.arithmetic = 'exact'; set it to {value}, or use 'fast'")
    if config.execution.precision != "fp32":
        raise ValueError(
            f"{PATH}.arithmetic = 'exact' needs execution.precision = 'fp32', and it is"
            f" {config.execution.precision!r}; use 'fast'"
        )


def check_rewards(grpo: Grpo) -> None:
    """Refuse unknown rewards, and weights that are no finite numbers."""
    known = (*NAMES, MODEL)
    if not grpo.rewards or not grpo.rewards.keys() <= set(known):
        raise ValueError(f"{PATH}.rewards = {shown(repr(grpo.rewards))}: name each with its weight, of {known}")
    if (MODEL in grpo.rewards) != bool(grpo.reward_model):
        raise ValueError(
            f"{PATH}.reward_model = {shown(repr(grpo.reward_model))} and rewards = {sorted(grpo.rewards)}: the reward"
            f" {MODEL!r} is the score of a reward model; name its workdir, or leave both out"
        )
    for name, weight in grpo.rewards.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{PATH}.rewards.{name} = {shown(repr(weight))} must be a finite number, its weight")
    if not any(grpo.rewards.values()):
        raise ValueError(f"{PATH}.rewards = {grpo.rewards}: all weights are 0, so there is nothing to learn; raise one")
    if grpo.accuracy not in grpo.rewards or grpo.accuracy == MODEL:
        raise ValueError(
            f"{PATH}.accuracy = {shown(repr(grpo.accuracy))} must be one of the rewards by rules,"
            f" {sorted(grpo.rewards.keys() - {MODEL})}"
        )
