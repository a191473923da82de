"""Which jobs run in the next step of the engine, and with which tokens and pages. Policy alone: no JAX, no threads.

Order. Jobs are ranked by when they came; each step of priority counts as `PATIENCE` seconds earlier:

    rank = (time of submission - PATIENCE * priority, number)

So jobs of one priority are first come, first served; a job with more priority overtakes those of the last seconds; and
no job waits forever, because at some time every newer one ranks behind it, whatever its priority. Ranks decide who gets
a row, whose prompt is read first, and, from the other end, whose pages are taken. Nobody overtakes the first that
waits: a large job is not starved by small ones that would fit beside it.

A step. Every running job gets its next token. What the step's budget of prompt tokens leaves goes to prompts in the
order of ranks, in pieces, so a long prompt delays no token of the others by more than a step of bounded size. Example
with a budget of 100 tokens:

    prompts of        A 250   B 30
    step 1            A 100                     A's row is opened, with pages for its whole prompt
    step 2            A 100
    step 3            A 50, B 30                both get their first token with this step
    step 4            one token of A, one of B

Pages. A job that waits is let in when its whole prompt fits and every running job can take one page more. When a
running job needs a page and there is none, the job that ranks last gives its pages back and waits again, with the
tokens that it has so far as part of its prompt. The first of all always gets what it needs, so it ends, and so does
everybody behind it.

One step ahead. A step is planned before the last one is read. What a job may have by then is counted as if all were
accepted, so its pages are there; tokens that come for a job that waits again are kept.

Bursts. Where the device can choose several tokens of a row in one step (`burst`), it does so while that keeps nobody
waiting: no prompt is read or could begin, no job has a grammar, and none has fewer tokens left. A job that comes during
a burst waits for its end.

In bulk, callers wait for whole answers, as rollouts do. Then the host's time for a step counts more than when a job
begins or ends: bursts also run while few rows are free (a sixteenth) and for jobs with fewer tokens left, which stand
still to the end of the burst. Jobs that wait begin in the next step that is none, as many as its tokens allow.

A job whose next page is just being written by another one's prompt waits until that is done, and shares it.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.member import Lane, Member, Piece
from deepseek_jax.inference.page_pool import PAGE_SIZE, FullError, PagePool
from deepseek_jax.inference.pages import PagedSequence

PATIENCE = 10.0  # seconds that one step of priority is worth
ALL, BEGUN = "all", "begun"  # who may be let in
IDLE_PART = 16  # in bulk, one of so many rows may be free in a burst while jobs wait


class Plan(NamedTuple):
    """A step. Rows are closed first, then opened, then tables are set."""

    closed: list[int]
    opened: list[Member]
    tables: list[tuple[Member, np.ndarray]]  # pages of those whose pages have changed, those of `opened` too
    pieces: list[Piece]
    decodes: list[Member]
    num_tokens: int = 1  # of each of `decodes`

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.pieces or self.decodes)


class _Budget:
    """What of prompts a device takes in a step."""

    def __init__(self, num_tokens: int, num_pieces: int):
        self._num_tokens, self._num_pieces = num_tokens, num_pieces

    def __bool__(self) -> bool:
        return self._num_tokens > 0 and self._num_pieces > 0

    def piece(self, member: Member) -> Piece:
        """Take the next tokens of a prompt, as many as there are left."""
        num_tokens = min(member.num_unsent, self._num_tokens)
        self._num_tokens -= num_tokens
        self._num_pieces -= 1
        return member.send(num_tokens)


def _rank(member: Member) -> tuple[float, int]:
    return member.rank


class Scheduler:
    """The jobs that wait and those that run, the first in rank first."""

    def __init__(
        self,
        pools: Sequence[PagePool],
        num_rows: int,
        most_prefill_tokens: int,
        num_drafts: int = 0,
        beside: int = 0,
        most_pieces: int = 16,
        burst: int = 1,
        burst_rows: int = 0,
        bulk: bool = False,
    ):
        """Begin with no job.

        Args:
            pools: pages of each device; device d has the rows from d * `num_rows` / devices on.
            num_rows: of all devices.
            most_prefill_tokens: tokens of prompts that a device takes in a step.
            num_drafts: tokens that a step may choose beyond the first; a burst as many beyond each.
            beside: as `most_prefill_tokens`, in a step in which tokens are chosen for others; 0 for the same.
            most_pieces: of prompts on a device in such a step: more take the time of several calls.
            burst: tokens that the device surely chooses of a row in one step, until it ends; 1 for no bursts.
            burst_rows: the first rows of each device, which alone can have bursts.
            bulk: bursts may keep jobs waiting, and `most_pieces` does not count.
        """
        each = num_rows // len(pools)
        self.lanes = [Lane(pool, range(i * each, (i + 1) * each)) for i, pool in enumerate(pools)]
        self.waiting: list[Member] = []
        self.running: list[Member] = []
        self.num_preemptions = 0
        self._most, self._beside = most_prefill_tokens, beside or most_prefill_tokens
        self._num_drafts, self._most_pieces = num_drafts, most_prefill_tokens if bulk else most_pieces
        self._burst, self._burst_rows = burst, burst_rows
        self._idle = each // IDLE_PART if bulk else 0  # rows of a device that may be free beside a burst
        self._fewest = 1 if bulk else burst  # tokens that a job may have left in a burst
        self._closed: list[int] = []  # rows, since the last plan
        self._changed: dict[Member, None] = {}  # whose tables the device has not
        self._blocked: Member | None = None  # the first that waits, if since it was tried nobody has left

    def add(self, member: Member) -> None:
        """Let a job wait."""
        bisect.insort(self.waiting, member, key=_rank)

    def end(self, member: Member) -> None:
        """Take a job out, wherever it is; full pages of it stay known."""
        if member.ended:
            return
        if not member.is_running:
            del self.waiting[bisect.bisect_left(self.waiting, member.rank, key=_rank)]
        else:
            self._leave(member)
        member.end()

    def land(self, member: Member, ids: Sequence[int]) -> None:
        """Take what a step has chosen for a job; nothing if it has ended."""
        if not member.ended and member.land(ids):
            self._changed[member] = None

    def preempt(self, member: Member) -> None:
        """Let a running job wait again; it goes on behind the tokens that it has."""
        self._leave(member)
        self.add(member)
        self.num_preemptions += 1

    def plan(self, admit: str = ALL) -> Plan:
        """Return the next step; its rows count as running, its tokens as sent.

        With `admit` = `BEGUN` nobody gets a row who has not had one before.
        """
        num_tokens = self._burst if self._may_burst() else 1
        decodes = self._decode(num_tokens)
        most = self._beside if decodes else self._most
        budgets = {lane: _Budget(most, self._most_pieces if decodes else most) for lane in self.lanes}
        unsent = [member for member in self.running if member.num_unsent]
        pieces = [budgets[member.lane].piece(member) for member in unsent if budgets[member.lane]]
        opened = [] if decodes and num_tokens > 1 else self._admit(budgets, admit, pieces)
        tables = [(member, member.table()) for member in self._changed]
        plan = Plan(self._closed, opened, tables, pieces, decodes, num_tokens)
        self._closed, self._changed = [], {}
        for piece in pieces:  # with all done: what this step writes, only later ones find
            if piece.member.commit(piece.end):
                self._changed[piece.member] = None
        return plan

    def _may_burst(self) -> bool:
        """Return whether a burst keeps nobody waiting, and there are pages for it."""
        if self._burst == 1 or (self.waiting and any(len(lane.free_rows) > self._idle for lane in self.lanes)):
            return False
        missing: dict[Lane, int] = {}
        for member in self.running:
            lane, num_left = member.lane, member.num_left
            is_first = member.row - lane.first_row < self._burst_rows
            if member.num_unsent or member.masked or not is_first or 0 < num_left < self._fewest:
                return False
            num_pages = -(-max(member.num_missing(self._num_drafts, self._burst), 0) // PAGE_SIZE)
            missing[lane] = missing.get(lane, 0) + num_pages
        return all(num_pages <= lane.pool.num_available for lane, num_pages in missing.items())

    def _decode(self, num_tokens: int) -> list[Member]:
        """Return who gets its next tokens; the last in rank give way where pages are missing."""
        decodes = []
        for member in list(self.running):
            if member.is_running and member.can_decode() and self._has_room(member, num_tokens):
                member.decode(num_tokens)
                decodes.append(member)
        return decodes

    def _has_room(self, member: Member, num_tokens: int) -> bool:
        """Get the page that a job may need; False if it had to give way itself."""
        missing = member.num_missing(self._num_drafts, num_tokens)
        while missing > 0:
            try:
                member.grow(missing)
            except FullError:
                victim = next(other for other in reversed(self.running) if other.lane is member.lane)
                self.preempt(victim)
                if victim is member:
                    return False
            else:
                self._changed[member] = None
                return True
        return True

    def _admit(self, budgets: "dict[Lane, _Budget]", admit: str, pieces: list[Piece]) -> list[Member]:
        """Give rows, pages and a piece to those that wait, in their order; the first that finds no pages ends it."""
        opened: list[Member] = []
        if not any(budgets[lane] and lane.free_rows for lane in self.lanes):
            return opened
        for member in list(self.waiting):
            if member.in_flight or member.must_follow() or (admit == BEGUN and not member.has_begun):
                continue
            lanes = [lane for lane in self.lanes if budgets[lane] and lane.free_rows]
            if not lanes:
                break
            outcome = None if member is self._blocked else self._open(member, lanes)
            if outcome is None:
                self._blocked = member
                break
            if outcome:
                opened.append(member)
                pieces.append(budgets[member.lane].piece(member))
        return opened

    def _open(self, member: Member, lanes: Sequence[Lane]) -> bool | None:
        """Give a row to a job where most of its prompt is known; None if nowhere are pages, False if it follows."""
        known = member.ids[:1] if member.from_start else member.ids
        tries = [(lane, PagedSequence.open(lane.pool, known, member.salt)) for lane in lanes]
        tries.sort(key=lambda pair: (-len(pair[1]), -pair[0].pool.num_available))
        opened: bool | None = None
        for lane, sequence in tries:
            if opened is None:
                opened = self._take(member, lane, sequence)
            if not opened or member.lane is not lane:
                sequence.close()
        return opened

    def _take(self, member: Member, lane: Lane, sequence: PagedSequence) -> bool | None:
        other = None if member.from_start else self._writer(member, lane, len(sequence))
        if other is not None:
            member.follow(other)
            return False
        num_pages = -(-len(member.ids) // PAGE_SIZE) - sequence.num_pages
        num_running = lane.num_rows - len(lane.free_rows)
        if num_pages + num_running > lane.pool.num_available:
            return None
        sequence.reserve(len(member.ids) - len(sequence))
        member.open(lane, sequence)
        bisect.insort(self.running, member, key=_rank)
        del self.waiting[bisect.bisect_left(self.waiting, member.rank, key=_rank)]
        self._changed[member] = None
        return True

    def _writer(self, member: Member, lane: Lane, num_known: int) -> Member | None:
        """Return who is about to write the page of the prompt behind those that are known."""
        end = num_known // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE
        if end >= len(member.ids):
            return None
        for other in self.running:
            writes = other.lane is lane and other.will_write(end) and other.salt == member.salt
            if writes and other.ids[end - 1] == member.ids[end - 1] and other.ids[:end] == member.ids[:end]:
                return other
        return None

    def _leave(self, member: Member) -> None:
        """Take a job out of its row."""
        del self.running[bisect.bisect_left(self.running, member.rank, key=_rank)]
        self._closed.append(member.row)
        self._changed.pop(member, None)
        member.close()
        self._blocked = None
