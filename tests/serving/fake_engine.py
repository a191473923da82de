"""An engine without a model: texts are scripted, or words that depend on the prompt, the seed and the position.

It keeps the promises of `inference.job`: deltas come from a thread of its own, in the order of the tokens, and the last
one has a `finish_reason`. A script is found by a text that the prompt contains:

    FakeEngine(tokenizer, scripts={"weather": "<｜tool▁calls▁begin｜>..."})

Special tokens spelled in a script become special tokens; EOS follows it.
"""

import hashlib
import itertools
import math
import threading
import time
from collections import Counter

import numpy as np

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.job import (
    CANCELLED,
    DEADLINE,
    ERROR,
    ClosedError,
    Delta,
    Job,
    Listener,
    QueueFullError,
    Stats,
    Usage,
)
from deepseek_jax.inference.text import Text

CHAT_TOKENS = (
    *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
WORDS = "the model sees a token and then another one, which it has never seen before in this ünïcode world . "
# In a prompt: the job fails; nothing comes until `goes_on` is set; the time is over, as soon as nothing else runs,
# before the first token (of one job at a time, the last, or at its own deadline); or behind the third.
BREAK, STALL, TOO_LATE, LATE = "BREAK", "STALL", "TOO LATE", "LATE"


def chat_tokenizer() -> Tokenizer:
    """Return bytes as tokens, and the special tokens of DeepSeek's chat formats."""
    encoder = byte_tokenizer()._encoder
    encoder.add_special_tokens(list(CHAT_TOKENS))
    return Tokenizer(encoder, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")


class FakeTicket:
    def __init__(self, number: int, job: Job, listener: Listener):
        self.number, self.job, self.listener = number, job, listener
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Makes the texts of up to `rows` jobs at the same time, a token every `seconds_per_token`."""

    def __init__(self, tokenizer, num_positions=4096, rows=8, most_waiting=64, seconds_per_token=0.0, scripts=None):
        self.tokenizer, self.num_positions, self.rows = tokenizer, num_positions, rows
        self.most_waiting, self.seconds_per_token, self.scripts = most_waiting, seconds_per_token, scripts or {}
        self.jobs: list[Job] = []
        self.finished: Counter[str] = Counter()
        self._tickets: list[FakeTicket] = []
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._closed, self._tokens, self._prompt_tokens = False, 0, 0
        self._rows = threading.Semaphore(rows)
        self.running = 0
        self.goes_on = threading.Event()

    def submit(self, job: Job, listener: Listener) -> FakeTicket:
        if self._closed:
            raise ClosedError("closed")
        if len(job.prompt) + job.max_new_tokens > self.num_positions:
            raise ValueError(f"the prompt has {len(job.prompt)} tokens")
        with self._lock:
            if len(self._tickets) - self.running >= self.most_waiting:
                raise QueueFullError("the queue is full", 3.0)
            ticket = FakeTicket(next(self._numbers), job, listener)
            self._tickets.append(ticket)
            self.jobs.append(job)
        threading.Thread(target=self._run, args=(ticket,), daemon=True).start()
        return ticket

    def stats(self) -> Stats:
        waiting = len(self._tickets) - self.running
        load = np.arange(8).reshape(2, 4)
        counts = self._prompt_tokens, 0, self._tokens, 0
        rest = (10, 7), (8, 3), load
        return Stats(waiting, self.running, self.rows, self.running, 1, 64, *counts, dict(self.finished), *rest)

    def close(self, drain_seconds: float = 0.0) -> None:
        self._closed = True
        end = time.monotonic() + drain_seconds
        while self._tickets and time.monotonic() < end:
            time.sleep(0.01)
        for ticket in list(self._tickets):
            ticket.cancel()
        while self._tickets:
            time.sleep(0.01)

    @property
    def num_jobs(self) -> int:
        """Jobs that wait or run."""
        return len(self._tickets)

    def _run(self, ticket: FakeTicket) -> None:
        has_row = False
        while not has_row and not ticket.cancelled.is_set() and not _is_late(ticket.job):
            has_row = self._rows.acquire(timeout=0.02)
        with self._lock:
            self.running += has_row
        for delta in self._deltas(ticket):
            if delta.finish_reason is not None:
                with self._lock:
                    self.finished[delta.finish_reason] += 1
                    self._tickets.remove(ticket)
                    self.running -= has_row
                if has_row:
                    self._rows.release()
            ticket.listener(delta)

    def _deltas(self, ticket: FakeTicket):
        job, text = ticket.job, None
        text = Text(self.tokenizer, job.stop, job.ignore_eos, job.spelled)
        usage = Usage(len(job.prompt), len(job.prompt) // 64 * 64 if job.salt is None else 0, 0)
        self._prompt_tokens += len(job.prompt)
        prompt_logprobs = self._prompt_logprobs(job)
        prompt = self.tokenizer.decode(job.prompt)
        if BREAK in prompt:
            yield Delta("", [], None, ERROR, usage, 0, error="the page table is on fire")
            return
        most = 0 if TOO_LATE in prompt else 3 if LATE in prompt else job.max_new_tokens
        tokens = self._tokens_of(job, prompt)
        while True:
            while STALL in prompt and not (self.goes_on.is_set() or ticket.cancelled.is_set() or _is_late(job)):
                time.sleep(0.005)
            while not (most or len(self._tickets) == 1 or ticket.cancelled.is_set() or _is_late(job)):
                time.sleep(0.005)
            is_late = _is_late(job) or usage.completion_tokens >= most < job.max_new_tokens
            reason = CANCELLED if ticket.cancelled.is_set() else DEADLINE if is_late else None
            ids: list[int] = []
            piece = ""
            if reason is None and usage.completion_tokens < job.max_new_tokens:
                token = next(tokens)
                piece = text.push([token])
                if text.num_tokens > usage.completion_tokens:
                    ids = [token]
                    self._tokens += 1
                usage = usage._replace(completion_tokens=text.num_tokens)
                reason = text.reason
            if reason is None and usage.completion_tokens >= job.max_new_tokens:
                reason = "length"
            if reason is not None:
                piece += text.finish()
            found = None if job.own.num_logprobs is None else [self._logprob(t, job.own.num_logprobs) for t in ids]
            yield Delta(piece, ids, found, reason, usage, 0, prompt_logprobs)
            prompt_logprobs = None
            if reason is not None:
                return
            if self.seconds_per_token:
                time.sleep(self.seconds_per_token)

    def _tokens_of(self, job: Job, prompt: str):
        if job.grammar is not None:
            yield from self._tokens_of_grammar(job)
        script = next((text for key, text in self.scripts.items() if key in prompt), None)
        if script is not None:
            yield from _encode(self.tokenizer, script)
            while True:
                yield self.tokenizer.eos
        seed = job.own.seed if job.sampling.temperature else 0
        begin = hashlib.sha256(f"{list(job.prompt)} {seed}".encode()).digest()[0] % len(WORDS)
        while True:
            yield from self.tokenizer.encode(WORDS[begin:] + WORDS[:begin])

    def _tokens_of_grammar(self, job: Job):
        grammar = job.grammar()
        words = np.zeros(math.ceil(self.tokenizer.vocab_size / 32), np.int32)
        for position in itertools.count():
            grammar.fill(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.tokenizer.vocab_size]
            allowed = np.flatnonzero(bits).tolist()
            if self.tokenizer.eos in allowed:
                token = self.tokenizer.eos
            else:  # an end that is near: quotes and brackets before others
                closing = [t for c in '"}]0' for t in self.tokenizer.encode(c) if t in allowed]
                token = closing[0] if closing and position % 7 > 3 else allowed[position * 31 % len(allowed)]
            yield token
            grammar.accept(token)

    def _prompt_logprobs(self, job: Job):
        if job.prompt_logprobs is None:
            return None
        return [None, *(self._logprob(token, job.prompt_logprobs) for token in job.prompt[1:])]

    def _logprob(self, token: int, count: int) -> TokenLogprob:
        return TokenLogprob(token, -0.5 - token / 512, [(token, -0.5 - token / 512), (6, -3.0), (7, -math.inf)][:count])


def _is_late(job: Job) -> bool:
    return job.deadline is not None and time.monotonic() > job.deadline


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    from deepseek_jax.serving.model import Model

    return Model(name="", engine=None, tokenizer=tokenizer, num_positions=0, most_jobs=0).encode(text, bos=False)
