"""Whole answers, for callers that wait: the deltas of a job put together."""

import threading
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.job import Delta, Job, Listener, Usage


class Answer(NamedTuple):
    """All deltas of a job; see `job.Delta`.

    Attributes:
        versions: of the weights, one for each of `ids`.
        routes_TLK: of all tokens that went through the model, in order.
    """

    text: str
    ids: list[int]
    finish_reason: str
    usage: Usage
    versions: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routes_TLK: np.ndarray | None = None
    error: str | None = None


def join(deltas: list[Delta]) -> Answer:
    """Return the answer that the deltas of a job make, the last one included."""
    last = deltas[-1]
    assert last.finish_reason is not None, "the last delta says why the text ended"
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    routes = [delta.routes_TLK for delta in deltas if delta.routes_TLK is not None]
    return Answer(
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.ids],
        last.finish_reason,
        last.usage,
        [delta.version for delta in deltas for _ in delta.ids],
        logprobs,
        next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        np.concatenate(routes) if routes else None,
        last.error,
    )


class Answers:
    """The answers of several jobs while they come."""

    def __init__(self, jobs: list[Job]):
        """Begin with none."""
        self._deltas: list[list[Delta]] = [[] for _ in jobs]
        self._num_left = len(jobs)
        self._changed = threading.Condition()

    def listener(self, i: int) -> Listener:
        """Return the listener of job i."""
        deltas = self._deltas[i]

        def listen(delta: Delta) -> None:
            deltas.append(delta)
            if delta.finish_reason is not None:
                with self._changed:
                    self._num_left -= 1
                    self._changed.notify_all()

        return listen

    def wait_for_one(self, seconds: float) -> None:
        """Wait until a job ends, or for so long."""
        with self._changed:
            self._changed.wait(seconds)

    def wait(self) -> list[Answer]:
        """Wait for all jobs; return their answers in order."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_left == 0)
        return [join(deltas) for deltas in self._deltas]
