"""The reward of a mathematical answer: 1 if it is the expected one in whatever form, else 0.

The answer is the last \\boxed{...} behind the reasoning (`mathematics_reward`), or what follows the last "####"
(`gsm8k_reward`). Two answers are equal if they are equal exactly (`numbers`): 1/2, 0.5, \\frac{1}{2} and 50% are,
1.414 and \\sqrt{2} are not. Beside numbers there are

    lists 1, 2            in any order, as the solutions of an equation are
    sets \\{1, 2\\}         in any order, repetitions do not count
    tuples, intervals     (1, 2), [0, 1): the brackets and the order count
    text                  east, \\text{east}: letter for letter, apart from case and spaces

A unit, a currency or "x =" may stand on one side only; two different units or variables are two answers. Any words are
a unit but those that deny or change the number; "thousand" and its like multiply it (`units`). A percent sign may stand
on one side only, and the number may be meant with or without it: 50% equals 0.5, and 50 (what percent?). So equality is
reflexive and symmetric, and, for percentages and units, not transitive.

An answer that tries several ("3 or 4", "3, 4" for 3) is another answer. Letters that look like others are what they
are. Long texts, huge powers and deep nesting are no values, and are refused before anything is computed.
"""

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from deepseek_jax.posttraining.rewards import numbers, units
from deepseek_jax.posttraining.rewards.problem import Problem

MOST_CHARACTERS = 500  # of an answer
MOST_ITEMS = 32
MOST_NESTED = 4  # sets in sets

SPACES = re.compile(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])|\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])|\s+")
SIGNS = {
    "\u2212": "-",
    "\u03c0": "\\pi ",
    "\u00d7": "\\times ",
    "\u00b7": "\\cdot ",
    "\u00b0": "\\circ",
    "\u221e": "\\infty ",
}
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", re.ASCII)
VARIABLE = re.compile(r"^\s*([A-Za-z])\s*=\s*(?=\S)")
IN_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox|textrm|mathbf)\s*\{([^{}]*)\}")
CHOICE = re.compile(r"\([a-z]\)")
DEGREES = re.compile(r"\^?\{?\s*\\circ\s*\}?$")
PERCENT = re.compile(r"(?:\\?%|(?<![A-Za-z])percent)$", re.IGNORECASE)
CURRENCIES = {"\\$": "dollar", "$": "dollar", "\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen"}
UNIT = re.compile(r"(?<=[\d)}\s])\s*([A-Za-z]+(?:[ /][A-Za-z]+){0,3})\s*(?:\^\s*\{?\s*([23])\s*\}?)?$")


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{...} behind the reasoning; None if there is none, or it is not closed."""
    text = text.rpartition("</think>")[2]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), min(len(text), start + MOST_CHARACTERS + 10)):
        escaped = text[place - 1] == "\\"
        depth += {"{": 1, "}": -1}.get(text[place], 0) * (not escaped)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def after_hashes(text: str) -> str | None:
    """Return what follows the last "####" behind the reasoning, on its line, as GSM8K writes answers; None without."""
    _, mark, rest = text.rpartition("</think>")[2].rpartition("####")
    return rest.partition("\n")[0].strip() if mark else None


def mathematics_reward(problem: Problem, text: str) -> float:
    """Return 1 if the last box holds the answer of `problem.answer` (`reference`), else 0.

    Raises:
        ValueError: a problem without an answer.
    """
    answer = last_boxed(text)
    return float(answer is not None and equivalent(_expected(problem), answer))


def gsm8k_reward(problem: Problem, text: str) -> float:
    """Return 1 if the answer behind the last "####" is that of `problem.answer`, which may be GSM8K's whole text."""
    answer = after_hashes(text)
    return float(answer is not None and equivalent(_expected(problem), answer))


def reference(answer: str) -> str:
    """Return what is compared of a problem's answer: of GSM8K's whole text what follows the last "####", else all.

    Raises:
        ValueError: no completion could equal it.
    """
    hidden = after_hashes(answer)
    found = answer if hidden is None else hidden
    if "\\boxed{" in found:
        raise ValueError("it has a \\boxed{...}, and contents of boxes are compared; write what is in it")
    if not equivalent(found, found):
        behind = "behind its last '####' " * (hidden is not None)
        raise ValueError(f"{behind}it is empty, or has more than {MOST_CHARACTERS} characters; write the result alone")
    return found


def _expected(problem: Problem) -> str:
    if not problem.answer or not problem.answer.strip():
        raise ValueError(f"problem {problem.name} has no answer: a reward of mathematics needs Problem.answer")
    return reference(problem.answer)


def equivalent(a: str, b: str) -> bool:
    """Tell whether two answers are the same; see the top of the file for what that means."""
    if max(len(a), len(b)) > MOST_CHARACTERS or not a.strip() or not b.strip():
        return False
    return _equal(_form(a), _form(b))


class Form(NamedTuple):
    """An answer: a number's content is a `numbers.Value`, that of a collection a tuple of forms."""

    kind: str
    content: Any
    unit: str = ""
    variable: str = ""


@functools.lru_cache(4096)
def _form(text: str, depth: int = 0) -> Form:
    text, variable = _plain(text)
    return _content(text, depth)._replace(variable=variable)


