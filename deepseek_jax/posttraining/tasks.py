"""Small tasks made by code, with answers that a rule can check: what a tiny model learns in minutes.

Each problem has a question, a way to its answer in small steps, and the answer, for example

    sort_digits   "sort 7393"     <think>3x2 7x1 9x1</think><answer>3379</answer>
    add_digits    "add 7 3 9 3"   <think>7+3=10 10+9=19 19+3=22</think><answer>22</answer>
    word_problems  a story of calculations, answered as GSM8K is (`posttraining.word_problems`)

A cold start shows a model the way (`cold_start`, conversations for SFT); reinforcement learning then has the question
and the answer alone (`train_problems`; rewards "text" and "format", or "gsm8k"). `heldout_problems` are never trained
on: which part a problem belongs to is a hash of its digits in order of size, so that a question with the same answer
for the same reason ("sort 9337") is never in the other part. A word problem is held out if the hash of its chain of
calculations says so, or that of any beginning of it: so no held-out chain is a trained one, or the beginning of one,
and longer chains are held out more often (19% of two calculations, 47% of six). Within a trained chain, behind its
beginning, a short held-out one can occur. All is a function of the task's name, lengths and seed.
"""

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator

from deepseek_jax.posttraining import word_problems
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.word_problems import Drawn

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


DIGITS = {"sort_digits": sort_digits, "add_digits": add_digits}
WORDS = "word_problems"
TASKS = (*DIGITS, WORDS)


def sort_hastily(digits: list[int]) -> tuple[str, str, str]:
    """Return question, thought and answer of one who only swaps neighbours, once from left to right: often wrong."""
    swapped = list(digits)
    for i in range(len(swapped) - 1):
        swapped[i : i + 2] = sorted(swapped[i : i + 2])
    return "sort " + "".join(map(str, digits)), "?", "".join(map(str, swapped))


HASTY = {"sort_digits": sort_hastily}  # an answer without steps to it; word problems have one of their own


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems of one kind, with `shortest` to `longest` digits, or calculations of a word problem."""

    name: str
    seed: int = 0
    shortest: int = 4
    longest: int = 6

    def __post_init__(self):
        """Refuse what makes no problems."""
        if self.name not in TASKS:
            raise ValueError(f"the task is {self.name!r}: one of {sorted(TASKS)}")
        least, most, what = (1, word_problems.MOST_STEPS, "calculations") if self.name == WORDS else (2, 32, "digits")
        if not least <= self.shortest <= self.longest <= most:
            raise ValueError(f"{self.shortest} to {self.longest} {what}: {least} <= shortest <= longest <= {most}")

    def cold_start(self, num: int, hasty: int = 0) -> list[dict[str, list[dict[str, str]]]]:
        """Return conversations, none of a held-out problem: in R1's template, or in GSM8K's form.

        Args:
            num: that show the way to the answer.
            hasty: behind them, that answer without it: sorting often wrong (`HASTY`), word problems right. A model that
                learns from both knows two ways, and nothing tells it which is better.

        Raises:
            ValueError: the task has no hasty way.
        """
        if hasty and self.name not in (*HASTY, WORDS):
            raise ValueError(f"hasty = {hasty}: {self.name} has no hasty way; use 0, or one of {[*HASTY, WORDS]}")
        return [
            {
                "messages": [
                    {"role": "user", "content": drawn.question},
                    {"role": "assistant", "content": drawn.reply},
                ]
            }
            for part, count, hastily in (("cold start", num, False), ("hasty", hasty, True))
            for drawn in self._draw(part, count, False, hastily)
        ]

    def texts(self, num: int) -> list[str]:
        """Return problems with their solutions as plain text for pre-training, none of a held-out problem."""
        return [f"{drawn.question}\n{drawn.reply}\n" for drawn in self._draw("texts", num, False)]

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
            Problem(drawn.question, ({"role": "user", "content": drawn.question},), drawn.answer)
            for drawn in self._draw(part, num, held_out)
        ]

    def _draw(self, part: str, num: int, held_out: bool, hasty: bool = False) -> Iterator[Drawn]:
        """Yield `num` different problems of one side of the split, answered step by step or hastily."""
        generator = random.Random(f"{self.name}/{self.seed}/{part}")  # from the text itself, not from its `hash`
        seen: set[str] = set()
        tries = 0
        while len(seen) < num:
            if self.name == WORDS:
                drawn = word_problems.draw(generator, self.shortest, self.longest, hasty)
            else:
                drawn = self._draw_digits(generator, hasty)
            tries += 1
            if tries > TRIES:
                raise ValueError(f"{self.name} has no {num} different problems for {part!r}: fewer, or longer ones")
            if is_held_out(drawn.key) == held_out and drawn.question not in seen:
                seen.add(drawn.question)
                tries = 0
                yield drawn

    def _draw_digits(self, generator: random.Random, hasty: bool) -> Drawn:
        way: Callable[[list[int]], tuple[str, str, str]] = (HASTY if hasty else DIGITS)[self.name]
        digits = [generator.randrange(10) for _ in range(generator.randint(self.shortest, self.longest))]
        question, thought, answer = way(digits)
        reply = f"<think>{thought}</think><answer>{answer}</answer>"
        return Drawn(question, reply, answer, "".join(map(str, sorted(digits))))


def is_held_out(key: str) -> bool:
    """Tell which side of the split a problem is on, by what it is about and whatever the seed.

    Words of a key are steps: what begins with a held-out key is held out.
    """
    words = key.split(" ")
    beginnings = (" ".join(words[: n + 1]).encode() for n in range(len(words)))
    return any(int.from_bytes(hashlib.blake2b(x, digest_size=8).digest()) % HELD_OUT == 0 for x in beginnings)


def make_task(name: str = "sort_digits", seed: int = 0, shortest: int = 4, longest: int = 6) -> Task:
    """Return a task by its name; see `Task`."""
    return Task(name, seed, shortest, longest)
