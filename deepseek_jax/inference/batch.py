"""The device's side of the engine: rows that open and close while others decode, over one cache of pages.

    batch = DeviceBatch(config, weights, mesh, num_rows=128, num_pages=20_000, num_positions=4096, eos=1)
    batch.compile()
    batch.open_row(3, RowSettings(sampling=sampling, max_new_tokens=100))
    batch.set_table(3, table_J)                            # room for what the next step writes
    step = batch.step([Piece(3, ids, is_last=True)], rows_B)  # returns at once
    result = step.read()                                   # waits: the first token of row 3, one of each row of rows_B

Which pages a row has is for the host to decide (`pages.PagedSequence`). Last tokens, lengths, what is left, and what
has ended stay on the device. So a step can be dispatched before the one before it is read: a row that has ended takes
no part in it, and writes nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.inference.pages import Copy
from deepseek_jax.inference.requests import PLAIN, Request
from deepseek_jax.inference.sampling import Logprobs, Sampling
from deepseek_jax.parameters import Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What the device needs to know of a job when its row opens.

    Attributes:
        sampling: how tokens are chosen.
        own: seed, bias and log-probabilities; `own.num_logprobs` stands before that of `sampling`.
        seed: of the draws where `own` has none, with `number`: as `seed` and the row's number in `requests.make_rows`.
        number: of the request.
        max_new_tokens: the row ends after so many more; 0: no token is chosen.
        end_ids: the row ends with any of these, beside EOS. The device knows the first `MOST_END_IDS` only.
        ignore_eos: EOS ends nothing.
        prompt: its ids; read only where there are penalties.
        output: ids that the job had made when it was preempted, which now stand behind its prompt; read as `prompt` is.
        length: tokens that its pages have already: those of a known prefix.
        masked: the row has a grammar: `set_mask` comes before each step that chooses a token for it.
    """

    sampling: Sampling
    own: Request = PLAIN
    seed: int = 0
    number: int = 0
    max_new_tokens: int
    end_ids: Sequence[int] = ()
    ignore_eos: bool = False
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    length: int = 0
    masked: bool = False


class Piece(NamedTuple):
    """Tokens of a row's prompt that go through the model behind those that went before.

    Attributes:
        row: its number.
        ids: at least one.
        is_last: the first new token is chosen after these.
        logprobs: log-probabilities are wanted of the tokens that follow each of these.
        following: with `logprobs`, the token behind the piece, where the prompt has one.
    """

    row: int
    ids: Sequence[int]
    is_last: bool
    logprobs: bool = False
    following: int | None = None


class StepResult(NamedTuple):
    """What a step made; all NumPy.

    Attributes:
        tokens_BK: int32 new tokens of each row; K is 1, or 1 + `num_drafts`. `sampling.NO_TOKEN` where the logits were
            not numbers: the row has ended.
        counts_B: int32, how many of them are there; 0 where none was chosen, or the row had ended before.
        finished_B: bool, rows that have ended by themselves: the last token is an end id, the last of `max_new_tokens`,
            or `NO_TOKEN`. Also rows that are not open.
        logprobs: of new tokens, [B, K] and [B, K, `MOST_LOGPROBS`], where a row of the step asks for them.
        prompt_logprobs: by row, of pieces that ask: [n] and [n, `MOST_LOGPROBS`], for the tokens behind each of a
            piece's, n its tokens, or one less if nothing follows.
    """

    tokens_BK: np.ndarray
    counts_B: np.ndarray
    finished_B: np.ndarray
    logprobs: Logprobs | None
    prompt_logprobs: dict[int, Logprobs]


class Step:
    """A step on its way."""

    def read(self) -> StepResult:
        """Wait for the step, and return what it made; a second call returns the same."""
        raise NotImplementedError


class DeviceBatch:
    """Weights, pages and rows on the devices of a mesh, and the programs of a step.

    Attributes:
        num_rows: at least as many as were asked for: each device has as many, and a GPU a multiple of 16.
        num_devices: that rows are split over. Device d has the rows from d * num_rows / num_devices on, and `num_pages`
            pages of its own; page numbers are those on the row's device.
        num_pages: of each device.
        num_columns: of a row's table, J.
        most_prefill_tokens: of a device in a step.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        mesh: jax.sharding.Mesh,
        *,
        num_rows: int,
        num_pages: int,
        num_positions: int,
        eos: int,
        most_prefill_tokens: int = 2048,
        num_drafts: int = 0,
    ):
        """Place weights and an empty cache.

        Args:
            config: model and execution.
            weights: as the training state has them, or in FP8; the head may lack ids that no token has.
            mesh: the mesh that decodes.
            num_rows: jobs that run at once, at least.
            num_pages: of each device, 64 tokens each.
            num_positions: of the longest row: prompt and new tokens.
            eos: ends every row that does not ignore it.
            most_prefill_tokens: of a device in a step; a power of two from 128 on.
            num_drafts: tokens that the MTP layer drafts for each row, up to 3.

        Raises:
            ValueError: sizes out of range, or a cache that the devices cannot hold.
        """
        raise NotImplementedError

    def compile(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile all programs, at most 12; later none is compiled. `progress(done, all)` is called after each."""
        raise NotImplementedError

    def device_of(self, row: int) -> int:
        """Return the number of the device that has a row, whose pages the row's table means."""
        raise NotImplementedError

    def open_row(self, row: int, settings: RowSettings) -> None:
        """Begin a job in a closed row; it is on the device with the next step.

        Raises:
            ValueError: the row is open, or the bias has an id that is no token, or more ids than a row can have.
        """
        raise NotImplementedError

    def close_row(self, row: int) -> None:
        """Let a row's job go, whether it has ended or not; nothing is written for it from the next step on."""
        raise NotImplementedError

    def set_table(self, row: int, table: Sequence[int]) -> None:
        """Give a row the pages `table`, in order, from the next step on."""
        raise NotImplementedError

    def copy_pages(self, row: int, copies: Sequence[Copy]) -> None:
        """Copy pages of the row's device, in their order, before the next step writes."""
        raise NotImplementedError

    def set_mask(self, row: int, words_W: np.ndarray) -> None:
        """Say which tokens may be chosen next for a `masked` row: bit i of int32 word w is token 32 w + i."""
        raise NotImplementedError

    def step(self, pieces: Sequence[Piece], rows_B: np.ndarray) -> Step:
        """Dispatch a step, and return at once.

        Args:
            pieces: prompts, at most one piece of a row, and `most_prefill_tokens` of a device in all. Those that are
                the last give the first token.
            rows_B: bool, rows that decode: for which a token has been chosen, perhaps in a step that is not read yet.
                A row that has ended takes no part. A row may not be in `pieces`, too.

        Raises:
            ValueError: too many tokens; a row that is not open, or is in both; a masked row without a new mask.
        """
        raise NotImplementedError

    def update_weights(self, weights: Weights) -> None:
        """Go on with other weights of the same shapes; the next step is the first with them.

        What the pages of open rows have stays: close them first, and forget the prefixes (`PagePool.forget`). Raises
        ValueError for other shapes, before anything is changed.
        """
        raise NotImplementedError
