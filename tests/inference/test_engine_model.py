"""The engine over a small model in FP32: every job gets what `complete` and teacher forcing give it alone."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference.completions import complete
from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import Job
from deepseek_jax.inference.opening import open_batch
from deepseek_jax.inference.requests import Request
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model import transformer
from tests.inference.test_decode import make_config, one_device
from tests.support.drawn import drawn_weights

TOKENIZER = byte_tokenizer()
CONFIG = make_config(vocab_size=TOKENIZER.vocab_size).with_(data={"sequence_length": 320})
WARM = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3)
RNG = np.random.default_rng(7)
SHARED = RNG.integers(6, 250, 200).tolist()


@functools.cache
def weights_of(version):
    """Other versions have other heads and other latents."""
    weights = drawn_weights(CONFIG.model)
    head_DV = weights.params["head_DV"] * jnp.float32(1 + version) + jnp.float32(0.3 * version)
    return weights._replace(params=weights.params | {"head_DV": jnp.roll(head_DV, version, axis=1)})


@functools.cache
def device_batch(num_pages=60, num_rows=8):
    """Batches are made once; every engine closes all its rows."""
    sizes = {"num_rows": num_rows, "num_pages": num_pages, "most_prefill_tokens": 128}
    return open_batch(CONFIG, weights_of(0), TOKENIZER, one_device(), silent=True, **sizes)


def make_jobs(count, longest_text=24):
    """Greedy and drawn jobs with penalties; half of the prompts begin alike."""
    jobs = []
    for i in range(count):
        prompt = RNG.integers(6, 250, RNG.integers(1, 120)).tolist()
        if i % 2:
            prompt = SHARED[: RNG.integers(60, 200)] + prompt[:20]
        sampling, own = (WARM, Request(seed=i, logit_bias={70: 1.5})) if i % 3 == 2 else (GREEDY, Request())
        jobs.append(Job(prompt=prompt, max_new_tokens=int(RNG.integers(1, longest_text)), sampling=sampling, own=own))
    return jobs


def alone(jobs, version=0):
    """The texts of `complete`, which knows no pages that others share and no engine."""
    texts = []
    for job in jobs:
        arguments = CONFIG, weights_of(version), TOKENIZER, [job.prompt], job.max_new_tokens, job.sampling
        found = complete(*arguments, seed=0, mesh=one_device(), requests=[job.own])[0]
        texts.append((found.text, found.num_tokens, found.reason))
    return texts


def texts_of(answers):
    return [(answer.text, len(answer.ids), answer.finish_reason) for answer in answers]


def check_pages_are_back(engine):
    assert engine.stats()[:4:3] == (0, 0) and engine.stats().running == 0


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.slow)])
def test_jobs_together_are_jobs_alone(count):
    jobs = make_jobs(count)
    with Engine(device_batch(), TOKENIZER) as engine:
        answers = engine.generate(jobs)
        check_pages_are_back(engine)
        assert engine.stats().cached_tokens > 0
    checked = range(0, count, max(count // 60, 1))
    assert texts_of(answers[i] for i in checked) == alone([jobs[i] for i in checked])
