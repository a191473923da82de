"""The reward of a mathematical answer: 1 if it is the expected one in whatever form, else 0.

The answer is the last \\boxed{...} behind the reasoning (`mathematics_reward`), or what follows the last "####"
(`gsm8k_reward`). Two answers are equal if they are equal exactly (`numbers`): 1/2, 0.5, \\frac{1}{2} and 50% are,
1.414 and \\sqrt{2} are not. Beside numbers there are

    lists 1, 2            in any order, as the solutions of an equation are
    sets \\{1, 2\\}         in any order, repetitions do not count
    tuples, intervals     (1, 2), [0, 1): the brackets and the order count
    text                  east, \\text{east}: letter for letter, apart from case and spaces

A unit, a currency or "x =" may stand on one side only; two different units are two answers. A percent sign may stand on
one side only, and the number may be meant with or without it: 50% equals 0.5, and 50 (what percent?). So equality is
reflexive and symmetric, and, for percentages and units, not transitive.

An answer that tries several ("3 or 4", "3, 4" for 3) is another answer. Letters that look like others are what they
are. Long texts, huge powers and deep nesting are no values, and are refused before anything is computed.
"""

import functools
import re
from fractions import Fraction

from deepseek_jax.posttraining.rewards import numbers
from deepseek_jax.posttraining.rewards.problem import Problem

MOST_CHARACTERS = 500  # of an answer
MOST_ITEMS = 32

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
VARIABLE = re.compile(r"^\s*[A-Za-z]\s*=\s*(?=\S)")
IN_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox|textrm|mathbf)\s*\{([^{}]*)\}")
DEGREES = re.compile(r"\^?\{?\s*\\circ\s*\}?$")
UNIT = re.compile(r"(?<=[\d)}\s])\s*([A-Za-z]+(?:[ /][A-Za-z]+){0,2})\s*(?:\^\s*\{?\s*([23])\s*\}?)?$")
SHORT_UNITS = {
    "cm",
    "m",
    "km",
    "mm",
    "in",
    "ft",
    "yd",
    "mi",
    "g",
    "kg",
    "mg",
    "lb",
    "oz",
    "l",
    "ml",
    "s",
    "h",
    "am",
    "pm",
}
NO_UNITS = {"or", "and", "not", "is", "to", "than", "but", "maybe", "either", "nor", "if", "pi", "sqrt", "nan", "inf"}


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
    """Return what follows the last "####" on its line, as GSM8K writes answers; None without it."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None


def mathematics_reward(problem: Problem, text: str) -> float:
    """Return 1 if the last box holds `problem.answer`, else 0. Raises ValueError for a problem without an answer."""
    answer = last_boxed(text)
    return float(answer is not None and equivalent(_expected(problem), answer))


def gsm8k_reward(problem: Problem, text: str) -> float:
    """Return 1 if the answer behind the last "####" is that of `problem.answer`, which may be GSM8K's whole text."""
    expected = _expected(problem)
    answer = after_hashes(text)
    return float(answer is not None and equivalent(after_hashes(expected) or expected, answer))


def _expected(problem: Problem) -> str:
    if not problem.answer or not problem.answer.strip():
        raise ValueError(f"problem {problem.name} has no answer: a reward of mathematics needs Problem.answer")
    return problem.answer


def equivalent(a: str, b: str) -> bool:
    """Tell whether two answers are the same; see the top of the file for what that means."""
    if max(len(a), len(b)) > MOST_CHARACTERS or not a.strip() or not b.strip():
        return False
    return _equal(_form(a), _form(b))


# A form is (kind, content, unit): a number's content is a `numbers.Value`, that of a collection a tuple of forms.
Form = tuple[str, object, str]


