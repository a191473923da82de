"""The batches of GRPO: each rollout samples, rewards and scores, and is taken in as many parts as it has updates.

    prompts -> samples by the engine -> rewards -> advantages
            -> log-probabilities by the trainer's network, of the weights that sampled and of the reference -> parts

A thread makes the rollouts, one after the other. That whose first update is number n (from 0) is drawn by the weights
of n - `staleness` updates (of 0, if that is less) and begins as soon as there are these. With 0 the trainer waits for
it (synchronous). With 1 it is made while the trainer takes the update before; r2(w1) is rollout 2 by the weights of 1
update, u2 the update that takes it:

    staleness 0   trainer               u0                u1
                  sampler     r0(w0)          r1(w1)            r2(w2)
    staleness 1   trainer               u0       u1       u2
                  sampler     r0(w0)    r1(w0)   r2(w1)   r3(w2)

So which weights draw a sample follows from its number and not from who was faster: both modes have the same numbers
whenever they run. The alternative, to take the newest weights that there are, is fresher by less than one update where
the sampler is slower, and no run could be made again. The ratios of the loss divide by the log-probabilities of the
weights that sampled, so they are what corrects for older ones.

The position is the number of the next prompt, and the parts that are not yet taken, whole: the weights that drew them
are gone once the next update is made. It waits for all rollouts that have begun, up to `staleness` + 1. So a run that
continues trains on each sample once. A rollout that failed is told, is not in it, and is made again, by the weights of
that moment, which are newer.
"""

import base64
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from deepseek_jax.inference.engine import Engine
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.advantages import advantages, punishment
from deepseek_jax.posttraining.choices import Choices
from deepseek_jax.posttraining.grpo_settings import PATH, Grpo
from deepseek_jax.posttraining.policy_metrics import rollout_row
from deepseek_jax.posttraining.problems import Problems
from deepseek_jax.posttraining.reference import Reference
from deepseek_jax.posttraining.rewards.pool import RewardError, RewardPool
from deepseek_jax.posttraining.rollouts import carries_loss, make_batch, prompt_at, routes_of, sample_groups
from deepseek_jax.posttraining.scoring import Scored, flipped
from deepseek_jax.training.journal import say
from deepseek_jax.training.loop import Row

Arrays = dict[str, np.ndarray]


class Part(NamedTuple):
    """What one update trains on, and the row of the metrics of its rollout."""

    batch: Arrays
    row: Row


class Rollout(NamedTuple):
    """What the thread is to make."""

    number: int  # of its first prompt
    size: int  # prompts
    version: int  # updates that its weights have had
    parts: Future[list[Part]]

    def __str__(self) -> str:
        """Say which one."""
        last = self.number + self.size - 1
        return f"the rollout of prompts {self.number} to {last} by the weights of {self.version} updates"


