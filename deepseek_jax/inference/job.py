"""What goes into the engine, and what comes out of it: jobs, and the deltas of their texts.

    engine.submit(job, listener) -> Ticket       listener(delta) ... listener(delta with a finish_reason)

A job always ends with exactly one delta that has a `finish_reason`, whatever happens to it.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.requests import PLAIN, Request
from deepseek_jax.inference.sampling import Sampling

# Why a text ended. An "error" has a message in its delta.
STOP, LENGTH, CANCELLED, DEADLINE, ERROR = "stop", "length", "cancelled", "deadline", "error"


class QueueFullError(RuntimeError):
    """As many jobs wait as may wait; `retry_after` seconds from now there may be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The engine takes no jobs any more."""


class Grammar(Protocol):
    """What a text must be, and how much of it is there. One object belongs to one text."""

    def fill(self, words_W: np.ndarray) -> None:
        """Write which tokens may come next: bit i of int32 word w is token 32 w + i, W = ceil(V / 32)."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind a token, one that may come."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were accepted."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt and all that is wanted of what follows.

    Attributes:
        prompt: ids, BOS included.
        max_new_tokens: at most this many follow; 0 where only the prompt's log-probabilities are wanted.
        sampling: how a token is chosen. Jobs with different settings share a batch.
        own: seed, bias, log-probabilities (`own.num_logprobs` stands before that of `sampling`).
        stop: the text ends before the first of these texts, or tokens by id.
        ignore_eos: go on behind EOS, to `max_new_tokens`.
        keep_end: EOS, or the stop token, comes along in `Delta.ids`, with its log-probability: training needs it. It
            has no text.
        priority: jobs with more begin earlier, and are preempted later.
        deadline: of `time.monotonic`, when the job ends wherever it stands.
        grammar: called once for the text.
        prompt_logprobs: log-probabilities of the prompt's tokens come along, and so many of the most probable.
        spelled: texts that stand for tokens, special ones that would be left out among them.
        salt: jobs with different salts share no pages.
        routes: the experts of every token come along.
        kept: with the log-probability of each token comes what it was drawn among (`completions.Drawn`).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    own: Request = PLAIN
    stop: Sequence[str | int] = ()
    ignore_eos: bool = False
    keep_end: bool = False
    priority: int = 0
    deadline: float | None = None
    grammar: Callable[[], Grammar] | None = None
    prompt_logprobs: int | None = None
    spelled: Mapping[int, str] = dataclasses.field(default_factory=dict)
    salt: Hashable = None
    routes: bool = False
    kept: bool = False


class Usage(NamedTuple):
    """What a job has used so far."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, that another job had left in the cache
    completion_tokens: int  # those of a stop string included, EOS not
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones


class Delta(NamedTuple):
    """What came since the last one.

    Attributes:
        text: that will not change any more; may be empty.
        ids: of the tokens, those that have no whole character yet included; EOS and a stop token only for
            `Job.keep_end`.
        logprobs: of `ids`, where they are wanted.
        finish_reason: of the last delta: `STOP`, `LENGTH`, `CANCELLED`, `DEADLINE` or `ERROR`.
        usage: of the whole job.
        version: of the weights that made these tokens.
        prompt_logprobs: in the first delta, where they are wanted; None for the first token, which nothing precedes.
        routes_TLK: uint8 or uint16 experts of the tokens that went through the model since the last delta, in order,
            the prompt's included where they were not cached; [T, MoE layers, K].
        error: what went wrong, in one line.
    """

    text: str
    ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    usage: Usage
    version: int
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routes_TLK: np.ndarray | None = None
    error: str | None = None


# Called by the engine's thread; it must return at once. If it raises, the log says so once, and its job is cancelled:
# it is called for the last delta only.
Listener = Callable[[Delta], None]


class Ticket(Protocol):
    """A job that was submitted."""

    def cancel(self) -> None:
        """End the job, from any thread; its last delta says `CANCELLED`. Does nothing if it has ended."""
        ...


class Stats(NamedTuple):
    """An engine at one moment; what counts, counts from its start."""

    waiting: int
    running: int
    rows: int  # most that may run
    pages_used: int  # held by jobs
    pages_kept: int  # of prefixes, held by nobody
    pages: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int
    finished: dict[str, int]  # jobs by finish_reason
    drafted: tuple[int, ...] = ()  # by position in the draft
    accepted: tuple[int, ...] = ()
    expert_load_LE: np.ndarray | None = None  # tokens that each expert of each MoE layer had
    version: int = 0
    paused: bool = False
    steps: int = 0
    error: str | None = None  # why the engine has stopped, if it has


class TextEngine(Protocol):
    """The engine as the server sees it."""

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Queue a job, from any thread.

        Raises:
            ValueError: the job cannot be done: its prompt is empty, too long for `max_new_tokens`, larger than the
                cache, or has ids beyond the vocabulary, ...
            QueueFullError: too many wait.
            ClosedError: the engine is closing.
        """
        ...

    def stats(self) -> Stats:
        """Return where the engine stands, from any thread."""
        ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more jobs, let those that are there end for so long, and end the rest as `CANCELLED`."""
        ...
