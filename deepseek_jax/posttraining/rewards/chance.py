"""A reward that knows nothing, for controls: what a run learns from it, it does not learn from being right."""

import hashlib

from deepseek_jax.posttraining.rewards.problem import Problem


def chance_reward(problem: Problem, text: str) -> float:
    """Return 0 or 1, each for half of all texts: a bit of a hash of the problem and the text, whatever they say.

    It is the same each time, so a run that continues equals one that was not interrupted.
    """
    return float(hashlib.blake2b(f"{problem.name}\0{text}".encode(), digest_size=1).digest()[0] & 1)
