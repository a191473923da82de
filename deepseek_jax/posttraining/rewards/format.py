"""The format reward of R1: the reasoning between think tags, then the answer between answer tags, and nothing else.

DeepSeek-R1 (arXiv 2501.12948), section 2.2.2. Strict, as anything else is learnt, too: each tag exactly once and in
order, something in both parts, only white space around and between them.
"""

import re

from deepseek_jax.posttraining.rewards.problem import Problem

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)  # linear: each tag is there once


def parts(text: str) -> tuple[str, str] | None:
    """Return reasoning and answer of a completion in R1's template, without the white space around; None otherwise."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    match = TEMPLATE.fullmatch(text)
    found = (match[1].strip(), match[2].strip()) if match else ("", "")
    return found if all(found) else None


def format_reward(problem: Problem, text: str) -> float:
    """Return 1 for a completion in R1's template, else 0; one that begins behind the opening tag is not in it."""
    return float(parts(text) is not None)


def text_reward(problem: Problem, text: str) -> float:
    """Return 1 if the answer between the tags is `problem.answer`, letter for letter, else 0.

    Raises:
        ValueError: the problem has no answer.
    """
    if problem.answer is None:
        raise ValueError(f"problem {problem.name} has no answer: a reward of text needs Problem.answer")
    found = parts(text)
    return float(found is not None and found[1] == problem.answer.strip())
