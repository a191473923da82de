"""Answers are equal if they are the same value, in whatever form; and nothing else is."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.posttraining.rewards.mathematics import (
    after_hashes,
    equivalent,
    gsm8k_reward,
    last_boxed,
    mathematics_reward,
)
from deepseek_jax.posttraining.rewards.numbers import NoValue, parse
from deepseek_jax.posttraining.rewards.problem import Problem

EQUAL = r"""
1/2 | 0.5 ;; \frac{1}{2} | \dfrac12 ;; 50\% | 0.5 ;; 50% | 50 ;; 50% | 50\% ;; 007 | 7 ;; +3 | 3 ;; (3) | 3
1,000 | 1000 ;; 1{,}000 | 1000 ;; 1\,000 | 1000 ;; 12,345.60 | 12345.6 ;; 5. | 5 ;; -5 | −5 ;; 1e-3 | .001
\sqrt{8} | 2\sqrt{2} ;; 2\pi | \pi\cdot 2 ;; \frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}} ;; 2^{10} | 1024
1\frac{1}{2} | 3/2 ;; 1 1/2 | 1.5 ;; -1 1/2 | -1.5 ;; -1\frac{1}{2} | -1.5 ;; \frac{1}{2}\pi | \frac{\pi}{2}
5\text{ cm} | 5 ;; 5 cm | 5 ;; \$5 | 5 ;; $5$ | 5 ;; 5 dollars | \$5 ;; 45^\circ | 45 ;; 45° | 45^{\circ}
\{1,2\} | \{2, 1\} ;; \{1,1\} | \{1\} ;; (1,2) | \left( 1, 2 \right) ;; [0,1) | [0, 1) ;; 1,2 | 2, 1
1.2e3 | 1200 ;; 1.2\times 10^{3} | 1200 ;; x=5 | 5 ;; (-\infty, 3] | (-\infty,3] ;; east | \text{East}
72 clips | 72 ;; -\frac{1}{2} | \frac{-1}{2} ;; 5\text{ cm}^2 | 5 ;; 4^{1/2} | 2 ;; -2^2 | -4 ;; 2^-1 | 1/2
5 million | 5000000 ;; 3 hundred | 300 ;; 2 dozen eggs | 24 eggs ;; \$5\text{ million} | 5{,}000{,}000
1.5 thousand | 1500 ;; 5 million dollars | \$5,000,000 ;; \text{5} | 5
\mathbf{5} | 5 ;; \textbf{5} | 5 ;; 12 percent | 12\% ;; (C) | C
\text{(C)} | C ;; 12 inches | 12 inch ;; 12 boxes | 12 box ;; 12 miles | 12 mile ;; 12 houses | 12 house
6 feet | 6 foot ;; €5 | 5 ;; 5 € | 5 euros ;; £5 | 5.00
¥500 | 500 yen ;; 12\text{ percent} | 0.12 ;; x=5 | X = 5 ;; 3 quarters | 3
2 miles per hour | 2 mile per hour ;; 50\%, 50 | 50, 0.5 ;; 50, 50\% | 50, 0.5 ;; 5 square feet | 5 ;; 4 s | 4
5 times | 5
"""
DIFFERENT = r"""
3 | 3 or 4 ;; 3 | 3, 4 ;; 3 | 3\text{ or }4 ;; 3 | x=3,4 ;; 5 | 5 or six ;; 5 | 5\text{ or maybe 6} ;; 5 | not 5
(1,2) | (2,1) ;; (1,2) | [1,2] ;; \{1\} | 1 ;; 1,2 | 1,2,2 ;; \sqrt{2} | 1.414 ;; 1/3 | 0.333 ;; \pi | 3.14
5 cm | 5 m ;; 5 | 5x ;; 3 | ３ ;; 3 | з ;; 9 | 9^9^9^9 ;; 1 | nan ;; 1 | inf ;; 1 | \infty ;; 5 | -5 ;; 1 | 1/0
12 | 1 2 ;; 5 | 5^ ;; 5 | {5 ;; 2 | 1+ ;; 10^{201} | 10^{202} ;; 0.5 | 50 ;; 1/2 | 12 ;; 0 | 0^{-1} ;; 1 | 1e400
5 | 5 million ;; 5 | 5\text{ million} ;; 5 | 5 thousand dollars ;; 5 | 5 hundred ;; 5 | 5 dozen ;; 5 | 5 factorial
5 | 5 infinity ;; 5 | 5 sin ;; 5 | 5 log ;; 5 | 5 negative ;; 3 | 3 hundred ;; 3 | 3 halves ;; 3 | 3 times ten
2 | 2 false ;; 3 | 3 minus pie ;; 3 | 3 wrong
7 | 7 hundredths ;; 1/3 | \frac13 cubed ;; 4 | 4 squared ;; 5 | 5 dollars million
5 | £6 ;; x=5 | y=5 ;; 4 s | 4 m ;; €5 | £5
(C) | (D) ;; 5 | \text{5 or 6} ;; 50\%, 50 | 50, 5 ;; (x=1, y=2) | (y=1, x=2)
5 | 5 thousandths ;; 12 percent | 13
"""


def rows(text: str) -> list[tuple[str, str]]:
    return [
        tuple(side.strip() for side in row.split(" | "))
        for line in text.split("\n")
        for row in line.split(" ;; ")
        if row
    ]


@pytest.mark.parametrize("a, b", rows(EQUAL))
def test_forms_of_one_value_are_equal(a, b):
    assert equivalent(a, b) and equivalent(b, a) and equivalent(a, a) and equivalent(b, b)


@pytest.mark.parametrize("a, b", rows(DIFFERENT))
def test_different_answers_are_different(a, b):
    assert not equivalent(a, b) and not equivalent(b, a)


def forms(value: Fraction) -> list[str]:
    """Return a rational number in all forms that are exact."""
    n, d, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    found = [
        f"{sign}{n}/{d}",
        rf"{sign}\frac{{{n}}}{{{d}}}",
        rf"\dfrac{{{sign}{3 * n}}}{{{3 * d}}}",
        rf"${sign}{n}/{d}$",
    ]
    if d == 1:
        found += [f"{sign}{n:,}", f"{sign}{n}.0", f"{sign}{n} apples"]
    if n > d > 1:
        found.append(rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}")
    if 10**6 % d == 0:
        found.append(f"{sign}{n * 10**6 // d // 10**6}.{n * 10**6 // d % 10**6:06d}")
        found.append(f"{sign}{n * 10**6 // d}e-6")
    return found


RATIONALS = st.fractions(-2000, 2000, max_denominator=50)


@settings(max_examples=60, deadline=None)
@given(RATIONALS, RATIONALS)
def test_equality_is_that_of_the_rational_numbers(x, y):
    for a in forms(x):
        assert equivalent(a, a)
        for b in forms(y):
            assert equivalent(a, b) == equivalent(b, a) == (x == y)
        assert all(equivalent(a, b) for b in forms(x))


@settings(max_examples=150, deadline=None)
@given(st.text(r"0123456789+-*/^(){}[]\,.%$ =exfracsqrtpi", max_size=40), st.text("019^{}()/", max_size=40))
def test_any_text_is_compared_without_an_error_and_symmetrically(a, b):
    assert equivalent(a, b) == equivalent(b, a)
    assert equivalent(a, a) or not a.strip()


@pytest.mark.parametrize(
    "text",
    [
        "9^" * 60 + "9",
        "2^200^200",
        "(" * 90,
        r"\sqrt{" * 20 + "2" + "}" * 20,
        r"(\sqrt2+\sqrt3+\sqrt5)^{200}",
        "9" * 190,
    ]
    + [r"(\pi^{200})^{200}", "1e200", "1/9" * 60, r"\sqrt{99999999999999999999}", r"(1+\pi)^{100}", "7^{200}"],
)
def test_what_would_take_long_is_refused(text):
    with pytest.raises(NoValue):
        parse(text)


def test_sets_in_sets_cost_little():
    """Equality of sets looks at each item twice, so nesting without a bound would take 2^100 comparisons."""
    deep = [r"\{" * 100 + digit + r"\}" * 100 for digit in "12"]
    assert equivalent(deep[0], deep[0]) and not equivalent(*deep)
    assert equivalent(r"\{\{1,2\},3\}", r"\{3,\{2,1\}\}")


def test_the_last_box_counts():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed(r"<think>\boxed{1}</think>\boxed{2}") == "2"
    for none in ("5", r"\boxed{1} \boxed{2", r"<think>\boxed{1}</think>5", r"\boxed{" + "1" * 1000 + "}"):
        assert last_boxed(none) is None


def test_rewards_read_their_own_place():
    problem = Problem("p", (), answer="so 2 + 2 = 4\n#### 1,004")
    assert gsm8k_reward(problem, "work\n#### 1004") == gsm8k_reward(problem, "#### 3\n#### $1,004.00\nend") == 1.0
    assert gsm8k_reward(problem, "1004") == gsm8k_reward(problem, "#### 1004\n#### 5") == 0.0
    for none in ("<think>\n#### 1004\n</think>\nI do not know", "####\n\n1004"):
        assert gsm8k_reward(problem, none) == 0.0
    assert after_hashes("no mark") is None
    assert mathematics_reward(Problem("p", (), answer="1004"), r"\boxed{1{,}004}") == 1.0
    assert mathematics_reward(problem, r"\boxed{1004}") == 1.0 and mathematics_reward(problem, r"\boxed{4}") == 0.0
    assert mathematics_reward(Problem("p", (), answer="1004"), "1004") == 0.0
    with pytest.raises(ValueError, match="problem p has no answer"):
        mathematics_reward(Problem("p", ()), r"\boxed{1}")
