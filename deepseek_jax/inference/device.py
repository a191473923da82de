"""What the engine's host side needs of the device's side (`batch.DeviceBatch`); tests have one without a model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepseek_jax.inference.job import Job
from deepseek_jax.inference.row_state import RowSettings
from deepseek_jax.inference.step import Piece, StepResult
from deepseek_jax.parameters import Weights


class Dispatched(Protocol):
    """A step that the device has or will have carried out."""

    def read(self) -> StepResult:
        """Wait for it, and return what it has made."""
        ...


class Device(Protocol):
    """Rows and pages; one thread calls it, but for `check`.

    Attributes:
        num_rows: of all devices; device d has the rows from d * num_rows / num_devices on.
        num_devices: each has pages of its own.
        num_pages: of each device.
        num_positions: the longest sequence, prompt and new tokens.
        vocab_size: ids beyond it are no tokens.
        most_prefill_tokens: of each device in a step.
        most_pieces: of each device that go through the model in one call; a step with more takes several.
        num_drafts: tokens that a step may choose beyond the first.
        burst: tokens of a row that one step can choose without drafts; 1 where there are no bursts.
        burst_rows: the first rows of each device, which alone can have bursts.
        bulk: callers wait for whole answers, so bursts may keep jobs waiting (`scheduler`).
    """

    num_rows: int
    num_devices: int
    num_pages: int
    num_positions: int
    vocab_size: int
    most_prefill_tokens: int
    most_pieces: int
    num_drafts: int
    burst: int
    burst_rows: int
    bulk: bool

    def check(self, job: Job) -> None:
        """Refuse, with a ValueError, a job that asks for something that no row can do."""
        ...

    def expert_load(self) -> np.ndarray:
        """Return how many tokens each expert of each MoE layer has had, [L, E]; from any thread, without waiting."""
        ...

    def open_row(self, row: int, settings: RowSettings) -> None:
        """Give a row to a job."""
        ...

    def close_row(self, row: int) -> None:
        """Let a row take no part in steps dispatched from now on."""
        ...

    def set_table(self, row: int, table: Sequence[int] | np.ndarray) -> None:
        """Say which pages a row has from the next step on, in order."""
        ...

    def set_mask(self, row: int, words_W: np.ndarray, draft: int, behind_W: np.ndarray) -> None:
        """Say which tokens a row may choose in the next step, as `job.Grammar.fill` writes them.

        `draft` is what it may draft, one that may come, and `behind_W` what may come behind it; `NO_TOKEN` for nothing.
        """
        ...

    def step(self, pieces: Sequence[Piece], rows_B: np.ndarray, num_tokens: int) -> Dispatched:
        """Dispatch pieces of prompts, at most one a row, and tokens of each row that decodes; return at once.

        `num_tokens` is 1, or `burst` where nobody needs the host between its tokens.
        """
        ...

    def update_weights(self, weights: Weights) -> None:
        """Take other weights of the same shapes; a ValueError leaves the old ones."""
        ...
