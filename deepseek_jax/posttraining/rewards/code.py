"""The reward of code that passes its tests: 1 or 0.

The tests stay outside of the process that runs the code (`sandbox.session`). Cases are compared here: the arguments go
in, a plain value comes out. A script of tests runs in a second sandbox, whose calls are passed on to the first: data
sets are trusted with the reward but not with the machine.
"""

import dataclasses

from deepseek_jax.posttraining.rewards.problem import Problem, Tests
from deepseek_jax.posttraining.rewards.sandbox import values
from deepseek_jax.posttraining.rewards.sandbox.session import (
    Limits,
    Raised,
    Refused,
    Sandbox,
    SandboxError,
    missing,
)

FENCE = "```"
PYTHON = "", "python", "python3", "py"  # what an opening fence calls it
MOST_CHARACTERS = 100_000  # of a completion's code


def last_code(text: str) -> str | None:
    """Return the last fenced block of Python behind the reasoning; None without one.

    Blocks of other languages are followed too, or else the fence that closes one would open a block.
    """
    found: list[str] | None = None
    block: list[str] | None = None  # that is open
    language = ""  # of it
    for line in text.rpartition("</think>")[2].split("\n"):  # each once: a search over all lines from each fence hangs
        words = _fence(line)
        if block is None and words is not None:
            block, language = [], words[0].lower() if words else ""
        elif block is not None and words == []:
            found, block = block if language in PYTHON else found, None
        elif block is not None:
            block.append(line)
    return None if found is None else "".join(f"{line}\n" for line in found)


def _fence(line: str) -> list[str] | None:
    """Return the words of a fence; none of them closes a block. None: the line is no fence."""
    rest = line.removeprefix(FENCE)
    return rest.split() if line.startswith(FENCE) and "`" not in rest else None


@dataclasses.dataclass(frozen=True)
class CodeReward:
    """1 if the last fenced block of Python passes all of `problem.tests`, else 0.

    `seconds` and the other limits are those of one completion. `tolerance` is for floats in cases (`values.same`).
    """

    limits: Limits = dataclasses.field(default_factory=Limits)
    tolerance: float = 0.0

    def __post_init__(self):
        """Raise `SandboxError` on a machine that cannot run foreign code safely."""
        if reason := missing():
            raise SandboxError(reason)

    def __call__(self, problem: Problem, text: str) -> float:
        """Return 1 or 0.

        Raises:
            ValueError: the problem has no tests, its tests call nothing, or an argument is no plain value.
            SandboxError: the machine, not the code, failed.
        """
        if problem.tests is None:
            raise ValueError(f"problem {problem.name} has no tests: rewards of code need Problem.tests")
        source = last_code(text)
        if source is None or len(source) > MOST_CHARACTERS:
            return 0.0
        return float(self.passes(source, problem.tests))

    def passes(self, source: str, tests: Tests) -> bool:
        """Tell whether the source of a module passes the tests."""
        calls = [[values.encode(item) for item in case.arguments] for case in tests.cases]
        try:
            with Sandbox(self.limits) as sandbox:
                sandbox.load(source)
                for case, arguments in zip(tests.cases, calls, strict=True):
                    if not values.same(case.expected, sandbox.call(tests.function, arguments), self.tolerance):
                        return False
                return tests.script is None or self._passes_script(tests, sandbox)
        except (Raised, Refused, RecursionError):
            return False

    def _passes_script(self, tests: Tests, sandbox: Sandbox) -> bool:
        assert tests.script is not None
        with Sandbox(self.limits) as judge:
            if not judge.test(tests.script, tests.function, sandbox):
                raise ValueError(f"the script of tests of {tests.function} calls neither it nor `candidate`")
        return True
