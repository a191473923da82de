"""Load: requests that arrive at random moments, and how long each waits for its tokens.

Arrivals are a Poisson process: people do not wait for each other. A request is due at its planned moment whether or not
the earlier ones are done, and all its times count from there. If this program is late (a full event loop, a slow
connection), the request looks slow and not the load low: no measurement is omitted because its forerunner took long.

    first      from the planned moment to the first token (TTFT)
    gap        between two arrivals of tokens, as a reader sees them; a server that drafts sends several at once
    pace       mean time of a token behind the first: (last - first) / (tokens - 1), the inter-token latency (ITL)
    total      from the planned moment to the end

A percentile q is the smallest value that at least q % of all do not exceed (nearest rank): a value that occurred.
Goodput counts the requests a second that came whole, their first token within 2 s and their pace within 50 ms.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.inputs import shown

FIRST_LIMIT, PACE_LIMIT = 2.0, 0.05  # seconds, of a good request
START = 0.05  # seconds from now, when all tasks exist
MOST_REQUESTS = 100_000  # of one load


class Asked(NamedTuple):
    """A request of the load.

    Attributes:
        at: the moment when it is due, in seconds from the start.
        prompt: ids, a text, or the messages of a chat.
        max_new_tokens: that it asks for.
    """

    at: float
    prompt: Any
    max_new_tokens: int


class Arrival(NamedTuple):
    """What came of an answer; how many tokens there are may be known only at the end."""

    is_text: bool
    tokens: int  # so far


MakePrompt = Callable[[np.random.Generator], tuple[Any, int]]  # draws a prompt, and how many tokens to ask for
Target = Callable[[Asked], AsyncIterator[Arrival]]  # raises RuntimeError or OSError where a request fails


class Sample(NamedTuple):
    """What became of a request; times in seconds from its planned moment, `late` of its sending."""

    asked: Asked
    late: float
    arrivals: list[float]
    tokens: int
    total: float
    error: str | None

    @property
    def first(self) -> float:
        """The time to the first token."""
        return self.arrivals[0]

    @property
    def pace(self) -> float:
        """The mean time of a token behind the first."""
        return (self.arrivals[-1] - self.first) / max(self.tokens - 1, 1)

    @property
    def is_good(self) -> bool:
        """Whether it came whole and in time."""
        return self.error is None and self.first <= FIRST_LIMIT and self.pace <= PACE_LIMIT


def plan(
    rate: float,
    seconds: float,
    make_prompt: MakePrompt,
    rng: np.random.Generator,
) -> list[Asked]:
    """Return the requests of `seconds` seconds at `rate` a second on average; there is one at least.

    Raises:
        ValueError: they would be more than `MOST_REQUESTS`.
    """
    if rate * seconds > MOST_REQUESTS:
        raise ValueError(f"{rate:g} requests a second for {seconds:g} s are more than {MOST_REQUESTS}; measure fewer")
    asked, at = [], rng.exponential(1 / rate)
    while at < seconds or not asked:
        asked.append(Asked(min(at, seconds), *make_prompt(rng)))
        at += rng.exponential(1 / rate)
    return asked


async def run(target: Target, load: Sequence[Asked], timeout: float) -> list[Sample]:
    """Send a load, each request at its moment, and return what became of each, in the order of `load`.

    Args:
        timeout: seconds that a request may take from its planned moment; then it has failed.
    """
    start = asyncio.get_running_loop().time() + START
    return await asyncio.gather(*(_sample(target, asked, start + asked.at, timeout) for asked in load))


async def _sample(target: Target, asked: Asked, planned: float, timeout: float) -> Sample:
    now = asyncio.get_running_loop().time
    await asyncio.sleep(planned - now())
    late = now() - planned
    arrivals: list[float] = []
    tokens, error = 0, None
    try:
        async with asyncio.timeout_at(planned + timeout):
            async for arrival in target(asked):
                tokens = arrival.tokens
                if arrival.is_text:
                    arrivals.append(now() - planned)
    except TimeoutError:
        error = f"not done after {timeout:g} s"
    except (RuntimeError, OSError, EOFError, ValueError) as problem:
        error = shown(str(problem) or type(problem).__name__)
    if not error and not arrivals:
        error = "an answer without a token"
    return Sample(asked, late, arrivals, tokens, now() - planned, error)


def percentile(values: Sequence[float], q: float) -> float:
    """Return the smallest of the values that at least q % of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q / 100 * len(ordered)), 1) - 1]


def summary(samples: Sequence[Sample]) -> dict[str, tuple[float, str]]:
    """Return value and unit of each quantity of a load. Latencies are of the requests that came whole."""
    done = [sample for sample in samples if sample.error is None]
    end = max(sample.asked.at + sample.total for sample in samples)
    values = {
        "requests": (float(len(samples)), ""),
        "failed": (float(len(samples) - len(done)), ""),
        "throughput": (sum(sample.tokens for sample in done) / end, "tokens/s"),
        "completed": (len(done) / end, "requests/s"),
        "goodput": (sum(sample.is_good for sample in samples) / end, "requests/s"),
        "good": (100 * sum(sample.is_good for sample in samples) / len(samples), "%"),
        "sent late, p99": (percentile([sample.late for sample in samples], 99), "s"),
    }
    measured = {
        "time to first token": [sample.first for sample in done],
        "gap between tokens": [b - a for s in done for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)],
        "time per token": [sample.pace for sample in done if sample.tokens > 1],
        "total time": [sample.total for sample in done],
    }
    for name, times in measured.items():
        values |= {f"{name}, p{q}": (percentile(times, q), "s") for q in (50, 95, 99) if times}
    return values
