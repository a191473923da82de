"""The batches of GRPO: each rollout samples, rewards and scores, and is taken in as many parts as it has updates.

    prompts -> samples by the engine, with the weights of this moment -> rewards -> advantages
            -> log-probabilities by the trainer's network, of these weights and of the reference -> parts

The position is the number of the next prompt, and the parts of the present rollout that are not yet taken, whole: the
weights that drew them are gone once the first part is trained on. So a run that continues trains on each sample once.
"""

import base64
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.inference.engine import Engine
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.advantages import advantages, punishment
from deepseek_jax.posttraining.choices import Choices
from deepseek_jax.posttraining.grpo_settings import Grpo
from deepseek_jax.posttraining.policy_metrics import rollout_row
from deepseek_jax.posttraining.problems import Problems
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.posttraining.rollouts import carries_loss, make_batch, prompt_at, sample_groups
from deepseek_jax.training.loop import Row

Arrays = dict[str, np.ndarray]


class Part(NamedTuple):
    """What one update trains on, and the row of the metrics of its rollout."""

    batch: Arrays
    row: Row


@dataclasses.dataclass(kw_only=True)
class PolicyBatches:
    """A `training.loop.Batches`; `follow` the trainer's weights before the first batch.

    Attributes:
        grpo: settings.
        choices: of the variant.
        problems: to train on.
        engine: samples; the weights of others come in at every rollout.
        pool: rewards.
        score: (weights, batch) -> log-probabilities of the targets, FP32 [B, S]; `reference` None: of the reference.
        length: of rows.
        pad: id of padding.
        seed: of the run.
        step: updates taken.
        reference: names the weights of the reference; "" without one.
    """

    grpo: Grpo
    choices: Choices
    problems: Problems
    engine: Engine
    pool: RewardPool
    score: Callable[[Weights | None, Arrays], np.ndarray]
    length: int
    pad: int
    seed: int
    step: int = 0
    reference: str = ""

    def __post_init__(self):
        """Begin at the first prompt."""
        self.weights: Callable[[], Weights] | None = None
        self.number = 0
        self.pending: list[Part] = []
        self.rows: dict[int, Row] = {}  # by step, of steps whose metrics are not yet read

    def follow(self, weights: Callable[[], Weights]) -> None:
        """Sample with the weights that this returns at each rollout."""
        self.weights = weights

    def next_batch(self, batch_size: int) -> Arrays:
        """Return the next part of the present rollout, or the first of a new one.

        Raises:
            RewardError: a reward failed, and the run is to stop.
            RuntimeError: a sample was not finished.
        """
        if not self.pending:
            self.pending = self._roll_out(batch_size)
        part = self.pending.pop(0)
        self.step += 1
        self.rows[self.step] = part.row
        return part.batch

    def row_of(self, step: int) -> Row:
        """Return the row of a step's rollout; rows of steps before are forgotten."""
        self.rows = {number: row for number, row in self.rows.items() if number >= step}
        return self.rows[step]

    def state(self) -> dict[str, Any]:
        """Return the position (JSON)."""
        parts = [
            {"batch": {name: _packed(x) for name, x in part.batch.items()}, "row": part.row} for part in self.pending
        ]
        return {
            "prompt": self.number,
            "parts": parts,
            "problems": self.problems.fingerprint,
            "reference": self.reference,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ValueError: it is of other problems, or of another reference.
        """
        if position["problems"] != self.problems.fingerprint:
            raise ValueError(
                "the run's problems, template or tokenizer have changed since its checkpoint; put them back, or begin"
                " another run with its weights: --initial with another --workdir"
            )
        if position["reference"] != self.reference:
            raise ValueError(
                "training.initial_weights are other weights than this run began with, and the KL reference is those;"
                " put them back, name their step ('workdir@step'), or begin another run with --initial"
            )
        self.number = position["prompt"]
        self.pending = [
            Part({name: _unpacked(x) for name, x in part["batch"].items()}, part["row"]) for part in position["parts"]
        ]

    def _roll_out(self, batch_size: int) -> list[Part]:
        grpo, choices = self.grpo, self.choices
        assert self.weights is not None
        weights, start = self.weights(), time.perf_counter()
        self.engine.update_weights(weights, version=self.step)
        size = batch_size * grpo.updates // grpo.group_size
        numbers = range(self.number, self.number + size)
        prompts = [self.problems.train[prompt_at(n, len(self.problems.train), self.seed)] for n in numbers]
        keyed = [(number, prompt.ids) for number, prompt in zip(numbers, prompts, strict=True)]
        samples = sample_groups(self.engine, keyed, grpo.group_size, grpo.max_new_tokens, self.seed)
        sampled = time.perf_counter()
        scores = self.pool.score(
            [prompt.problem for prompt in prompts for _ in range(grpo.group_size)], [s.text for s in samples]
        )
        totals = np.array([s.total for s in scores])
        totals += punishment(choices, np.array([len(s.ids) for s in samples]), grpo.max_new_tokens)
        rewards_PG = totals.reshape(size, grpo.group_size)
        kept = carries_loss(choices, samples, rewards_PG)
        values = advantages(rewards_PG, choices.advantage_scale).reshape(-1)
        batch = make_batch(samples, values, kept, self.length, self.pad)
        batch["old_logprobs_BS"] = self.score(weights, batch)
        if choices.kl_weight:
            batch["reference_logprobs_BS"] = self.score(None, batch)
        seconds = {"sampling": sampled - start, "rollout": time.perf_counter() - start}
        row = rollout_row(samples, scores, rewards_PG, batch, seconds, grpo.accuracy)
        self.number += size
        cut = [{name: x[i : i + batch_size] for name, x in batch.items()} for i in range(0, len(samples), batch_size)]
        return [Part(part, row) for part in cut]


def _packed(x: np.ndarray) -> dict[str, Any]:
    """Return an array as JSON, to the bit."""
    return {"dtype": x.dtype.str, "shape": list(x.shape), "bytes": base64.b64encode(x.tobytes()).decode()}


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(packed["bytes"])
    return np.frombuffer(data, packed["dtype"]).reshape(packed["shape"]).copy()
