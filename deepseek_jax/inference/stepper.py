"""The engine's thread: it plans steps, dispatches them one ahead, reads them, and tells the listeners.

    turn    take in requests, end what is over its deadline
            plan step n + 1, dispatch it
            read step n, tell its tokens

So the device has step n + 1 while the host makes text of step n. A job that ends with step n, by a stop string, may be
in step n + 1: what comes of it is dropped. If the device fails, every job ends with `ERROR`, and the thread ends.
"""

import heapq
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.counters import Counters
from deepseek_jax.inference.device import Device, Dispatched
from deepseek_jax.inference.inbox import Inbox
from deepseek_jax.inference.job import CANCELLED, DEADLINE, ERROR, LENGTH, ClosedError
from deepseek_jax.inference.member import Member, Piece
from deepseek_jax.inference.page_pool import PagePool
from deepseek_jax.inference.reply import Reply
from deepseek_jax.inference.row_state import RowSettings
from deepseek_jax.inference.sampling import Logprobs
from deepseek_jax.inference.scheduler import ALL, BEGUN, Plan, Scheduler
from deepseek_jax.inference.step import Piece as RowPiece
from deepseek_jax.inference.step import StepResult

FINISH, KEEP, RECOMPUTE, ABORT = "finish", "keep", "recompute", "abort"  # what becomes of running jobs at a change


class Change(NamedTuple):
    """Something that is done while no step is under way."""

    running: str
    apply: Callable[[], None]
    done: Future


class _Ahead(NamedTuple):
    """A step that was dispatched and not read."""

    step: Dispatched
    pieces: list[tuple[int, Piece]]  # with their rows
    choosing: list[tuple[int, Member]]  # who gets tokens