@dataclasses.dataclass(kw_only=True)
class PolicyBatches:
    """A `training.loop.Batches`; `follow` the trainer's weights before the first batch.

    Attributes:
        grpo: settings.
        choices: of the variant.
        problems: to train on.
        engine: samples; the weights of others come in at every rollout.
        pool: rewards.
        score: (weights, batch) -> scores of the targets by the trainer; called by the thread.
        whole: returns the weights that the network computes with, from those of a state; of these all others here are.
        exact: batch -> the same by the engine, in exact arithmetic, with its present weights; None in fast arithmetic.
        sampler: the thread of the rollouts, one. Whoever else uses the engine does so in it.
        length: of rows.
        pad: id of padding.
        seed: of the run.
        step: updates taken.
        last: updates of the whole run; no rollout begins for later ones.
        reference: of the KL; None without one.
    """

    grpo: Grpo
    choices: Choices
    problems: Problems
    engine: Engine
    pool: RewardPool
    score: Callable[[Weights, Arrays], Scored]
    whole: Callable[[Weights], Weights]
    exact: Callable[[Arrays], Scored] | None = None
    sampler: Executor
    length: int
    pad: int
    seed: int
    step: int = 0
    last: int
    reference: Reference | None

    def __post_init__(self):
        """Begin at the first prompt."""
        self.weights: Callable[[], Weights] | None = None
        self.show: Callable[[str], None] | None = None
        self.number = 0
        self.pending: deque[Part] = deque()
        self.ahead: deque[Rollout] = deque()  # behind what is pending
        self.waited = 0.0  # seconds, for rollouts of updates that are not yet taken
        self.rows: dict[int, Row] = {}  # by step, of steps whose metrics are not yet read

    def follow(self, weights: Callable[[], Weights], show: Callable[[str], None] | None = None) -> None:
        """Sample with the weights that this returns: those of `step` updates; `show` lines for a person, or print.

        The trainer may not overwrite them while a rollout is made: with a staleness above 0 they are a copy.
        """
        self.weights, self.show = weights, show

    def next_batch(self, batch_size: int) -> Arrays:
        """Return the next part of the present rollout, or the first of the next one; wait until it is made.

        Raises:
            RewardError: a reward failed, and the run is to stop.
            RuntimeError: a sample was not finished.
        """
        self._begin(batch_size)
        start = time.perf_counter()
        if not self.pending:
            self.pending.extend(_made(self.ahead[0], self.grpo.on_failure))
            self.ahead.popleft()
        waited, self.waited = self.waited + time.perf_counter() - start, 0.0
        part = self.pending.popleft()
        age = self.step - part.row["rollout/version"]
        if self.exact and age:  # other weights than those that scored it
            assert self.weights is not None
            found = self.sampler.submit(self._exactly, self.weights(), self.step, part.batch).result()
            part = part._replace(batch=part.batch | found)
        self.step += 1
        self.rows[self.step] = part.row | {"policy/staleness": age, "rollout/waited": waited}
        return part.batch

    def row_of(self, step: int) -> Row:
        """Return the row of a step's rollout; rows of steps before are forgotten."""
        self.rows = {number: row for number, row in self.rows.items() if number >= step}
        return self.rows[step]

    def state(self) -> dict[str, Any]:
        """Return the position (JSON), once all rollouts that have begun are made; one that failed is told and left."""
        start = time.perf_counter()
        if number := sum(not rollout.parts.done() for rollout in self.ahead):
            say(f"waiting for {number} rollout{'s' * (number > 1)} before saving ...", self.show)
        while self.ahead:
            if error := self.ahead[0].parts.exception():  # the trainer may end before it comes to it
                logging.warning("%s has failed, and is made again later: %s", self.ahead[0], _told(error))
                break
            self.pending.extend(self.ahead.popleft().parts.result())
        self.waited += time.perf_counter() - start
        parts = [
            {"batch": {name: _packed(x) for name, x in part.batch.items()}, "row": part.row} for part in self.pending
        ]
        return {
            "prompt": self.ahead[0].number if self.ahead else self.number,
            "parts": parts,
            "problems": self.problems.fingerprint,
        } | (self.reference.state() if self.reference else {"reference": ""})

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
        if self.reference:
            self.reference.check(position)
        self.number = position["prompt"]
        self.pending = deque(
            Part({name: _unpacked(x) for name, x in part["batch"].items()}, part["row"]) for part in position["parts"]
        )

    def _begin(self, batch_size: int) -> None:
        """Let the rollouts begin that are to be drawn by the present weights."""
        assert self.weights is not None
        grpo, size = self.grpo, batch_size * self.grpo.updates // self.grpo.group_size
        weights: Weights | None = None
        if self.reference and self.reference.is_due(self.step):
            weights = self.weights()
            self.reference.replace(self.step, weights)
        behind = self.reference.weights if self.reference else None
        while True:
            first = len(self.pending) + grpo.updates * len(self.ahead)  # updates until the next rollout's
            if first > grpo.staleness or self.step + first >= self.last:
                return
            weights = self.weights() if weights is None else weights
            numbers = range(self.number, self.number + size)
            parts = self.sampler.submit(self._roll_out, weights, behind, self.step, numbers, batch_size)
            self.ahead.append(Rollout(self.number, size, self.step, parts))
            self.number += size

    def _exactly(self, weights: Weights, version: int, batch: Arrays) -> Arrays:
        """Return what the forward pass of an update is to have: values and routes of the engine's, by these weights."""
        assert self.exact is not None
        self.engine.update_weights(self.whole(weights), version=version)
        return _replaced(self.exact(batch))

    def _roll_out(
        self, weights: Weights, reference: Weights | None, version: int, numbers: range, batch_size: int
    ) -> list[Part]:
        """Make a rollout; it depends on nothing else that changes."""
        grpo, choices = self.grpo, self.choices
        jax.block_until_ready(weights)  # by the update before, which is not the rollout's time
        start = time.perf_counter()
        self.engine.update_weights(self.whole(weights), version=version)
        prompts = [self.problems.train[prompt_at(n, len(self.problems.train), self.seed)] for n in numbers]
        keyed = [(number, prompt.ids) for number, prompt in zip(numbers, prompts, strict=True)]
        drawing = {"routes": True} | grpo.drawing
        samples = sample_groups(self.engine, keyed, grpo.group_size, grpo.max_new_tokens, self.seed, **drawing)
        sampled = time.perf_counter()
        scores = self.pool.score(
            [prompt.problem for prompt in prompts for _ in range(grpo.group_size)], [s.text for s in samples]
        )
        totals = np.array([s.total for s in scores])
        totals += punishment(choices, np.array([len(s.ids) for s in samples]), grpo.max_new_tokens)
        rewards_PG = totals.reshape(len(numbers), grpo.group_size)
        right = np.array([s.parts[grpo.accuracy] == 1.0 for s in scores])
        kept = carries_loss(choices, samples, right.reshape(rewards_PG.shape))
        values = advantages(rewards_PG, choices.advantage_scale).reshape(-1)
        batch = make_batch(samples, values, kept, self.length, self.pad)
        own, routes_BSLK = dict(batch), routes_of(samples, self.length)
        if grpo.replay_routes and routes_BSLK is not None:
            batch["routes_BSLK"] = routes_BSLK
        scored = self.exact(batch) if self.exact else self.score(weights, batch)
        batch["old_logprobs_BS"] = scored.logprobs_BS
        if reference is not None:  # it has routes of its own
            batch["reference_logprobs_BS"] = self.score(reference, own).logprobs_BS
        flips = flipped(batch, routes_BSLK, scored.routes_BSLK)
        if self.exact:
            batch |= _replaced(scored)
        seconds = {"sampling": sampled - start, "rollout": time.perf_counter() - start}
        row = rollout_row(samples, scores, rewards_PG, batch, seconds, grpo.accuracy, flips)
        cut = [{name: x[i : i + batch_size] for name, x in batch.items()} for i in range(0, len(samples), batch_size)]
        return [Part(part, row) for part in cut]


def _replaced(scored: Scored) -> Arrays:
    """Return the values and routes that the forward pass of an update is to have."""
    assert scored.routes_BSLK is not None, "exact arithmetic tells routes"
    return {"exact_logprobs_BS": scored.logprobs_BS, "routes_BSLK": scored.routes_BSLK}


def _made(rollout: Rollout, on_failure: str) -> list[Part]:
    """Wait for a rollout; an error says which it was."""
    try:
        return rollout.parts.result()
    except RewardError as error:
        remedy = f"; with {PATH}.on_failure = 'zero' such a reward counts 0" if on_failure == "stop" else ""
        raise RewardError(
            f"{error}\n{rollout} has ended the run; its last checkpoint stays, and the same command continues{remedy}"
        ) from error
    except Exception as error:
        error.add_note(f"in {rollout}; the run's last checkpoint stays, and the same command continues")
        raise


def _told(error: BaseException | None) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _packed(x: np.ndarray) -> dict[str, Any]:
    """Return an array as JSON, to the bit."""
    return {"dtype": x.dtype.str, "shape": list(x.shape), "bytes": base64.b64encode(x.tobytes()).decode()}


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(packed["bytes"])
    return np.frombuffer(data, packed["dtype"]).reshape(packed["shape"]).copy()