@functools.lru_cache(4096)
def _form(text: str) -> Form:
    text = _plain(text)
    if text[:2] == "\\{" and text[-2:] == "\\}":
        items = _split(text[2:-2])
        return ("set", tuple(map(_form, items)), "") if items else _words(text)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_end(text):
        items = _split(text[1:-1])
        if items and len(items) > 1:
            return (text[0] + text[-1], tuple(map(_form, items)), "")
    joined = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    items = _split(joined)
    if items and len(items) > 1:
        return ("list", tuple(map(_form, items)), "")
    return _number(joined) or _words(text)


def _plain(text: str) -> str:
    """Return an answer without what only sets its type: dollars, spacing commands, the full stop, `x =`."""
    for sign, command in SIGNS.items():
        text = text.replace(sign, command)
    text = text.strip().rstrip(".").strip()
    for before, after in (("\\(", "\\)"), ("$", "$")):
        if text.startswith(before) and text.endswith(after) and len(text) > len(before + after):
            text = text[len(before) : -len(after)]
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))|(?<=,)\\!(?=\d{3}(?!\d))", "", text)  # 1\,000 and 1,\!000
    return VARIABLE.sub("", SPACES.sub(" ", text).strip())


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
    for mark in ("\\$", "$"):
        text, unit = (text.replace(mark, "", 1), "dollar") if text.lstrip("+- ").startswith(mark) else (text, unit)
    stripped = text.rstrip()
    for mark in ("\\%", "%"):
        if stripped.endswith(mark):
            text, unit = stripped[: -len(mark)], "%"
            break
    if match := DEGREES.search(text):
        text, unit = text[: match.start()], "degree"
    words = IN_WORDS.sub(lambda match: " " + match[1].strip() + " ", text).strip()
    match = UNIT.search(words)
    if match and not unit and _is_unit(match[1]):
        text, unit = words[: match.start()], match[1].lower().removesuffix("s") + (match[2] or "")
    if "\\" not in text and re.fullmatch(r"\s*[-+]?\d+ \d+/\d+\s*", text, re.ASCII):  # 1 1/2
        sign, whole, fraction = re.fullmatch(r"\s*([-+]?)(\d+) (\S+)\s*", text).groups()  # pyright: ignore
        text = f"{sign}({whole}+{fraction})"
    try:
        return ("number", numbers.parse(text.strip()), unit)
    except (numbers.NoValue, ZeroDivisionError):
        return None


def _is_unit(words: str) -> bool:
    parts = re.split("[ /]", words.lower())
    return not NO_UNITS.intersection(parts) and all(len(part) > 2 or part in SHORT_UNITS for part in parts)


def _words(text: str) -> Form:
    words = IN_WORDS.sub(lambda match: match[1], text)
    return ("text", "".join(words.split()).casefold(), "")


def _equal(a: Form, b: Form) -> bool:
    (kind, x, unit_x), (other, y, unit_y) = a, b
    if kind != other:
        return False
    if kind == "text":
        return x == y
    if kind == "number":
        return _equal_numbers(x, unit_x, y, unit_y)  # pyright: ignore
    if kind == "set":
        return all(any(_equal(i, j) for j in y) for i in x) and all(any(_equal(i, j) for i in x) for j in y)  # pyright: ignore
    if len(x) != len(y):  # pyright: ignore
        return False
    if kind == "list":
        return _match(list(x), list(y))  # pyright: ignore
    return all(map(_equal, x, y))  # pyright: ignore


def _match(x: list[Form], y: list[Form]) -> bool:
    """Tell whether each of x has a partner of its own in y."""
    for form in x:
        partner = next((other for other in y if _equal(form, other)), None)
        if partner is None:
            return False
        y.remove(partner)
    return True


def _equal_numbers(x: numbers.Value, unit_x: str, y: numbers.Value, unit_y: str) -> bool:
    if unit_x and unit_y:
        return x == y and unit_x == unit_y
    if "%" not in (unit_x, unit_y):
        return x == y
    percent, bare = (x, y) if unit_x == "%" else (y, x)
    return bare in (percent, {term: number * Fraction(1, 100) for term, number in percent.items()})
