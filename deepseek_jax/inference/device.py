"""What the host tells the device before a step of the engine, and what it reads after it.

A step takes pieces of prompts, and one token more of each row that decodes. A row is the place of one running job; its
pages are in the pool of its device. The host may dispatch a step before it has read the last one: the device keeps the
last token, the length, and whether it has ended, of each row.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from deepseek_jax.inference.job import Job
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Logprobs, Sampling
from deepseek_jax.parameters import Weights


class RowSettings(NamedTuple):
    """What a row is opened with.

    Attributes:
        prompt: ids of the job's prompt: for the repetition penalty, and the targets of `prompt_logprobs`.
        made: ids that the job has made already, if it was preempted: for all penalties.
        start: tokens of `prompt` and `made` that the row's pages have already. The rest comes in pieces.
        max_new_tokens: that may still come, after `made`.
        ends: ids that end the row, EOS among them unless it is ignored.
        sampling: how a token is chosen.
        own: bias, and log-probabilities (`own.num_logprobs` stands before that of `sampling`).
        seed: of the draws, with `number` as `requests.row_keys` has it.
        number: see `seed`.
        masked: it takes part in a step that chooses a token for it only after `set_mask`.
        prompt_logprobs: those of the prompt are wanted, and so many of the most probable.
        routes: the experts of its tokens are wanted.
    """

    prompt: Sequence[int]
    made: Sequence[int]
    start: int
    max_new_tokens: int
    ends: frozenset[int]
    sampling: Sampling
    own: Request
    seed: int
    number: int
    masked: bool = False
    prompt_logprobs: int | None = None
    routes: bool = False


class Piece(NamedTuple):
    """Tokens of one prompt that go through the model in a step; after the last piece a token is chosen."""

    row: int
    ids: Sequence[int]
    is_last: bool


class StepResult(NamedTuple):
    """What a step has made, on the host.

    Attributes:
        tokens_BK: int32, chosen by each row; K is 1, or the number of drafts plus 1. `sampling.NO_TOKEN` where the
            logits are not numbers.
        counts_B: how many of them count; 0 for a row that chose nothing, or had ended.
        logprobs: of `tokens_BK`, [B, K] and [B, K, T], where any row wants them.
        prompt_logprobs: by row, of its piece: entry i belongs to the token behind the piece's token i, so the last
            token of the prompt has none. [n] and [n, T].
        routes: by row, the experts of the tokens that went through the model, [n, MoE layers, K].
        drafted_B: how many drafts were verified, if any.
    """

    tokens_BK: np.ndarray
    counts_B: np.ndarray
    logprobs: Logprobs | None = None
    prompt_logprobs: dict[int, Logprobs] = {}
    routes: dict[int, np.ndarray] = {}
    drafted_B: np.ndarray | None = None


class Step(Protocol):
    """A step that the device has or will have carried out."""

    def read(self) -> StepResult:
        """Wait for it, and return what it has made."""
        ...


class Batch(Protocol):
    """The device side of the engine (`inference.batch.DeviceBatch`). One thread calls it.

    Attributes:
        num_rows: B, of all devices; device d has the rows from d * B / num_devices on.
        num_devices: each has pages of its own.
        num_pages: of each device.
        num_positions: the longest sequence, prompt and new tokens.
        vocab_size: ids beyond it are no tokens.
        most_prefill_tokens: of each device in a step.
        num_drafts: tokens that a step may choose beyond the first.
    """

    num_rows: int
    num_devices: int
    num_pages: int
    num_positions: int
    vocab_size: int
    most_prefill_tokens: int
    num_drafts: int

    def check(self, job: Job) -> None:
        """Refuse, with a ValueError, a job that asks for something that no row can do."""
        ...

    def open_row(self, row: int, settings: RowSettings) -> None:
        """Give a row to a job, with the next step."""
        ...

    def close_row(self, row: int) -> None:
        """Let a row take no part in steps dispatched from now on."""
        ...

    def set_table(self, row: int, pages: Sequence[int]) -> None:
        """Say which pages a row has from the next step on, in order."""
        ...

    def set_mask(self, row: int, words_W: np.ndarray) -> None:
        """Say which tokens a row may choose in the next step, as `job.Grammar.fill` writes them."""
        ...

    def step(self, pieces: Sequence[Piece], decodes_B: np.ndarray) -> Step:
        """Dispatch pieces of prompts, at most one a row, and a token of each row that decodes; return at once."""
        ...

    def update_weights(self, weights: Weights) -> None:
        """Take other weights of the same shapes; a ValueError leaves the old ones."""
        ...
