"""A job as the scheduler sees it: its tokens, its row and its pages, and what of it the device was already given."""

import heapq
from array import array
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.inference.page_pool import PAGE_SIZE, PagePool
from deepseek_jax.inference.pages import PagedSequence

NOWHERE = -1  # in place of a row


class Lane:
    """A device: its pages, and the rows that are free."""

    def __init__(self, pool: PagePool, rows: Sequence[int]):
        """Begin with all rows free."""
        self.pool = pool
        self.first_row, self.num_rows = rows[0], len(rows)
        self.free_rows = sorted(rows)  # a heap: the lowest row goes first, because only the first rows run in bursts


class Member:
    """A job as the scheduler sees it. `Scheduler` alone changes it.

    Attributes:
        owner: whatever the caller keeps with it.
        rank: smaller ones come first.
        ids: the prompt, and what has followed it and was read.
        num_prompt: of them, those of the prompt.
        row: where it runs, or `NOWHERE`.
        cached: tokens of its prompt that it found in the cache when it began; -1 before.
        start: tokens that its row had when it was opened.
        ended: it is neither running nor waiting any more.
    """

    __slots__ = (
        "_flights", "_follows", "_lane", "_room", "_sent", "_sequence", "_target", "cached", "ended", "from_start",
        "ids", "masked", "most", "num_prompt", "owner", "rank", "row", "salt", "start",
    )  # fmt: skip

    def __init__(
        self,
        owner: Any,
        rank: tuple[float, int],
        prompt: Sequence[int],
        max_new_tokens: int,
        salt: Hashable = None,
        masked: bool = False,
        from_start: bool = False,
    ):
        """Describe a job; `masked`: a step waits for all its tokens; `from_start`: no prefix comes from the cache."""
        self.owner, self.rank, self.salt, self.masked, self.from_start = owner, rank, salt, masked, from_start
        self.ids = array("i", prompt)
        self.num_prompt = len(self.ids)
        self.most = self.num_prompt + max_new_tokens
        self.row, self.cached = NOWHERE, -1
        self.start = 0
        self.ended = False
        self._sequence: PagedSequence | None = None
        self._lane: Lane | None = None
        self._follows: Member | None = None  # whose prompt has pages that this one shares
        self._target = self._sent = 0  # of the prompt's tokens: those to send, and those sent
        self._flights: deque[int] = deque()  # of each step that is not read, the tokens that it surely gives
        self._room = 0  # tokens that its pages hold

    @property
    def num_made(self) -> int:
        """Tokens that have followed the prompt."""
        return len(self.ids) - self.num_prompt

    @property
    def has_begun(self) -> bool:
        """Whether it has a row, or has had one."""
        return self.cached >= 0

    @property
    def is_running(self) -> bool:
        """Whether it has a row."""
        return self.row != NOWHERE

    def table(self) -> np.ndarray:
        """Return the numbers of its pages, in order."""
        assert self._sequence is not None
        table_P = np.empty(self._sequence.num_pages, np.int32)
        self._sequence.fill(table_P)
        return table_P

    def open(self, lane: Lane, sequence: PagedSequence) -> None:
        """Run in a row of `lane` with the pages of `sequence`, which has room for all tokens so far."""
        self._lane, self._sequence, self.row = lane, sequence, heapq.heappop(lane.free_rows)
        self.start = self._sent = len(sequence)
        self._target, self._room = len(self.ids), PAGE_SIZE * sequence.num_pages
        if not self.has_begun:
            self.cached = self.start
        self._follows = None

    def close(self) -> None:
        """Give row and pages back."""
        assert self._sequence is not None and self._lane is not None
        self._sequence.close()
        heapq.heappush(self._lane.free_rows, self.row)
        self._sequence = self._lane = None
        self.row = NOWHERE

    def end(self) -> None:
        """Take part no more."""
        self.ended = True

    @property
    def num_unsent(self) -> int:
        """Tokens of its prompt that no step has taken yet."""
        return self._target - self._sent

    def send(self, num_tokens: int) -> "Piece":
        """Return the next tokens of the prompt, which go with the step that is planned."""
        piece = Piece(self, self._sent, self._sent + num_tokens, self._sent + num_tokens == self._target)
        self._sent += num_tokens
        if piece.is_last:
            self._flights.append(1)
        return piece

    def commit(self, num_tokens: int) -> bool:
        """Say that steps that are dispatched write the first `num_tokens`; return whether pages may have changed."""
        assert self._sequence is not None
        completes = self._sequence.completes(num_tokens)
        self._sequence.commit(self.ids[len(self._sequence) : num_tokens])
        return completes

    def can_decode(self) -> bool:
        """Whether the step that is planned chooses a token for it."""
        return self._sent == self._target and self.num_left > 0 and not (self.masked and self._flights)

    @property
    def num_left(self) -> int:
        """Tokens that it may get beyond those that are on their way."""
        return self.most - len(self.ids) - sum(self._flights)

    def num_missing(self, num_drafts: int, num_tokens: int = 1) -> int:
        """Return tokens for which it needs room beyond its pages, to decode in the step that is planned."""
        most = len(self.ids) + (sum(self._flights) + num_tokens) * (1 + num_drafts) - 1
        return min(most, self.most - 1 + num_drafts) - self._room

    def grow(self, num_tokens: int) -> None:
        """Get room for `num_tokens` more; FullError, with nothing changed, if there are no pages."""
        assert self._sequence is not None
        copies = self._sequence.reserve(self._room + num_tokens - len(self._sequence))
        assert not copies, "nobody forks, so no page is shared before it is full"
        self._room = PAGE_SIZE * self._sequence.num_pages

    def decode(self, num_tokens: int = 1) -> None:
        """Take part in the step that is planned, and get so many tokens, or those up to its end."""
        self._flights.append(num_tokens)

    def land(self, ids: Sequence[int]) -> bool:
        """Take what a step has chosen; return whether its table has changed."""
        self._flights.popleft()
        self.ids.extend(ids)
        if self._sequence is None:
            return False
        num_written = len(self.ids) - 1
        return self._sequence.completes(num_written) and self.commit(num_written)

    @property
    def in_flight(self) -> int:
        """Steps that choose tokens for it and are not read."""
        return len(self._flights)

    @property
    def lane(self) -> Lane:
        """The device that it runs on."""
        assert self._lane is not None
        return self._lane

    def will_write(self, num_tokens: int) -> bool:
        """Whether the first `num_tokens` go through the model with its prompt, and not all have yet."""
        return self._sequence is not None and len(self._sequence) < num_tokens <= self._target

    def follow(self, other: "Member") -> None:
        """Wait until the prompt of `other` is read."""
        self._follows = other

    def must_follow(self) -> bool:
        """Whether the prompt of the one that it follows is being read."""
        other = self._follows
        return other is not None and other.will_write(other.num_prompt)


class Piece(NamedTuple):
    """Tokens of a prompt, and whether they are the last: then the step chooses the next token."""

    member: Member
    begin: int
    end: int
    is_last: bool
