"""Small tasks made by code, with answers that a rule can check: what a tiny model learns in minutes.

Each problem has a question, a way to its answer in small steps, and the answer, for example

    sort_digits   "sort 7393"     <think>3x2 7x1 9x1</think><answer>3379</answer>
    add_digits    "add 7 3 9 3"   <think>7+3=10 10+9=19 19+3=22</think><answer>22</answer>

A cold start shows a model the way (`cold_start`, conversations for SFT); reinforcement learning then has the question
and the answer alone (`train_problems`; rewards "text" and "format"). `heldout_problems` are never trained on: which
part a problem belongs to is a hash of its digits in order of size, so that a question with the same answer for the same
reason ("sort 9337") is never in the other part. All is a function of the task's name, lengths and seed.
"""

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator

from deepseek_jax.posttraining.rewards.problem import Problem

HELD_OUT = 10  # one problem of so many
TRIES = 1000  # draws without a new problem after which a task has no more


def sort_digits(digits: list[int]) -> tuple[str, str, str]:
    """Return question, thought and answer: the digits in order of size, counted first."""
    ordered = sorted(digits)
    thought = " ".join(f"{digit}x{count}" for digit, count in Counter(ordered).items())
    return "sort " + "".join(map(str, digits)), thought, "".join(map(str, ordered))


def add_digits(digits: list[int]) -> tuple[str, str, str]:
    """Return question, thought and answer: the sum of the digits, one after the other."""
    steps, total = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    return "add " + " ".join(map(str, digits)), " ".join(steps), str(total)


TASKS = {"sort_digits": sort_digits, "add_digits": add_digits}


def sort_hastily(digits: list[int]) -> tuple[str, str, str]:
    """Return question, thought and answer of one who only swaps neighbours, once from left to right: often wrong."""
    swapped = list(digits)
    for i in range(len(swapped) - 1):
        swapped[i : i + 2] = sorted(swapped[i : i + 2])
    return "sort " + "".join(map(str, digits)), "?", "".join(map(str, swapped))


HASTY = {"sort_digits": sort_hastily}  # an answer without steps to it


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems of one kind, with `shortest` to `longest` digits."""

    name: str
    seed: int = 0
    shortest: int = 4
    longest: int = 6

    def __post_init__(self):
        """Refuse what makes no problems."""
        if self.name not in TASKS:
            raise ValueError(f"the task is {self.name!r}: one of {sorted(TASKS)}")
        if not 2 <= self.shortest <= self.longest <= 32:
            raise ValueError(f"{self.shortest} to {self.longest} digits: 2 <= shortest <= longest <= 32")

    def cold_start(self, num: int, hasty: int = 0) -> list[dict[str, list[dict[str, str]]]]:
        """Return conversations in R1's template, none of a held-out problem.

        Args:
            num: that show the way to the answer.
            hasty: behind them, that answer without it and are often wrong (`HASTY`). A model that learns from both
                knows two ways, and nothing tells it which is better.

        Raises:
            ValueError: the task has no hasty way.
        """
        if hasty and self.name not in HASTY:
            raise ValueError(f"hasty = {hasty}: {self.name} has no hasty way; use 0, or one of {sorted(HASTY)}")
        ways = ("cold start", num, TASKS[self.name]), ("hasty", hasty, HASTY.get(self.name, TASKS[self.name]))
        return [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"<think>{thought}</think><answer>{answer}</answer>"},
                ]
            }
            for part, count, way in ways
            for question, thought, answer in self._draw(part, count, False, way)
        ]

    def train_problems(self, num: int) -> list[Problem]:
        """Return different problems to train on; they may be those of the cold start, never held-out ones."""
        return self._problems("train", num, False)

    def heldout_problems(self, num: int) -> list[Problem]:
        """Return different problems to evaluate on.

        Raises:
            ValueError: the task does not have so many (as the other two do).
        """
        return self._problems("heldout", num, True)

    def _problems(self, part: str, num: int, held_out: bool) -> list[Problem]:
        return [
            Problem(question, ({"role": "user", "content": question},), answer)
            for question, _, answer in self._draw(part, num, held_out)
        ]

    def _draw(
        self, part: str, num: int, held_out: bool, way: Callable[[list[int]], tuple[str, str, str]] | None = None
    ) -> Iterator[tuple[str, str, str]]:
        """Yield `num` different problems of one side of the split, answered in a way; by default the right one."""
        way = way or TASKS[self.name]
        generator = random.Random(f"{self.name}/{self.seed}/{part}")  # from the text itself, not from its `hash`
        seen: set[str] = set()
        tries = 0
        while len(seen) < num:
            digits = [generator.randrange(10) for _ in range(generator.randint(self.shortest, self.longest))]
            question, thought, answer = way(digits)
            tries += 1
            if tries > TRIES:
                raise ValueError(f"{self.name} has no {num} different problems for {part!r}: fewer, or longer ones")
            if is_held_out(digits) == held_out and question not in seen:
                seen.add(question)
                tries = 0
                yield question, thought, answer


def is_held_out(digits: list[int]) -> bool:
    """Tell which side of the split a problem is on, whatever the order of its digits and whatever the seed."""
    key = "".join(map(str, sorted(digits))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % HELD_OUT == 0


def make_task(name: str = "sort_digits", seed: int = 0, shortest: int = 4, longest: int = 6) -> Task:
    """Return a task by its name; see `Task`."""
    return Task(name, seed, shortest, longest)
