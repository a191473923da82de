"""Exact values of short answers in text and LaTeX: numbers, and a closed set of irrational ones.

A value is a sum of terms c * sqrt(r) * pi^k with rational c, square-free r and integer k: {(r, k): c}. Sums and
products of such values are exact, and two of them are equal if and only if their terms are: square roots of different
square-free numbers and the powers of pi are linearly independent over the rationals. Division is by a single term.

There is no `eval` and no computer algebra: a recursive parser over a bounded text, in which every number is bounded, so
that its cost is bounded. 9^9^9^9 is refused before it is computed. What the parser does not know it refuses.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction

Value = dict[tuple[int, int], Fraction]  # (number under the root, power of pi): coefficient; no zeros

MOST_CHARACTERS = 200
MOST_DIGITS = 60  # of a numerator or denominator, on the way too
MOST_POWER = 200  # of an exponent
MOST_TERMS = 16
MOST_UNDER_ROOT = 10**8  # factors are sought by trial, up to its root
MOST_NESTED = 20

TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<command>\\(?:frac|sqrt|pi|cdot|times|div))"
    r"|(?P<sign>[-+*/^(){}\[\]])"
    r"|(?P<name>pi|sqrt|e(?=[-+]?\d))"
    r"|(?P<space>\s+)",
    re.ASCII,  # \d is 0 to 9
)


class NoValue(ValueError):
    """A text that is no value in the sense of this file."""


def parse(text: str) -> Value:
    """Return the value of a text: integers, decimals, \\frac, \\sqrt, \\pi, powers, mixed numbers, 1.2e3, + - * / ( ).

    Raises:
        NoValue: it is none, or one too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise NoValue(f"longer than {MOST_CHARACTERS} characters")
    tokens, place = [], 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if not match:
            raise NoValue(f"unknown from {text[place : place + 10]!r}")
        tokens.append((match.lastgroup or "", match[0].strip()))
        place = match.end()
    parser = _Parser([token for token in tokens if token[0] != "space"], _numbers_apart(tokens))
    value = parser.sum()
    if parser.place < len(parser.tokens):
        raise NoValue("something follows")
    return value


def _numbers_apart(tokens: list[tuple[str, str]]) -> bool:
    """Tell whether two numbers stand side by side, as in "1 000" or "2 3": no form of one value."""
    kinds = [kind for kind, _ in tokens]
    return any(kinds[i : i + 3] == ["number", "space", "number"] for i in range(len(kinds)))


def rational(number: Fraction) -> Value:
    """Return a rational number as a value."""
    for part in (number.numerator, number.denominator):
        if part.bit_length() > MOST_DIGITS * 3.33:
            raise NoValue(f"a number of more than {MOST_DIGITS} digits")
    return {(1, 0): number} if number else {}


def add(a: Value, b: Value, sign: int = 1) -> Value:
    """Return a + sign * b."""
    total = dict(a)
    for term, coefficient in b.items():
        total[term] = total.get(term, Fraction(0)) + sign * coefficient
    return _checked(total)


