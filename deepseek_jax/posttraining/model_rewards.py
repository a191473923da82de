"""The score of a reward model as a reward of GRPO, beside the rules of a pool.

    posttraining.grpo.rewards = {"text": 0.0, "model": 1.0}
    posttraining.grpo.reward_model = "runs/reward"

The model runs on the trainer's devices, so it is no reward of a process (`rewards.pool`). It fails as those do: a score
that is NaN or infinite, an answer that does not fit a row, and scores that take longer than `reward_seconds` for a
batch of them; what then happens is `on_failure`. A program that is late cannot be stopped. It is left in its thread,
which does not keep the process alive, and the next batch waits for it, once more up to `reward_seconds`. If it has
returned, the batch is scored; if not, `RewardError` ends the run, whatever `on_failure` is, for all later scores would
be 0. So the host is never kept waiting for ever by a score. What the device does with a program that hangs is another
matter: an update that was sent to it behind such a program waits too.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from deepseek_jax.inputs import local_path, read_json, shown
from deepseek_jax.posttraining.beginning import dated
from deepseek_jax.posttraining.grpo_settings import MODEL, PATH, Grpo
from deepseek_jax.posttraining.problems import Problems
from deepseek_jax.posttraining.reward_model import encode_answer, preferences, score_answers, score_program
from deepseek_jax.posttraining.rewards import rewards_by_name
from deepseek_jax.posttraining.rewards.pool import SHOWN_CHARACTERS, RewardError, RewardPool, log
from deepseek_jax.posttraining.rewards.problem import Problem, Score
from deepseek_jax.posttraining.settings import FILE
from deepseek_jax.training.saved import stored_steps
from deepseek_jax.training.weights import restore_weights
from deepseek_jax.training.workdir import HUGGINGFACE, read_config

STAGE = "reward_model"


class ModelRewards(RewardPool):
    """A pool of rules with the score of a model: `score` gives both; `submit` the rules alone."""

    def __init__(self, grpo: Grpo, batch: int, scores: Callable[[list[tuple[Problem, str]]], np.ndarray]):
        """Take the settings; `scores` returns one number for each of at most `batch` problems with their answers."""
        rules = {name: float(weight) for name, weight in grpo.rewards.items() if name != MODEL}
        super().__init__(rewards_by_name([*rules]), rules, grpo.reward_workers, grpo.reward_seconds, grpo.on_failure)
        self._grpo, self._batch, self._scores = grpo, batch, scores
        self._late: threading.Thread | None = None  # a batch that its limit passed

    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Score]:
        """Return the scores of answers, in their order.

        Raises:
            ValueError: not as many problems as texts.
            RewardError: a reward failed and the policy is "stop"; or the model's program does not come back.
        """
        rules, weight = super().score(problems, texts), float(self._grpo.rewards[MODEL])
        pairs = [*zip(problems, texts, strict=True)]
        values = [
            value for i in range(0, len(pairs), self._batch) for value in self._within(pairs[i : i + self._batch])
        ]
        scores = []
        for (problem, text), rule, (value, failure) in zip(pairs, rules, values, strict=True):
            if failure:
                what = f"reward {MODEL!r} of problem {problem.name!r} {failure}; text: {text[:SHOWN_CHARACTERS]!r}"
                if self._grpo.on_failure == "stop":
                    raise RewardError(what)
                log.warning("%s; counted as 0", what)
            failed = (*rule.failed, MODEL) if failure else rule.failed
            scores.append(Score(rule.total + weight * value, {**rule.parts, MODEL: value}, failed))
        return scores

    def _within(self, pairs: list[tuple[Problem, str]]) -> list[tuple[float, str | None]]:
        """Return scores and what failed, of a batch, within the limit of time."""
        seconds = self._grpo.reward_seconds
        self._wait_for_late(seconds)
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(self._scores(pairs))
            except Exception as error:  # told by `score`
                outcome.append(error)

        thread = threading.Thread(target=run, name="reward model", daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome:
            self._late = thread
            return [(0.0, f"took longer than {seconds} s for {len(pairs)} answers")] * len(pairs)
        if isinstance(outcome[0], Exception):
            return [(0.0, f"raised {type(outcome[0]).__name__}: {outcome[0]}")] * len(pairs)
        return [(float(x), None) if math.isfinite(x) else (0.0, f"returned {x}") for x in outcome[0]]

    def _wait_for_late(self, seconds: float) -> None:
        """Let a batch that was late return.

        Raises:
            RewardError: it does not.
        """
        if self._late is None:
            return
        self._late.join(seconds)
        if self._late.is_alive():
            raise RewardError(
                f"reward {MODEL!r}: its program has not come back {seconds} s after a batch was late, so all later"
                f" scores would be 0; start the run again, with a larger {PATH}.reward_seconds if the device is slow"
            )
        self._late = None


def open_model_rewards(grpo: Grpo, problems: Problems, mesh: jax.sharding.Mesh) -> ModelRewards:
    """Read a reward model onto the mesh of a policy, compile it, and start the processes of the rules.

    Raises:
        ValueError: the folder holds no reward model, or one that was never saved in its training; its checkpoint cannot
            be read; or its rows are too short for the policy's problems and answers.
    """
    where = f"{PATH}.reward_model"
    folder = local_path(grpo.reward_model, where)
    section = read_json(folder / FILE) if (folder / FILE).exists() else {}
    if section.get("stage") != STAGE:
        raise ValueError(
            f"{where} = {shown(grpo.reward_model)!r} holds no reward model; train one: experiments.posttrain with the"
            f" stage {STAGE!r} (docs/rewards.md)"
        )
    if not max(stored_steps(folder), default=0):  # `restore_weights` would take its initial weights
        raise ValueError(
            f"{where} = {shown(grpo.reward_model)!r} has no checkpoint of a reward model that was trained; let its run"
            " train until its first save"
        )
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILES[0])
    # The one that it was trained with, whatever its name means now.
    template = dated(ChatTemplate.load(folder / HUGGINGFACE), folder)
    _check_rows(grpo, problems, config.data.sequence_length, template, tokenizer)
    with jax.set_mesh(mesh):
        weights, progress = restore_weights(config, folder, mesh)
        if not progress.step:
            raise ValueError(f"{where} = {shown(grpo.reward_model)!r}: all checkpoints above step 0 are damaged")
        program = score_program(config, preferences(config.model, config.loss, tokenizer.eos), mesh)
    sizes = config.training.micro_batch_size, config.data.sequence_length
    score = functools.partial(_scores, program, weights, sizes, template, tokenizer, mesh)
    score([])  # compiles, which no limit of time is for
    return ModelRewards(grpo, sizes[0], score)


def _check_rows(grpo: Grpo, problems: Problems, length: int, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuse rows in which not every answer has room; a text that is encoded again can still be longer than it was."""
    asked = [prompt.problem for prompt in problems.train + problems.heldout]
    longest, problem = max(((len(template.encode(tokenizer, p.messages)), p) for p in asked), key=lambda pair: pair[0])
    if (needed := longest + grpo.max_new_tokens + 1) > length:  # EOS behind an answer that was cut off
        raise ValueError(
            f"{PATH}.reward_model = {shown(grpo.reward_model)!r} has rows of data.sequence_length = {length} tokens,"
            f" and problem {shown(repr(problem.name))} with {PATH}.max_new_tokens = {grpo.max_new_tokens} needs"
            f" {needed}; train one with longer rows, or lower max_new_tokens"
        )


def _scores(
    program: Callable,
    weights: Any,
    sizes: tuple[int, int],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    pairs: list[tuple[Problem, str]],
) -> np.ndarray:
    """Return the scores of answers; NaN of those that do not fit a row."""
    answers = [encode_answer(template, tokenizer, problem.messages, text) for problem, text in pairs]
    fits = [len(ids) <= sizes[1] for ids in answers]
    rows = [ids if fit else [] for ids, fit in zip(answers, fits, strict=True)]
    with jax.set_mesh(mesh):  # of this thread
        found = score_answers(program, weights, rows or [[]], sizes, tokenizer.pad, mesh)[: len(answers)]
    return np.where(fits, found, np.nan)
