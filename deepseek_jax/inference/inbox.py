"""How other threads reach the engine's thread: what they ask for waits here."""

import threading
import time
from collections import deque
from collections.abc import Callable

from deepseek_jax.inference.job import ClosedError, QueueFullError

Request = Callable[[], None]  # carried out by the engine's thread
LONGEST_RETRY = 60.0  # seconds


class Inbox:
    """Requests in their order. `num_waiting` jobs in the engine's queue and those in here are together bounded."""

    def __init__(self, most_waiting: int):
        """Begin empty."""
        self._most_waiting = most_waiting
        self._requests: deque[Request] = deque()
        self._num_jobs = 0  # in `requests`
        self._num_waiting = 0  # in the engine's queue
        self._ends: deque[float] = deque(maxlen=32)  # when the last jobs ended
        self._changed = threading.Condition()
        self._closed = self._refuses = ""

    @property
    def num_jobs(self) -> int:
        """Jobs that the engine's thread has not seen."""
        return self._num_jobs

    def put(self, request: Request, is_job: bool = False) -> None:
        """Leave a request, from any thread.

        Raises:
            QueueFullError: it is a job, and too many wait.
            ClosedError: nobody reads requests any more.
        """
        with self._changed:
            if self._closed:
                raise ClosedError(self._closed)
            if is_job and self._refuses:
                raise ClosedError(self._refuses)
            num_waiting = self._num_waiting + self._num_jobs
            if is_job and num_waiting >= self._most_waiting:
                raise QueueFullError(
                    f"{num_waiting} jobs wait, and no more may (most_waiting); try again later", self._retry_after()
                )
            self._requests.append(request)
            self._num_jobs += is_job
            self._changed.notify()

    def take(self, timeout: float | None) -> list[Request]:
        """Return all requests; wait up to `timeout` seconds for the first, or as long as it takes."""
        if not self._requests and timeout == 0.0:
            return []
        with self._changed:
            if not self._requests:
                self._changed.wait(timeout)
            requests = list(self._requests)
            self._requests.clear()
            self._num_waiting += self._num_jobs
            self._num_jobs = 0
        return requests

    def tell(self, num_waiting: int) -> None:
        """Say how many jobs wait in the engine's queue."""
        self._num_waiting = num_waiting

    def note_end(self) -> None:
        """Say that a job has ended."""
        self._ends.append(time.monotonic())

    def refuse(self, why: str) -> None:
        """Take no more jobs."""
        with self._changed:
            self._refuses = why

    def close(self, why: str) -> list[Request]:
        """Take no more; return what is left."""
        with self._changed:
            self._closed = why
            requests = list(self._requests)
            self._requests.clear()
            self._num_jobs = 0
        return requests

    def _retry_after(self) -> float:
        """Return about how many seconds pass until a job ends; 1 if nothing is known."""
        ends = list(self._ends)
        if len(ends) < 2:
            return 1.0
        return min(max((time.monotonic() - ends[0]) / len(ends), 0.1), LONGEST_RETRY)