def multiply(a: Value, b: Value) -> Value:
    """Return a * b."""
    total: Value = {}
    for (root_a, power_a), x in a.items():
        for (root_b, power_b), y in b.items():
            common = math.gcd(root_a, root_b)  # sqrt(a) sqrt(b) = gcd sqrt(a / gcd * b / gcd), square-free again
            term = (root_a // common * (root_b // common), power_a + power_b)
            total[term] = total.get(term, Fraction(0)) + x * y * common
    return _checked(total)


def divide(a: Value, b: Value) -> Value:
    """Return a / b for one term b: 1 / (c sqrt(r) pi^k) = sqrt(r) / (c r) pi^-k."""
    if len(b) != 1:
        raise NoValue("a division by zero, or by a sum of roots")
    (((root, power), coefficient),) = b.items()
    return multiply(a, {(root, -power): 1 / (coefficient * root)})


def root(a: Value) -> Value:
    """Return the square root of a rational number that is not negative."""
    if not a:
        return {}
    if list(a) != [(1, 0)] or a[1, 0] < 0:
        raise NoValue("a root of something else than a rational number >= 0")
    number = a[1, 0]
    under, outside = number.numerator * number.denominator, 1
    whole = math.isqrt(under)
    if whole * whole == under:
        return rational(Fraction(whole, number.denominator))
    if under > MOST_UNDER_ROOT:
        raise NoValue("a root of a large number")
    factor = 2
    while factor * factor <= under:
        while under % (factor * factor) == 0:
            under, outside = under // (factor * factor), outside * factor
        factor += 1
    return {(under, 0): Fraction(outside, number.denominator)}


def power(a: Value, b: Value) -> Value:
    """Return a^b for an integer b, and for a half-integer b where the root is known."""
    exponent = b.get((1, 0), Fraction(0))
    if b and list(b) != [(1, 0)] or abs(exponent) > MOST_POWER or exponent.denominator > 2:
        raise NoValue("a power that is large or not rational")
    if exponent.denominator == 2:
        a, exponent = root(a), exponent * 2
    if exponent < 0:
        a, exponent = divide(rational(Fraction(1)), a), -exponent
    result = rational(Fraction(1))
    for _ in range(int(exponent)):
        result = multiply(result, a)
    return result


def _checked(value: Value) -> Value:
    kept = {term: number for term, number in value.items() if number}
    if len(kept) > MOST_TERMS or any(under > MOST_UNDER_ROOT or abs(k) > MOST_POWER for under, k in kept):
        raise NoValue("an expression with many or large terms")
    for number in kept.values():
        rational(number)
    return kept


class _Parser:
    """Recursive descent: sum > product > sign > power > atom."""

    def __init__(self, tokens: list[tuple[str, str]], apart: bool):
        if apart:
            raise NoValue("two numbers side by side")
        self.tokens = [*tokens]
        self.place = 0
        self.depth = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self, *texts: str) -> str | None:
        if self.peek()[1] in texts and self.peek()[0] != "end":
            self.place += 1
            return self.tokens[self.place - 1][1]
        return None

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise NoValue(f"no {text!r} at {self.peek()[1]!r}")

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise NoValue("nested deeply")
        value = self.product()
        while sign := self.take("+", "-"):
            value = add(value, self.product(), 1 if sign == "+" else -1)
        self.depth -= 1
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.take("*", "\\cdot", "\\times"):
                value = multiply(value, self.signed())
            elif self.take("/", "\\div"):
                value = divide(value, self.signed())
            elif self.peek()[1] in ("\\sqrt", "\\pi", "pi", "sqrt", "("):  # 2\pi, 3\sqrt{2}, 2(3)
                value = multiply(value, self.power())
            else:
                return value

    def signed(self) -> Value:
        sign = 1
        if found := self.take("-", "+"):
            sign = -1 if found == "-" else 1
        return multiply(rational(Fraction(sign)), self.power())

    def power(self) -> Value:
        value = self.atom()
        if self.take("e"):  # 1.2e-3
            sign = -1 if self.take("-", "+") == "-" else 1
            return multiply(value, power(rational(Fraction(10)), multiply(rational(Fraction(sign)), self.atom())))
        if self.take("^"):
            exponent = self.group(self.sum) if self.peek()[1] == "{" else self.signed()
            return power(value, exponent)
        return value

    def group(self, inner: Callable[[], Value]) -> Value:
        closing = {"{": "}", "(": ")", "[": "]"}[self.take("{", "(", "[") or self.refuse()]
        value = inner()
        self.expect(closing)
        return value

    def refuse(self) -> str:
        raise NoValue(f"no number at {self.peek()[1]!r}")

    def atom(self) -> Value:
        kind, text = self.peek()
        if kind == "number":
            self.place += 1
            if len(text) > MOST_DIGITS:
                raise NoValue(f"a number of more than {MOST_DIGITS} digits")
            value = rational(Fraction(text))
            if self.peek()[1] == "\\frac":  # a mixed number, 1\frac{1}{2}
                if "." in text:
                    raise NoValue("a decimal before a fraction")
                value = add(value, self.atom())
            return value
        if self.take("\\pi", "pi"):
            return {(1, 1): Fraction(1)}
        if self.take("\\frac"):
            return divide(self.argument(), self.argument())
        if self.take("\\sqrt", "sqrt"):
            return root(self.group(self.sum) if self.peek()[1] in ("{", "(") else self.argument())
        return self.group(self.sum)

    def argument(self) -> Value:
        """Return the argument of a command: a group in braces, or one digit (\\frac12)."""
        kind, text = self.peek()
        if kind == "number" and "." not in text:
            digit, rest = text[0], text[1:]
            self.tokens[self.place : self.place + 1] = [("number", digit)] + ([("number", rest)] if rest else [])
            self.place += 1
            return rational(Fraction(digit))
        return self.group(self.sum) if text == "{" else self.atom()