class Stepper:
    """What the engine's thread has. Its methods are called by that thread, but for `run`'s start."""

    def __init__(self, batch: Device, inbox: Inbox, seed: int, version: int, beside: int):
        """Begin without jobs; `seed` is that of jobs without one; see `Scheduler` for `beside`."""
        self._batch, self._inbox, self._seed = batch, inbox, seed
        self.pools = [PagePool(batch.num_pages, min(batch.num_drafts, 1)) for _ in range(batch.num_devices)]
        sizes = batch.num_rows, batch.most_prefill_tokens, batch.num_drafts, beside, batch.most_pieces
        self.scheduler = Scheduler(self.pools, *sizes, batch.burst, batch.burst_rows, batch.bulk)
        self.counters = Counters(batch.num_drafts)
        self.version = version
        self.is_paused = False
        self.error: str | None = None
        self._ahead: _Ahead | None = None
        self._is_idle = False
        self._deadlines: list[tuple[float, int, Member]] = []
        self._changes: deque[Change] = deque()
        self._closes_at: float | None = None

    def run(self) -> None:
        """Do everything until the engine is closed or the device fails."""
        try:
            while self._turn():
                pass
            why, reason = "the engine is closed", CANCELLED
        except BaseException as error:
            line = str(error).splitlines()[0] if str(error) else ""
            why, reason = f"the engine has stopped: {type(error).__name__}: {line}", ERROR
            self.error = why
            logging.getLogger(__name__).exception("the engine has stopped; its jobs end with an error")
        try:
            for request in self._inbox.close(why):
                request()
            for member in self._members():
                self._end(member, reason, self.error)
            if self.error is None:  # another engine may take the batch
                self._dispatch(self.scheduler.plan())
        finally:  # a thread waits for each of them
            for change in self._changes:
                change.done.set_exception(sys.exception() or ClosedError(why))
            self._inbox.tell(0)

    def add(self, member: Member) -> None:
        """Let a job wait."""
        self.scheduler.add(member)
        deadline = member.owner.job.deadline
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, member.rank[1], member))

    def cancel(self, member: Member) -> None:
        """End a job, if it has not ended."""
        self._end(member, CANCELLED)

    def change(self, change: Change) -> None:
        """Do something as soon as no step is under way and the running jobs are where it wants them."""
        self._changes.append(change)

    def pause(self) -> None:
        """Plan no steps."""
        self.is_paused = True

    def resume(self) -> None:
        """Plan steps again."""
        self.is_paused = False

    def take_weights(self, update: Callable[[], None], version: int | None) -> None:
        """Carry out `update`, forget the entries of the old weights, and count the version."""
        update()
        for pool in self.pools:
            pool.forget()
        self.version = self.version + 1 if version is None else version

    def close(self, at: float) -> None:
        """End when no job is left, or `at` this moment."""
        self._closes_at = at

    def _members(self) -> list[Member]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def _turn(self) -> bool:
        for request in self._inbox.take(self._patience() if self._is_idle else 0.0):
            request()
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].ended):
            self._end(heapq.heappop(self._deadlines)[2], DEADLINE)
        if self._closes_at is not None and (self.is_paused or now >= self._closes_at or not self._members()):
            return False
        change = self._changes[0] if self._changes else None
        if change and self._prepare(change):
            self._is_idle = False
            return True
        stands_still = self.is_paused or (change and change.running != FINISH)
        plan = None if stands_still else self.scheduler.plan(BEGUN if change else ALL)
        self._inbox.tell(len(self.scheduler.waiting))
        step = self._dispatch(plan) if plan is not None else None
        ahead, self._ahead = self._ahead, step
        if ahead:
            self._read(ahead)
        self._is_idle = ahead is None and step is None
        return True

    def _patience(self) -> float | None:
        """Return how long nothing will happen unless somebody asks."""
        moments = [self._deadlines[0][0]] if self._deadlines else []
        if self._closes_at is not None:
            moments.append(self._closes_at)
        return max(min(moments) - time.monotonic(), 0.0) if moments else None

    def _prepare(self, change: Change) -> bool:
        """Carry a change out if its time has come."""
        begun = [member for member in self._members() if member.has_begun]
        if change.running == ABORT:
            for member in begun:
                self._end(member, CANCELLED)
        elif change.running == FINISH and begun and self.is_paused:
            self._changes.popleft()
            change.done.set_exception(
                RuntimeError(f"{len(begun)} jobs cannot finish while the engine is paused; resume it first")
            )
            return True
        if self._ahead or (change.running == FINISH and begun):
            return False
        self._changes.popleft()
        if change.running == RECOMPUTE:
            for member in list(self.scheduler.running):
                self.scheduler.preempt(member)
        try:
            change.apply()
        except ValueError as error:
            change.done.set_exception(error)
        except BaseException as error:
            change.done.set_exception(error)
            raise
        else:
            change.done.set_result(None)
        return True

    def _dispatch(self, plan: Plan) -> _Ahead | None:
        """Give the device what a plan says; None if that is no step."""
        batch = self._batch
        for row in plan.closed:
            batch.close_row(row)
        for member in plan.opened:
            batch.open_row(member.row, self._settings(member))
        for member, table_P in plan.tables:
            batch.set_table(member.row, table_P)
        if not plan:
            return None
        decodes_B = np.zeros(batch.num_rows, bool)
        decodes_B[[member.row for member in plan.decodes]] = True
        pieces = [(piece.member.row, piece) for piece in plan.pieces]
        last = [(row, piece.member) for row, piece in pieces if piece.is_last]
        choosing = [(member.row, member) for member in plan.decodes] + last
        for row, member in choosing:
            if member.masked:
                batch.set_mask(row, *member.owner.masks)
        step = batch.step([_row_piece(row, piece) for row, piece in pieces], decodes_B, plan.num_tokens)
        self.counters.step()
        return _Ahead(step, pieces, choosing)

    def _settings(self, member: Member) -> RowSettings:
        """Return what a row is opened with."""
        reply: Reply = member.owner
        job = reply.job
        if reply.begin(member.cached):
            self.counters.begin(member.num_prompt, member.cached)
        seed, number = (self._seed, member.rank[1]) if job.own.seed is None else (job.own.seed, 0)
        return RowSettings(
            sampling=job.sampling,
            own=job.own,
            seed=seed,
            number=number & 0xFFFFFFFF,
            max_new_tokens=member.most - len(member.ids),
            end_ids=[token for token in job.stop if not isinstance(token, str)],
            ignore_eos=job.ignore_eos,
            prompt=job.prompt,
            output=member.ids[member.num_prompt :],
            length=member.start,
            masked=member.masked,
            routes=job.routes,
            kept=job.kept,
        )

    def _read(self, ahead: _Ahead) -> None:
        """Wait for a step, and tell its tokens."""
        result = ahead.step.read()
        for row, piece in ahead.pieces:
            reply: Reply = piece.member.owner
            if row in result.prompt_logprobs:
                reply.add_prompt_logprobs(piece.begin, result.prompt_logprobs[row])
            if row in result.routes:
                reply.add_routes(piece.begin, result.routes[row])
        pieces = {row for row, _ in ahead.pieces}
        tokens, counts = result.tokens_BK.tolist(), result.counts_B.tolist()
        for row, member in ahead.choosing:
            if member.ended:
                continue
            ids = tokens[row][: counts[row]]
            if row not in pieces:
                self._note(member, row, result, len(ids))
            self.scheduler.land(member, ids)
            self._tell(member, ids, result.logprobs_of(row), int(result.guess_B[row]))

    def _note(self, member: Member, row: int, result: StepResult, count: int) -> None:
        """Count the drafts of a row, and keep its routes."""
        if row in result.routes:
            member.owner.add_routes(len(member.ids) - 1, result.routes[row])
        if result.drafts_BN2 is not None and count:
            for drafted, accepted in result.drafts_BN2[row].tolist():
                member.owner.add_drafts(drafted, accepted)
                self.counters.draft(drafted, accepted)

    def _tell(self, member: Member, ids: list[int], logprobs: Logprobs | None, guess: int) -> None:
        """Tell a job's tokens, and end it if it has ended."""
        reply: Reply = member.owner
        if not reply.job.max_new_tokens:
            self._end(member, LENGTH)
        elif ids:
            before = reply.num_tokens
            try:
                reason = reply.receive(ids, logprobs, self.version, guess)
            except Exception as error:  # of this job alone: its grammar, or its logits
                self._end(member, ERROR, str(error))
                return
            self.counters.add(reply.num_tokens - before)
            if reason:
                self._leave(member, reason)
            elif reply.is_unheard:
                self._end(member, CANCELLED)

    def _end(self, member: Member, reason: str, error: str | None = None) -> None:
        """End a job that has not ended, and tell so."""
        if not member.ended:
            self._leave(member, reason)
            member.owner.finish(reason, self.version, error)

    def _leave(self, member: Member, reason: str) -> None:
        self.scheduler.end(member)
        self.counters.end(reason)
        self._inbox.note_end()


def _row_piece(row: int, piece: Piece) -> RowPiece:
    """Return a piece as the device takes it."""
    member, wants = piece.member, piece.member.owner.wants_whole_prompt
    following = member.ids[piece.end] if piece.end < len(member.ids) else None
    return RowPiece(row, member.ids[piece.begin : piece.end], piece.is_last, wants, following)
