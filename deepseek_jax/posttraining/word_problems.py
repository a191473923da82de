"""Word problems in the form of GSM8K (arXiv 2110.14168), made by code: a story of so many calculations, and its answer.

    Mia has 48 shells. Mia gives half of them to a friend. Then Mia finds 9 more. How many shells does Mia have now?

    Mia then has 48/2 = <<48/2=24>>24 shells.
    Mia then has 24+9 = <<24+9=33>>33 shells.
    #### 33

The form of the solutions is GSM8K's, with its calculator annotations, and so the reward "gsm8k" reads both. The
language is much poorer: a handful of sentences around each kind of calculation. How hard a problem is, is the number of
its calculations, and all numbers are whole and below `LIMIT`.

A chain of calculations ("48/2 24+9") is what a problem is about, whatever its names and words are; `tasks.is_held_out`
holds out a chain with all that begin with it.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

LIMIT = 1000
MOST_STEPS = 12
LARGEST_START, LARGEST_TERM, LARGEST_FACTOR = 60, 90, 9
SOLD = 0.25  # of stories end with a price, if the numbers allow it

NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "Dev",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jamal",
    "Kira",
    "Liam",
    "Mia",
    "Noor",
    "Omar",
)
ITEMS = ("apples", "books", "buttons", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
OPENINGS = (
    "{name} has {a} {items}.",
    "{name} starts the week with {a} {items}.",
    "There are {a} {items} in a box that belongs to {name}.",
    "In April {name} counts {a} {items}.",
)
SENTENCES = {
    "+": (
        "Then {name} finds {b} more.",
        "A friend gives {name} {b} more.",
        "On the next day {name} buys {b} more {items}.",
        "{name} gets another {b} as a present.",
    ),
    "-": (
        "{name} gives {b} of them to a neighbor.",
        "Then {b} of the {items} get lost.",
        "{name} sells {b} of them.",
        "{name} takes {b} {items} to school and leaves them there.",
    ),
    "*": (
        "An aunt brings so many that there are {b} times as many.",
        "By the end of the month the number has grown to {b} times as many.",
        "A machine makes {b} {items} out of each of them.",
    ),
    "/": (
        "{name} shares them equally among {b} children, and is one of them.",
        "Only one of every {b} {items} is kept.",
        "{name} packs them into {b} equal bags and keeps a single bag.",
    ),
    "half": ("{name} gives half of them to a friend.", "Half of the {items} are thrown away."),
}
QUESTIONS = ("How many {items} does {name} have now?", "How many {items} are left with {name} in the end?")
SALES = (
    "Each one is then sold for ${b}. How many dollars does {name} get in all?",
    "{name} sells all of them for ${b} each. How much money does {name} make?",
)
RESULT, EARNED = "{name} then has {sum}{y} {items}.", "{name} gets {sum}{y} dollars."

CALCULATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, b: x + b,
    "-": lambda x, b: x - b,
    "*": lambda x, b: x * b,
    "/": lambda x, b: x // b,
}


class Drawn(NamedTuple):
    """One problem. `key` is what it is about: two problems with the same key are the same for a split."""

    question: str
    reply: str
    answer: str
    key: str


def draw(generator: random.Random, shortest: int, longest: int, hasty: bool) -> Drawn:
    """Return a problem of `shortest` to `longest` calculations; a hasty reply has the right answer and no steps."""
    choose, steps = generator.choice, generator.randint(shortest, longest)
    words = {"name": choose(NAMES), "items": choose(ITEMS)}
    x = generator.randint(3, LARGEST_START)
    story, solution, chain = [choose(OPENINGS).format(a=x, **words)], [], []
    for step in range(steps):
        last = step == steps - 1
        sold = last and 2 * x < LIMIT and generator.random() < SOLD
        sign = "*" if sold else choose([s for s in CALCULATIONS if operands(s, x)])
        b = choose(operands(sign, x))
        y = CALCULATIONS[sign](x, b)
        sentences = SALES if sold else SENTENCES["half" if sign == "/" and b == 2 else sign]
        story.append(choose(sentences).format(b=b, **words))
        calculation = f"{x}{sign}{b}"
        told = EARNED if sold else RESULT
        solution.append(told.format(sum=f"{calculation} = <<{calculation}={y}>>", y=y, **words))
        chain.append(calculation)
        x = y
        if last and not sold:
            story.append(choose(QUESTIONS).format(**words))
    answer = f"#### {x}"
    reply = answer if hasty else "\n".join([*solution, answer])
    return Drawn(" ".join(story), reply, str(x), " ".join(chain))


def operands(sign: str, x: int) -> range | list[int]:
    """Return the second numbers with which a calculation that begins with x stays whole, positive and below LIMIT."""
    if sign == "+":
        return range(2, min(LARGEST_TERM, LIMIT - 1 - x) + 1)
    if sign == "-":
        return range(1, min(LARGEST_TERM, x - 1) + 1)
    if sign == "*":
        return range(2, min(LARGEST_FACTOR, (LIMIT - 1) // x) + 1)
    return [b for b in range(2, LARGEST_FACTOR + 1) if x % b == 0 and x > b]
