"""The engine: many jobs at once, each of which comes and goes when it likes."""

import atexit
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Self

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.answers import Answer, Answers
from deepseek_jax.inference.completions import TokenLogprob
from deepseek_jax.inference.device import Device
from deepseek_jax.inference.door import check_job
from deepseek_jax.inference.generate import known_ids
from deepseek_jax.inference.inbox import Inbox
from deepseek_jax.inference.job import ClosedError, Job, Listener, QueueFullError, Stats, Ticket
from deepseek_jax.inference.member import Member
from deepseek_jax.inference.opening import open_batch
from deepseek_jax.inference.reply import Reply
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.scheduler import PATIENCE
from deepseek_jax.inference.stepper import ABORT, FINISH, KEEP, RECOMPUTE, Change, Stepper
from deepseek_jax.parameters import Weights

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


class Engine:
    """Decodes jobs of many callers in one batch; a `job.TextEngine`.

        with Engine.open(config, weights, tokenizer, num_rows=32) as engine:
            job = Job(prompt=[tokenizer.bos, *tokenizer.encode("def ")], max_new_tokens=100, sampling=sampling)
            print(engine.generate([job])[0].text)
            ticket = engine.submit(job, lambda delta: print(delta.text, end=""))  # returns at once
            ticket.cancel()
            engine.update_weights(other_weights)  # after the jobs that run

    All methods may be called from any thread, but from a listener only `submit` and `stats`, and a ticket's `cancel`.
    """

    def __init__(
        self,
        batch: Device,
        tokenizer: Tokenizer,
        *,
        most_waiting: int = 1024,
        seed: int = 0,
        version: int = 0,
        prefill_beside: int = 0,
    ):
        """Begin to serve on `batch`, whose programs are compiled.

        Args:
            batch: the engine is the only one that uses it.
            tokenizer: of the model's training.
            most_waiting: jobs that may wait for a row.
            seed: of the draws of jobs without a seed of their own.
            version: of the weights.
            prefill_beside: prompt tokens of a device in a step in which jobs also get new tokens; fewer make their
                tokens come more evenly, and prompts later. 0 takes all that the batch can.
        """
        _check_options(most_waiting, prefill_beside, batch.most_prefill_tokens)
        self.batch, self.tokenizer = batch, tokenizer
        self._numbers = itertools.count()
        self._inbox = Inbox(most_waiting)
        self._stepper = Stepper(batch, self._inbox, seed, version, prefill_beside)
        self._thread = threading.Thread(target=self._stepper.run, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the interpreter must not end while the thread is inside of the device

    @classmethod
    def open(
        cls,
        config: Config,
        weights: Weights,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh | None = None,
        *,
        num_rows: int = 32,
        num_pages: int | None = None,
        num_positions: int | None = None,
        most_prefill_tokens: int = 2048,
        num_drafts: int = 0,
        drafting_rows: int | None = None,
        silent: bool = False,
        exact: bool = False,
        bulk: bool = False,
        most_waiting: int = 1024,
        seed: int = 0,
        version: int = 0,
        prefill_beside: int = 0,
    ) -> Self:
        """Place the weights, compile all programs, and return an engine.

        The arguments up to `bulk` are those of `opening.open_batch`, and the others those of the class.
        """
        _check_options(most_waiting, prefill_beside, most_prefill_tokens)
        options = {"most_waiting": most_waiting, "seed": seed, "version": version, "prefill_beside": prefill_beside}
        sizes = {"num_rows": num_rows, "num_pages": num_pages, "num_positions": num_positions}
        sizes["most_prefill_tokens"] = most_prefill_tokens
        rest = {"num_drafts": num_drafts, "drafting_rows": drafting_rows, "silent": silent, "exact": exact}
        return cls(open_batch(config, weights, tokenizer, mesh, **sizes, **rest, bulk=bulk), tokenizer, **options)

    def __enter__(self) -> Self:
        """Return the engine, which the end of the `with` block closes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it at once."""
        self.close()

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Queue a job; see `job.TextEngine`."""
        check_job(job, self.batch)
        reply = Reply(job, self.tokenizer, listener, self.batch.vocab_size)
        number = next(self._numbers)
        rank = time.monotonic() - PATIENCE * job.priority, number
        has_grammar, whole = job.grammar is not None, job.prompt_logprobs is not None
        member = Member(reply, rank, job.prompt, job.max_new_tokens, job.salt, has_grammar, whole)
        self._inbox.put(functools.partial(self._stepper.add, member), is_job=True)
        return _Ticket(self._inbox, functools.partial(self._stepper.cancel, member))

    def generate(self, jobs: Iterable[Job]) -> list[Answer]:
        """Return the answers of jobs in their order; wait for room where too many are waiting.

        A job that fails on its own has `finish_reason` "error". If the caller is interrupted, all are cancelled.

        Raises:
            ValueError: one of the jobs cannot be done; then none goes on.
            ClosedError: the engine is closing, or has stopped.
        """
        jobs = list(jobs)
        answers, tickets = Answers(jobs), []
        try:
            for i, job in enumerate(jobs):
                tickets.append(self._submit_patiently(job, answers, i))
            return answers.wait()
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def log_probabilities(self, sequences: Sequence[Sequence[int]], num_top: int = 0) -> list[list[TokenLogprob]]:
        """Return the log-probabilities of each sequence's tokens but the first, by teacher forcing.

        Entry i of a sequence belongs to its token i + 1, and has the `num_top` most probable tokens, too.

        Raises:
            ValueError: as `submit`.
            RuntimeError: the jobs were ended before they were done.
        """
        jobs = [Job(prompt=ids, max_new_tokens=0, sampling=GREEDY, prompt_logprobs=num_top) for ids in sequences]
        found = []
        for answer in self.generate(jobs):
            if answer.prompt_logprobs is None:
                raise RuntimeError(f"log-probabilities were not made: {answer.error or answer.finish_reason}")
            found.append([entry for entry in answer.prompt_logprobs if entry is not None])
        return found

    def update_weights(self, weights: Weights, version: int | None = None, running: str = FINISH) -> None:
        """Take other weights of the same shapes, and return when they are in use.

        No prefix of the old weights is found any more, and deltas say the new version from now on.

        Args:
            weights: as the engine was opened with.
            version: of the weights; one more than the last by default.
            running: what becomes of jobs that have begun: "finish" lets them end on the old weights, while others
                wait, so no answer has tokens of two versions; "abort" cancels them; "keep" goes on behind the cache of
                the old weights, and "recompute" goes on behind the same tokens with a cache of the new weights: in both
                an answer has tokens of two versions.

        Raises:
            ValueError: the weights do not fit; the old ones stay. Or `running` is none of these.
            RuntimeError: the engine is paused, and jobs are to finish.
            ClosedError: the engine is closing, or has stopped.
        """
        update = functools.partial(self.batch.update_weights, known_ids(weights, self.tokenizer))
        self._change(running, functools.partial(self._stepper.take_weights, update, version))

    def pause(self, running: str = KEEP) -> None:
        """Let no step begin until `resume`, and return when none is under way.

        Jobs may be submitted and cancelled meanwhile, and deadlines hold. Those that have begun are treated as in
        `update_weights`: "keep" and "recompute" let them go on at `resume`.
        """
        self._change(running, self._stepper.pause)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._inbox.put(self._stepper.resume)

    def stats(self) -> Stats:
        """Return where the engine stands."""
        stepper = self._stepper
        pools, counters = stepper.pools, stepper.counters
        num_pages = sum(pool.num_pages for pool in pools)
        return Stats(
            waiting=len(stepper.scheduler.waiting) + self._inbox.num_jobs,
            running=len(stepper.scheduler.running),
            rows=self.batch.num_rows,
            pages_used=num_pages - sum(pool.num_available for pool in pools),
            pages_kept=sum(pool.num_kept for pool in pools),
            pages=num_pages,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            completion_tokens=counters.completion_tokens,
            preemptions=stepper.scheduler.num_preemptions,
            finished=dict(counters.finished),
            drafted=tuple(counters.drafted),
            accepted=tuple(counters.accepted),
            expert_load_LE=self.batch.expert_load(),
            version=stepper.version,
            paused=stepper.is_paused,
            steps=counters.num_steps,
            error=stepper.error,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more jobs, let those that are there end for so long, and end the rest; see `job.TextEngine`."""
        try:
            self._inbox.refuse("the engine is closing")
            self._inbox.put(functools.partial(self._stepper.close, time.monotonic() + drain_seconds))
        except ClosedError:
            pass  # its thread has ended
        self._thread.join()
        atexit.unregister(self.close)

    def _change(self, running: str, apply: Callable[[], None]) -> None:
        if running not in (FINISH, KEEP, RECOMPUTE, ABORT):
            raise ValueError(f"running = {running!r} must be 'finish', 'keep', 'recompute' or 'abort'")
        done: Future = Future()
        self._inbox.put(functools.partial(self._stepper.change, Change(running, apply, done)))
        done.result()

    def _submit_patiently(self, job: Job, answers: Answers, i: int) -> Ticket:
        while True:
            try:
                return self.submit(job, answers.listener(i))
            except QueueFullError as error:
                answers.wait_for_one(min(error.retry_after, 0.1))


def _check_options(most_waiting: int, prefill_beside: int, most_prefill_tokens: int) -> None:
    if most_waiting < 1:
        raise ValueError(f"most_waiting = {most_waiting} must be at least 1")
    if not 0 <= prefill_beside <= most_prefill_tokens:
        raise ValueError(f"prefill_beside = {prefill_beside} must be from 0 to {most_prefill_tokens}")


class _Ticket:
    """A job that was submitted."""

    def __init__(self, inbox: Inbox, cancel: Callable[[], None]):
        self._inbox, self._cancel = inbox, cancel

    def cancel(self) -> None:
        """End the job; see `job.Ticket`."""
        with contextlib.suppress(ClosedError):  # then it has ended
            self._inbox.put(self._cancel)
