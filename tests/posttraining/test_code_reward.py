"""Code is rewarded if it passes its tests, and for nothing else."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.posttraining.rewards.code import CodeReward, last_code
from deepseek_jax.posttraining.rewards.problem import Case, Problem
from deepseek_jax.posttraining.rewards.problem import Tests as UnitTests
from deepseek_jax.posttraining.rewards.sandbox import session, values
from deepseek_jax.posttraining.rewards.sandbox.session import Limits, SandboxError
from tests.support.patience import SECONDS

sandboxed = pytest.mark.skipif(session.missing() is not None, reason=session.missing() or "")

RIGHT = "def pairs(items): return {item: (items.count(item), item / 2) for item in items}"
CASES = (Case(([3, 4, 3],), {3: (2, 1.5), 4: (1, 2.0)}), Case(([],), {}))
SCRIPT = """
def check(candidate):
    assert candidate([1]) == {1: (1, 0.5)}
    assert pairs(items=[]) == {}
check(candidate)
"""


def reward(source, **tests):
    text = f"<think>\n```python\nraise SystemExit\n```\n</think>\nHere it is:\n```python\n{source}\n```\n"
    return CodeReward(Limits(SECONDS))(Problem("p", (), tests=UnitTests("pairs", **tests)), text)


@sandboxed
def test_code_that_passes_is_rewarded_and_other_code_is_not():
    assert reward(RIGHT, cases=CASES, script=SCRIPT) == 1.0
    assert reward(RIGHT.replace("/ 2", "/ 3"), cases=CASES) == 0.0
    assert reward(RIGHT.replace("/ 2", "/ 3"), script=SCRIPT) == 0.0
    assert reward("def pairs(items): return items[", cases=CASES) == 0.0


@sandboxed
@pytest.mark.parametrize(
    "source",
    [
        "import os\ndef pairs(items): os._exit(0)",
        "class Yes(dict):\n  __eq__ = lambda self, other: True\ndef pairs(items): return Yes()",
        "import builtins\nbuiltins.AssertionError = KeyError\nraise SystemExit(0)",
    ],
)
def test_a_script_of_tests_is_not_fooled(source):
    assert reward(source, script=SCRIPT) == 0.0


@sandboxed
def test_a_script_that_swallows_errors_is_not_passed_by_dead_code():
    script = "try: candidate([])\nexcept BaseException: pass"
    assert reward("import os\ndef pairs(items): os._exit(0)", script=script) == 0.0


@sandboxed
def test_a_script_can_expect_an_exception_of_the_code_itself_alone():
    """Neither a missing function nor a value that does not cross counts as the KeyError or ValueError asked for."""
    script = "try: candidate([])\nexcept (KeyError, ValueError): pass\nelse: assert False"
    assert reward("def pairs(items): raise ValueError('empty')", script=script) == 1.0
    for wrong in ("def pairs(items): return 0", "def pairs(items): return object()", "x = 1"):
        assert reward(wrong, script=script) == 0.0


@sandboxed
def test_a_tuple_is_no_list_and_a_script_can_expect_it():
    """In a file's cases there are no tuples (docs/rewards.md)."""
    source = "def pairs(items): return (1, 2)"
    assert reward(source, cases=(Case(([],), [1, 2]),)) == 0.0
    assert reward(source, script="assert pairs([]) == (1, 2)") == 1.0


@sandboxed
def test_tests_that_test_nothing_are_an_error():
    with pytest.raises(ValueError, match="calls neither"):
        reward(RIGHT, script="assert True")
    with pytest.raises(ValueError, match="neither cases nor a script"):
        UnitTests("f")
    with pytest.raises(ValueError, match="problem p has no tests"):
        CodeReward()(Problem("p", ()), "```\nx\n```")


def test_a_machine_without_a_sandbox_has_no_code_reward(monkeypatch):
    monkeypatch.setattr("deepseek_jax.posttraining.rewards.code.missing", lambda: "no namespaces here")
    with pytest.raises(SandboxError, match="no namespaces here"):
        CodeReward()


def test_the_code_is_the_last_block_behind_the_reasoning():
    assert last_code("```\na\n```\nand\n```py\nb\n```") == "b\n"
    assert last_code("```python\na\n```\n</think>no code") is None
    assert last_code("```python\nnot closed") is None
    assert last_code("```python\n" * 100_000) is None  # and at once: each line is read once


def test_a_block_of_another_language_is_no_code_and_opens_none():
    """The fence that closes it is not the opening of a block that ends where Python's begins."""
    code = "```python\ndef f(): return 1\n```\n"
    for other in ("```json\n{}\n```\n", "```c++\n}\n```\n", "``` text output\n1\n```\n"):
        assert last_code(other + "Now the code:\n" + code) == "def f(): return 1\n"
        assert last_code(code + other) == "def f(): return 1\n"
        assert last_code(other) is None
    assert last_code("```not a fence```\n" + code) == "def f(): return 1\n"
    assert last_code('```python title="f.py"\na\n```') == "a\n"


FENCED = re.compile(r"^```[ \t]*([^`\s]*)[^`\n]*\n(.*?)^```\s*?$", re.DOTALL | re.MULTILINE)


@given(st.lists(st.sampled_from(["```", "```py", "```Python3 ", "```c", "``` \t", "a", "", "\r", " ```", "a```"])))
def test_blocks_are_those_of_the_pattern(lines):
    """Which takes the square of a text's length."""
    found = FENCED.findall("\n".join(lines))
    blocks = [block for language, block in found if language.lower() in ("", "py", "python", "python3")]
    assert last_code("\n".join(lines)) == (blocks[-1] if blocks else None)


VALUES = [None, True, 0, -3, 1.5, "x", b"\x00", [1, [2]], (1, 2), {1, 2}, frozenset({"a"}), {"a": 1, 2: [None]}, ""]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_plain_value_crosses_and_equals_itself_alone(value):
    encoded = values.encode(value)
    assert values.decode(encoded) == value
    assert type(values.decode(encoded)) is type(value)
    for other in VALUES:
        assert values.same(other, encoded) == (type(other) is type(value) and other == value)


def test_numbers_compare_by_value_and_tolerance():
    assert values.same(1, 1.0) and values.same(2.0, 2)
    assert not values.same(1, True) and not values.same(True, 1)
    assert not values.same(0.3, 0.1 + 0.2) and values.same(0.3, 0.1 + 0.2, 1e-9)
    assert not values.same(1.0, 10**400, 1.0)
    infinity, nan = float("inf"), float("nan")
    assert values.same(infinity, values.encode(infinity)) and not values.same(infinity, values.encode(-infinity))
    assert not values.same(nan, values.encode(nan)) and not values.same(1.0, values.encode(infinity), 1.0)


def test_what_is_no_plain_value_does_not_cross():
    cyclic: list = []
    cyclic.append(cyclic)
    for value in (object(), cyclic, type("Int", (int,), {})(3), lambda: 0, 1j):
        with pytest.raises(ValueError, match="value"):
            values.encode(value)
