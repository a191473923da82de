"""How many held-out problems a model answers right, greedily, with Wilson's interval."""

import math
from typing import NamedTuple

import numpy as np

from deepseek_jax.inference.engine import GREEDY, Engine
from deepseek_jax.inference.job import LENGTH, STOP, Job
from deepseek_jax.parameters import Weights
from deepseek_jax.posttraining.problems import Prompt
from deepseek_jax.posttraining.rewards.pool import RewardPool
from deepseek_jax.training.loop import Row

Z = 1.959963984540054  # 97.5% of a normal distribution


class Interval(NamedTuple):
    """A share, and the ends of its 95% interval."""

    share: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval:
    """Return Wilson's score interval of a share of independent trials (E. B. Wilson, JASA 22, 1927)."""
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} of {trials}: at least one trial, and no more successes than trials")
    share = successes / trials
    middle = share + Z**2 / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    low, high = ((middle + side) / (1 + Z**2 / trials) for side in (-half, half))
    return Interval(share, max(0.0, low), min(1.0, high))


def accuracy_row(
    engine: Engine, pool: RewardPool, prompts: list[Prompt], reward: str, max_new_tokens: int, weights: Weights
) -> Row:
    """Answer each problem once, at temperature 0; return a row of the metrics.

    Raises:
        RuntimeError: an output was not finished.
        RewardError: a reward failed, and the run is to stop.
    """
    engine.update_weights(weights)
    jobs = [Job(prompt=p.ids, max_new_tokens=max_new_tokens, sampling=GREEDY, keep_end=True) for p in prompts]
    answers = engine.generate(jobs)
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.finish_reason not in (STOP, LENGTH):
            raise RuntimeError(
                f"the output of {prompt.problem.name!r} was not finished: {answer.error or answer.finish_reason}"
            )
    scores = pool.score([prompt.problem for prompt in prompts], [answer.text for answer in answers])
    interval = wilson(sum(score.parts[reward] == 1.0 for score in scores), len(scores))
    return {
        "eval/accuracy": interval.share,
        "eval/accuracy_low": interval.low,
        "eval/accuracy_high": interval.high,
        "eval/problems": len(prompts),
        "eval/length": float(np.mean([len(answer.ids) for answer in answers])),
        "eval/cut_off": float(np.mean([answer.finish_reason == LENGTH for answer in answers])),
    }


def accuracy_line(row: Row) -> str:
    """Return a row of `accuracy_row` as words."""
    return (
        f"{row['eval/accuracy']:.1%} of {row['eval/problems']} held-out problems right"
        f" (95%: {row['eval/accuracy_low']:.1%} to {row['eval/accuracy_high']:.1%})"
    )
