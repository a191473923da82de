"""What a reward is given: a problem, and the text of a completion."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the function that a problem asks for, and the plain value that it must return."""

    arguments: tuple[Any, ...]
    expected: Any


@dataclasses.dataclass(frozen=True)
class Tests:
    """How the code of a completion is judged: the `function` that it must define, by cases, by a script, or both.

    A script is Python that raises if a test fails; `candidate` and the function's own name are the function in it
    (HumanEval: the prompt, the test, and `check(candidate)`; MBPP: its asserts).
    """

    function: str
    cases: tuple[Case, ...] = ()
    script: str | None = None

    def __post_init__(self):
        """Refuse tests that any code would pass."""
        if not self.function.isidentifier():
            raise ValueError(f"function is {self.function!r}: a name of Python")
        if self.script is not None and not self.script.strip():
            raise ValueError(f"the script of the tests of {self.function} is blank; leave it out")
        if not self.cases and self.script is None:
            raise ValueError(f"the tests of {self.function} have neither cases nor a script: any code would pass them")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt and what is known about its answer. Each reward says which fields it needs.

    `messages` have a role and a content, the last one is the user's. `language` is that of the answer ("en", "zh").
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | None = None
    tests: Tests | None = None
    language: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """The weighted sum of a completion's rewards, each without its weight, and those that failed and count as 0."""

    total: float
    parts: Mapping[str, float]
    failed: tuple[str, ...] = ()


Reward = Callable[[Problem, str], float]