def _content(text: str, depth: int) -> Form:
    def inner(items: list[str]) -> tuple[Form, ...]:
        return tuple(_form(item, depth + 1) for item in items)

    if depth > MOST_NESTED:
        return _words(text)
    if text[:2] == "\\{" and text[-2:] == "\\}":
        items = _split(text[2:-2])
        return Form("set", inner(items)) if items else _words(text)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_end(text):
        items = _split(text[1:-1])
        if items and len(items) > 1:
            return Form(text[0] + text[-1], inner(items))
    joined = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    items = _split(joined)
    if items and len(items) > 1:
        return Form("list", inner(items))
    return _number(joined) or _words(text)


def _plain(text: str) -> tuple[str, str]:
    """Return an answer without what only sets its type (dollars, spacing commands, the full stop), and x of `x =`."""
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    text = text.strip().rstrip(".").strip()
    for before, after in (("\\(", "\\)"), ("$", "$")):
        if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
            text = text[len(before) : -len(after)]
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))|(?<=,)\\!(?=\d{3}(?!\d))", "", text)  # 1\,000 and 1,\!000
    text = SPACES.sub(" ", text).strip()
    if match := IN_WORDS.fullmatch(text):  # \text{5}
        text = match[1].strip()
    match = VARIABLE.match(text)
    return (text[match.end() :], match[1].casefold()) if match else (text, "")


def _split(text: str) -> list[str] | None:
    """Return the parts between commas outside of brackets; None if a bracket does not match or there are too many."""
    parts, depth = [""], 0
    for place, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth < 0:
            return None
        if character == "," and depth == 0 and text[place - 1 : place] != "\\":
            parts.append("")
        else:
            parts[-1] += character
    good = depth == 0 and len(parts) <= MOST_ITEMS and all(part.strip() for part in parts)
    return parts if good else None


def _closes_at_end(text: str) -> bool:
    """Tell whether the bracket at the beginning is closed by the one at the end: not in (1)+(2)."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return place == len(text) - 1
    return False


def _number(text: str) -> Form | None:
    """Return a number with its unit; None if it is none."""
    unit = ""
    for mark, name in CURRENCIES.items():
        if text.lstrip("+- ").startswith(mark):
            text, unit = text.replace(mark, "", 1), name
    if match := DEGREES.search(text):
        text, unit = text[: match.start()], "degree"
    words = IN_WORDS.sub(lambda match: " " + match[1].strip() + " ", text).strip()
    multiple = 1
    if match := PERCENT.search(words):
        text, unit = words[: match.start()], "%"
    elif words[-1:] in CURRENCIES and not unit:
        text, unit = words[:-1], CURRENCIES[words[-1]]
    elif match := UNIT.search(words):
        multiple, own = units.read(match[1])
        if own is not None and not (own and unit) and not (match[2] and not own):
            text, unit = words[: match.start()], unit or own + (match[2] or "")
        else:
            multiple = 1
    if "\\" not in text and re.fullmatch(r"\s*[-+]?\d+ \d+/\d+\s*", text, re.ASCII):  # 1 1/2
        sign, whole, fraction = re.fullmatch(r"\s*([-+]?)(\d+) (\S+)\s*", text).groups()  # pyright: ignore
        text = f"{sign}({whole}+{fraction})"
    try:
        value = numbers.parse(text.strip())
        return Form("number", numbers.multiply(value, numbers.rational(Fraction(multiple))), unit)
    except (numbers.NoValue, ZeroDivisionError):
        return None


def _words(text: str) -> Form:
    words = "".join(IN_WORDS.sub(lambda match: match[1], text).split()).casefold()
    return Form("text", words[1:-1] if CHOICE.fullmatch(words) else words)


def _equal(a: Form, b: Form) -> bool:
    (kind, x, unit_x, variable_x), (other, y, unit_y, variable_y) = a, b
    if kind != other or (variable_x and variable_y and variable_x != variable_y):
        return False
    if kind == "text":
        return x == y
    if kind == "number":
        return _equal_numbers(x, unit_x, y, unit_y)
    if kind == "set":
        return all(any(_equal(i, j) for j in y) for i in x) and all(any(_equal(i, j) for i in x) for j in y)
    if len(x) != len(y):
        return False
    if kind == "list":
        return _match(x, y)
    return all(map(_equal, x, y))


def _match(x: Sequence[Form], y: Sequence[Form]) -> bool:
    """Tell whether each of x has a partner of its own in y: by augmenting paths, as equality is not transitive."""
    equal = [[j for j, other in enumerate(y) if _equal(form, other)] for form in x]
    partner: dict[int, int] = {}  # place in y: place in x

    def find(i: int, tried: set[int]) -> bool:
        for j in equal[i]:
            if j not in tried:
                tried.add(j)
                if j not in partner or find(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    return all(find(i, set()) for i in range(len(x)))


def _equal_numbers(x: numbers.Value, unit_x: str, y: numbers.Value, unit_y: str) -> bool:
    if unit_x and unit_y:
        return x == y and unit_x == unit_y
    if "%" not in (unit_x, unit_y):
        return x == y
    percent, bare = (x, y) if unit_x == "%" else (y, x)
    return bare in (percent, {term: number * Fraction(1, 100) for term, number in percent.items()})
