"""What `/metrics` says, in the text format of Prometheus."""

import bisect
import collections
import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.inference.job import Stats

PREFIX = "deepseek_jax"
RATE_SECONDS = 10  # over which tokens per second are counted
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How often a time fell into each of several buckets."""

    def __init__(self, bounds: Sequence[float]):
        """Count nothing yet; `bounds` are the upper ends of the buckets, rising."""
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a time, or several like it."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples."""
        below = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum:g}"
        yield f"{name}_count {below}"


class Metrics:
    """What the server itself counts; used in the event loop only."""

    def __init__(self):
        """Count nothing yet."""
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.between_tokens = Histogram(TOKEN_SECONDS)
        self.request = Histogram(REQUEST_SECONDS)
        self._responses: collections.Counter[tuple[str, int]] = collections.Counter()
        self._tokens: collections.Counter[int] = collections.Counter()  # by second
        self.active = 0

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as one that is being answered."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def count_response(self, path: str, status: int) -> None:
        """Count an answer; `path` is one of the server's own."""
        self._responses[path, status] += 1

    def count_tokens(self, count: int) -> None:
        """Count tokens that were made now."""
        now = int(time.monotonic())
        if now not in self._tokens:
            for second in [second for second in self._tokens if second < now - RATE_SECONDS]:
                del self._tokens[second]
        self._tokens[now] += count

    def text(self, stats: Stats) -> str:
        """Return everything, with what the engine says of itself."""
        return "\n".join([*self._own(), *_of_engine(stats), ""])

    def _own(self) -> Iterator[str]:
        now = int(time.monotonic())
        made = sum(count for second, count in self._tokens.items() if now - RATE_SECONDS <= second < now)
        yield from _head("tokens_per_second", "gauge", f"tokens made, a mean over {RATE_SECONDS} seconds")
        yield f"{PREFIX}_tokens_per_second {made / RATE_SECONDS:g}"
        yield from _head("http_requests_active", "gauge", "requests that are being answered")
        yield f"{PREFIX}_http_requests_active {self.active}"
        yield from _head("http_responses_total", "counter", "answers by path and status")
        for (path, status), count in sorted(self._responses.items()):
            yield f'{PREFIX}_http_responses_total{{path="{path}",status="{status}"}} {count}'
        named = {
            "time_to_first_token_seconds": (self.first_token, "from the request to its first token"),
            "inter_token_latency_seconds": (self.between_tokens, "between two tokens of a text"),
            "request_seconds": (self.request, "from a request to the end of its answer"),
        }
        for name, (histogram, told) in named.items():
            yield from _head(name, "histogram", told)
            yield from histogram.lines(f"{PREFIX}_{name}")


def _of_engine(stats: Stats) -> Iterator[str]:
    gauges = {
        "jobs_waiting": (stats.waiting, "texts in the queue"),
        "jobs_running": (stats.running, "texts in the batch"),
        "batch_rows": (stats.rows, "texts that fit into the batch"),
        "cache_pages_used": (stats.pages_used, "pages of the cache that running texts hold"),
        "cache_pages_kept": (stats.pages_kept, "pages with prefixes that nobody holds"),
        "cache_pages": (stats.pages, "pages of the cache"),
        "cache_use": (stats.pages_used / max(stats.pages, 1), "share of the pages that running texts hold"),
        "weights_version": (stats.version, "how often the weights were replaced"),
        "paused": (int(stats.paused), "1 while the engine makes nothing"),
    }
    counters = {
        "prompt_tokens_total": (stats.prompt_tokens, "tokens of prompts"),
        "cached_tokens_total": (stats.cached_tokens, "tokens of prompts that the cache had"),
        "completion_tokens_total": (stats.completion_tokens, "tokens that were made"),
        "preemptions_total": (stats.preemptions, "times that a text gave its pages to another"),
    }
    for kind, entries in (("gauge", gauges), ("counter", counters)):
        for name, (value, told) in entries.items():
            yield from _head(name, kind, told)
            yield f"{PREFIX}_{name} {value:g}" if isinstance(value, float) else f"{PREFIX}_{name} {value}"
    yield from _head("jobs_finished_total", "counter", "texts by the reason of their end")
    for reason, count in sorted(stats.finished.items()):
        yield f'{PREFIX}_jobs_finished_total{{reason="{reason}"}} {count}'
    yield from _drafts(stats)
    if stats.expert_load_LE is not None:
        yield from _head("expert_tokens_total", "counter", "tokens that each expert of each MoE layer had")
        for (layer, expert), count in np.ndenumerate(stats.expert_load_LE):
            yield f'{PREFIX}_expert_tokens_total{{layer="{layer}",expert="{expert}"}} {count}'


def _drafts(stats: Stats) -> Iterator[str]:
    for name, counts in (("drafted", stats.drafted), ("accepted", stats.accepted)):
        if counts:
            yield from _head(f"{name}_tokens_total", "counter", f"tokens {name}, by position in the draft")
            for position, count in enumerate(counts):
                yield f'{PREFIX}_{name}_tokens_total{{position="{position}"}} {count}'
    if sum(stats.drafted):
        yield from _head("draft_acceptance", "gauge", "accepted tokens of the drafted ones")
        yield f"{PREFIX}_draft_acceptance {sum(stats.accepted) / sum(stats.drafted):g}"


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}_{name} {told}"
    yield f"# TYPE {PREFIX}_{name} {kind}"
