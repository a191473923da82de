"""The texts of one request while they are made: deltas come from the engine's thread into the event loop.

The engine calls a listener for every token of every text. Waking the loop each time would cost more than the answer, so
all listeners of a server put into one `Mailbox`, which wakes the loop once for whatever has come meanwhile. Where the
loop falls behind, the deltas of a text that wait become one: chunks get longer, and nobody waits longer.
"""

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Sequence

from deepseek_jax.inference.job import ClosedError, Delta, Job, QueueFullError, TextEngine, Ticket
from deepseek_jax.serving.errors import ApiError

GRACE_SECONDS = 60.0  # behind a job's deadline, when an engine that says nothing is taken for dead
Arrival = tuple[int, Delta]  # the number of the job in its request, and what came


class Mailbox:
    """Hands deltas from any thread to the queues of requests in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        """Deliver into `loop`."""
        self._loop = loop
        self._arrived: collections.deque[tuple[asyncio.Queue, Arrival]] = collections.deque()
        self._woken = False

    def put(self, queue: asyncio.Queue, arrival: Arrival) -> None:
        """Deliver an arrival soon; from any thread."""
        self._arrived.append((queue, arrival))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has ended, and with it all who would read
                self._arrived.clear()

    def _deliver(self) -> None:
        self._woken = False  # before the first look: what comes from now on wakes anew
        while self._arrived:
            queue, arrival = self._arrived.popleft()
            queue.put_nowait(arrival)


class Answers:
    """The jobs of one request, as a context: on leaving it, those that have not ended are cancelled."""

    def __init__(self, engine: TextEngine, mailbox: Mailbox, jobs: Sequence[Job], heartbeat_seconds: float):
        """Submit nothing yet."""
        self._engine, self._mailbox, self._jobs, self._heartbeat = engine, mailbox, jobs, heartbeat_seconds
        self._queue: asyncio.Queue[Arrival] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._left = len(jobs)

    def __enter__(self) -> "Answers":
        """Submit all jobs, or none.

        Raises:
            ApiError: the engine refuses one of them.
        """
        try:
            for i, job in enumerate(self._jobs):
                self._tickets[i] = self._engine.submit(job, self._listener(i))
        except BaseException as error:
            self.__exit__()
            if isinstance(error, ValueError):
                raise ApiError(400, str(error), code="invalid_value") from error
            if isinstance(error, QueueFullError):
                seconds = max(1, round(error.retry_after))
                headers = {"Retry-After": str(seconds)}
                message = f"too many requests wait; try again in {seconds} s"
                raise ApiError(429, message, code="queue_full", headers=headers) from error
            if isinstance(error, ClosedError):
                raise closing() from error
            raise
        return self

    def __exit__(self, *_) -> None:
        """Cancel what has not ended."""
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()

    async def __aiter__(self) -> AsyncIterator[Arrival | None]:
        """Yield what comes, and None whenever nothing has come for `heartbeat_seconds`; ends with the last job.

        Raises:
            ApiError: the engine says nothing long after the deadline.
        """
        deadlines = [job.deadline for job in self._jobs]
        while self._left:
            try:
                number, delta = await asyncio.wait_for(self._queue.get(), self._heartbeat)
            except TimeoutError:
                if all(end is not None and time.monotonic() > end + GRACE_SECONDS for end in deadlines):
                    raise ApiError(500, "the engine does not answer", code="engine_silent") from None
                yield None
                continue
            waiting = {number: [delta]}
            while not self._queue.empty():
                number, delta = self._queue.get_nowait()
                waiting.setdefault(number, []).append(delta)
            for number, deltas in waiting.items():
                delta = joined(deltas)
                if delta.finish_reason is not None:
                    self._left -= 1
                    self._tickets.pop(number, None)
                yield number, delta

    def _listener(self, number: int):
        return lambda delta: self._mailbox.put(self._queue, (number, delta))


def joined(deltas: Sequence[Delta]) -> Delta:
    """Return deltas of one text as one."""
    if len(deltas) == 1:
        return deltas[0]
    found = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return deltas[-1]._replace(
        text="".join(delta.text for delta in deltas),
        ids=[token for delta in deltas for token in delta.ids],
        logprobs=[one for own in found for one in own] if found else None,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


def closing() -> ApiError:
    """Return what a client is told while the server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
