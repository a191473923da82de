"""Tokens a second of an engine whose rows all decode, beside which `decoding` has the bare loop of bursts."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.inference.batch import DeviceBatch
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.job import Delta, Job
from deepseek_jax.inference.row_sampling import GREEDY
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.parameters import Weights
from experiments.benchmarks.engine_target import tokenizer_of
from pallas_kernels.mla_decode.schedule import PAGE

NEW_TOKENS = 256  # of a job: the last of 128 prompts is read while the first one has half of its text
PREFILL_TOKENS = 512
NO_EOS = 2**31 - 2  # no token is it
WARM_UP = 16  # tokens of each job behind the last prompt that are not timed

Moments = list[tuple[float, int]]  # when, and how many tokens of a job there were then


def open_batch(config: Config, mesh: jax.sharding.Mesh, weights: Weights, num_jobs: int, context: int) -> DeviceBatch:
    """Return rows for `num_jobs` with prompts of `context` ids; its programs for greedy jobs are compiled."""
    num_positions = context + NEW_TOKENS
    columns = -(-num_positions // PAGE)
    sizes: Any = {"num_rows": num_jobs, "num_pages": (num_jobs + 1) * columns, "num_positions": num_positions}
    batch = DeviceBatch(config, weights, mesh, eos=NO_EOS, **sizes, most_prefill_tokens=PREFILL_TOKENS)
    batch.compile(kinds=[GREEDY])
    return batch


def measure(batch: DeviceBatch, num_jobs: int, context: int) -> float:
    """Return tokens/s of an engine over `batch` while `num_jobs` decode, from random prompts of `context` ids on."""
    rng, found = np.random.default_rng(0), []
    with Engine(batch, tokenizer_of(batch.vocab_size)) as engine:
        for _ in range(2):  # the first time warms up
            prompts = rng.integers(0, batch.vocab_size, (num_jobs, context)).tolist()
            found = run(engine, prompts)
    return rate(found)


def run(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Moments]:
    """Let an engine go on with prompts, greedily; return when each job had how many tokens."""
    found: list[Moments] = [[] for _ in prompts]
    left, done = [len(prompts)], threading.Event()

    def listener(moments: Moments):
        def listen(delta: Delta) -> None:
            moments.append((time.perf_counter(), delta.usage.completion_tokens))
            if delta.finish_reason is not None:
                left[0] -= 1
                if not left[0]:
                    done.set()

        return listen

    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
    for prompt, moments in zip(prompts, found, strict=True):
        job = Job(prompt=prompt, max_new_tokens=NEW_TOKENS, sampling=greedy, ignore_eos=True)
        engine.submit(job, listener(moments))
    done.wait()
    if short := [moments[-1] for moments in found if moments[-1][1] != NEW_TOKENS]:
        raise RuntimeError(f"{len(short)} jobs have ended before their last token: {engine.stats()}")
    return found


def rate(found: Sequence[Moments]) -> float:
    """Return tokens/s of all jobs between the moment when the last one is warm, and that when the first one ends."""
    begin = max(next(at for at, count in moments if count > WARM_UP) for moments in found)
    end = min(moments[-1][0] for moments in found)
    if begin >= end:
        raise RuntimeError("the first job has ended before the last one had begun; ask for fewer rows at once")
    counts = [_count(moments, end) - _count(moments, begin) for moments in found]
    return sum(counts) / (end - begin)


def _count(moments: Moments, at: float) -> int:
    return max(count for when, count in moments if when <= at)
