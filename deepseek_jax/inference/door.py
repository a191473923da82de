"""Which jobs an engine takes."""

import numpy as np

from deepseek_jax.inference.device import Device
from deepseek_jax.inference.job import Job
from deepseek_jax.inference.page_pool import PAGE_SIZE
from deepseek_jax.inference.sampling import MOST_LOGPROBS


def check_job(job: Job, batch: Device) -> None:
    """Refuse a job that cannot be done.

    Raises:
        ValueError: with the value and the remedy.
    """
    num_prompt, num_new = len(job.prompt), job.max_new_tokens
    if not num_prompt:
        raise ValueError("the prompt is empty; give at least one id")
    ids = np.asarray(job.prompt)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError("the prompt must be ids: a list of integers")
    if ids.min() < 0 or ids.max() >= batch.vocab_size:
        beyond = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(f"the prompt has the id {beyond}, and ids are from 0 to {batch.vocab_size - 1}")
    if num_new < 0 or (num_new == 0 and job.prompt_logprobs is None):
        raise ValueError(f"max_new_tokens = {num_new} must be at least 1; 0 is for prompt_logprobs alone")
    if job.prompt_logprobs is not None and not 0 <= job.prompt_logprobs <= MOST_LOGPROBS:
        raise ValueError(f"prompt_logprobs = {job.prompt_logprobs} must be from 0 to {MOST_LOGPROBS}")
    if num_prompt + num_new > batch.num_positions:
        num_left = batch.num_positions - num_prompt
        remedy = f"set max_new_tokens to {num_left} or less" if num_left > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {num_prompt} tokens and {num_new} new ones exceed the {batch.num_positions} positions that"
            f" the engine has for a sequence; {remedy}"
        )
    num_pages = -(-(max(num_prompt + num_new - 1, num_prompt) + batch.num_drafts) // PAGE_SIZE)
    if num_pages > batch.num_pages:
        raise ValueError(
            f"a prompt of {num_prompt} tokens and {num_new} new ones take {num_pages} pages of {PAGE_SIZE}, and the"
            f" cache has {batch.num_pages}; ask for fewer tokens, or make a larger cache"
        )
    stops = [token for token in job.stop if not isinstance(token, str)]
    if any(not 0 <= token < batch.vocab_size for token in stops):
        raise ValueError(f"stop has ids beyond 0 to {batch.vocab_size - 1}: {stops}")
    if job.kept:
        _check_kept(job)
    batch.check(job)


def _check_kept(job: Job) -> None:
    """Refuse to tell what tokens were drawn among where more than temperature, min-p, top-k and top-p say it."""
    if job.grammar or job.own.logit_bias or job.sampling.penalizes or not job.sampling.temperature:
        raise ValueError(
            "kept = True is for draws at a temperature above 0 without grammar, bias and penalties; leave it out"
        )
    if (job.own.num_logprobs, job.sampling.num_logprobs) == (None, None):
        raise ValueError("kept = True comes with log-probabilities; set num_logprobs, for example to 0")
