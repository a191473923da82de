"""The batches of on-policy distillation: answers of the student's present weights, and what its metrics are called."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import LENGTH
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.grpo_settings import Grpo
from deepseek_jax.posttraining.problems import Problems
from deepseek_jax.posttraining.rollouts import make_batch, prompt_at, sample_groups
from deepseek_jax.training.loop import Row
from deepseek_jax.training.metrics import KEYS

READ = "tokens_BS", "targets_BS", "positions_BS", "segment_ids_BS", "loss_weights_BS"
UPDATE = {
    "loss": "mean reverse KL of student and teacher, exact, nats per token of an answer",
    "sampled_kl": "its estimate by the drawn tokens alone, nats per token",
    "entropy": "of the student, exact, nats per token",
    "agreement": "share of tokens at which both find the same successor the likeliest",
    "tokens": "of answers in this update",
}
ROLLOUT = {
    "length": "mean tokens of an answer, EOS included",
    "cut_off": "share of answers that ended at the limit",
    "first_prompt": "number of the first prompt in the run",
    "tokens_per_second": "drawn tokens over the time of sampling",
}
EVALUATION = {
    "accuracy": "share of held-out problems that greedy answers of the student solve",
    "accuracy_low": "lower end of Wilson's 95% interval",
    "accuracy_high": "upper end of Wilson's 95% interval",
    "problems": "held-out problems",
    "length": "mean tokens of a held-out answer, EOS included",
    "cut_off": "share of held-out answers that ended at the limit",
}
SECTIONS = {"distillation": UPDATE, "rollout": ROLLOUT, "eval": EVALUATION}
DISTILLATION_KEYS = KEYS | {f"{name}/{key}": text for name, keys in SECTIONS.items() for key, text in keys.items()}


class Answers:
    """The student's answers to prompt after prompt: a `training.loop.Batches`; `follow` its weights before the first.

    The position is the number of the next prompt.
    """

    def __init__(self, grpo: Grpo, problems: Problems, engine: Engine, length: int, seed: int, teacher: str):
        """Begin at the first prompt; rows have `length` tokens, and `teacher` is a fingerprint."""
        self.grpo, self.problems, self.engine = grpo, problems, engine
        self.length, self.seed, self.teacher = length, seed, teacher
        self.weights: Callable[[], Weights] | None = None
        self.number = self.step = 0
        self.rows: dict[int, Row] = {}  # by step, of steps whose metrics are not yet read

    def follow(self, weights: Callable[[], Weights], step: int) -> None:
        """Answer with the weights that this returns at each batch; `step` updates are done."""
        self.weights, self.step = weights, step

    def next_batch(self, batch_size: int) -> dict[str, np.ndarray]:
        """Return `batch_size` answers by the student's weights of this moment, one a row.

        Raises:
            RuntimeError: an answer was not finished.
        """
        assert self.weights is not None
        grpo, train = self.grpo, self.problems.train
        self.step += 1
        self.engine.update_weights(self.weights(), version=self.step - 1)
        numbers = range(self.number, self.number + batch_size // grpo.group_size)
        keyed = [(number, train[prompt_at(number, len(train), self.seed)].ids) for number in numbers]
        start = time.perf_counter()
        samples = sample_groups(self.engine, keyed, grpo.group_size, grpo.max_new_tokens, self.seed)
        seconds = time.perf_counter() - start
        lengths = [len(sample.ids) for sample in samples]
        values = {
            "length": float(np.mean(lengths)),
            "cut_off": float(np.mean([sample.finish_reason == LENGTH for sample in samples])),
            "first_prompt": self.number,
            "tokens_per_second": sum(lengths) / seconds,
        }
        self.rows[self.step] = {f"rollout/{key}": value for key, value in values.items()}
        self.number += len(keyed)
        everything = np.ones(len(samples), bool)
        batch = make_batch(samples, np.zeros(len(samples)), everything, self.length, self.engine.tokenizer.pad)
        return {name: batch[name] for name in READ}

    def row_of(self, step: int) -> Row:
        """Return the row of a step's answers; rows of steps before are forgotten."""
        self.rows = {number: row for number, row in self.rows.items() if number >= step}
        return self.rows[step]

    def state(self) -> dict[str, Any]:
        """Return the position (JSON)."""
        return {"prompt": self.number, "problems": self.problems.fingerprint, "teacher": self.teacher}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ValueError: it is of other problems, or of another teacher.
        """
        other = "or begin another run with its weights: --initial with another --workdir"
        if position["problems"] != self.problems.fingerprint:
            raise ValueError(f"the run's problems have changed since its checkpoint; put the former back, {other}")
        if position["teacher"] != self.teacher:
            raise ValueError(
                "the run's teacher has changed since its checkpoint; put the former back (of a teacher that has trained"
                f" on, name the step: 'workdir@step'), {other}"
            )
        self.number = position["prompt"]
