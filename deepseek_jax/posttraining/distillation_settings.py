"""The settings of on-policy distillation, what is refused of them, and the teacher that they name."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.huggingface.config import read_model
from deepseek_jax.huggingface.folder import read_config as read_released_config
from deepseek_jax.inputs import shown
from deepseek_jax.posttraining import grpo_settings
from deepseek_jax.posttraining.grpo_settings import Grpo, check_grpo
from deepseek_jax.posttraining.rewards import NAMES
from deepseek_jax.training import origin
from deepseek_jax.training.origin import find_origin, initial_tokenizer
from deepseek_jax.training.workdir import read_config, read_tokenizer

PATH = "config.posttraining.distillation"
SECONDS = 30.0  # of checking one answer; one that takes longer counts as wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """A student that answers, and a teacher that says at each token what it would have said.

    Attributes:
        teacher: its weights, as `training.initial_weights` names some: a run's workdir, "workdir@step", or a folder in
            Hugging Face's format; of the student's tokenizer.
        template: as that of SFT; it writes the prompts.
        problems: as those of GRPO; the answers of a file are read for `heldout` alone.
        num_problems: different problems to answer in training; 0 for a file, of which all are.
        heldout: problems on which accuracy is measured, greedily; never trained on.
        accuracy: the reward that is 1 for a right answer; it is measured, and teaches nothing.
        group_size: answers to a prompt, at least 2.
        steps: optimizer steps, each of training.batch_size answers; training.num_tokens may end the run before.
        max_new_tokens: of an answer, EOS included.
        rows: answers that are drawn at once.
    """

    teacher: str
    template: str
    problems: str
    num_problems: int
    heldout: int
    accuracy: str
    group_size: int
    steps: int
    max_new_tokens: int
    rows: int

    @property
    def rollouts(self) -> "Rollouts":
        """What both draw and measure alike, as GRPO's settings."""
        fields = dataclasses.asdict(self)
        del fields["teacher"]
        return Rollouts(
            variant="grpo",
            overrides={},
            rewards={self.accuracy: 1.0},
            on_failure="zero",
            reward_seconds=SECONDS,
            reward_workers=1,
            updates=1,
            **fields,
        )


class Rollouts(Grpo):
    """GRPO's settings of draws and measures; what is drawn in training is not rewarded."""

    @property
    def judged(self) -> tuple[str, ...]:
        """Only the held-out part."""
        return ("heldout",)


class Teacher(NamedTuple):
    """The student's configuration with the teacher's model and weights, and the texts of its tokenizer by file."""

    config: Config
    tokenizer: dict[str, str]


def check_distillation(settings: Distillation, config: Config) -> None:
    """Refuse settings that do not go together or would not do what they say.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    if not settings.teacher:
        raise ValueError(f"{PATH}.teacher is empty; name a run's workdir, or a folder in Hugging Face's format")
    if settings.teacher.startswith(origin.WHOLE):
        raise ValueError(f"{PATH}.teacher = {shown(settings.teacher)!r}: leave {origin.WHOLE!r} out, it has no moments")
    if settings.accuracy not in NAMES:
        raise ValueError(f"{PATH}.accuracy = {shown(repr(settings.accuracy))} is unknown; choose one of {NAMES}")
    with own_names():
        check_grpo(settings.rollouts, config)


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Let an error about a setting that GRPO has too name this stage's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(grpo_settings.PATH, PATH)) from error


def find_teacher(settings: Distillation, config: Config) -> Teacher:
    """Find the teacher, whose weights are not read yet.

    Raises:
        ValueError: it does not exist, is damaged, or has another vocabulary than the student.
    """
    named = config.with_(training={"initial_weights": settings.teacher})
    try:
        found = find_origin(named)
        assert found is not None  # `check_distillation` refuses ""
        model = read_config(found.folder).model if found.run else read_model(read_released_config(found.folder))
        named = dataclasses.replace(named, model=model)
        tokenizer = read_tokenizer(found.folder) if found.run else initial_tokenizer(named)
    except ValueError as error:
        raise ValueError(f"the teacher: {str(error).replace(origin.KEY, f'{PATH}.teacher')}") from error
    if model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{PATH}.teacher = {shown(settings.teacher)!r} has model.vocab_size = {model.vocab_size}, and the student"
            f" {config.model.vocab_size}: both must say how likely the same tokens are; train a student with the"
            " teacher's tokenizer and vocabulary, or fine-tune it on the teacher's texts"
        )
    return Teacher(named, tokenizer)


def check_same_tokens(settings: Distillation, teacher: dict[str, str], student: dict[str, str]) -> None:
    """Refuse a teacher whose ids stand for other texts than the student's.

    Raises:
        ValueError: the tokenizers differ; the message names the first part that does.
    """
    name = "tokenizer.json"
    theirs, ours = json.loads(teacher[name]), json.loads(student[name])
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        if theirs.get(part) != ours.get(part):
            raise ValueError(
                f"{PATH}.teacher = {shown(settings.teacher)!r} has another tokenizer than the student ({part!r} of"
                f" {name} differs), so its probabilities are of other texts; take a student of the same tokenizer, or"
                " fine-tune one on the teacher's texts"
            )
