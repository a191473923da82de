"""Files of problems: what a line may hold, and what of it a run depends on."""

import hashlib
import json

import pytest

from deepseek_jax.posttraining.problems import Problems, Prompt, read_problems
from deepseek_jax.posttraining.rewards.problem import Case
from deepseek_jax.posttraining.rewards.problem import Tests as UnitTests

CASES = [{"arguments": [1], "expected": None}]


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_problems(path)


@pytest.mark.parametrize("unused", ["", " \n", None])
def test_a_script_that_a_table_left_empty_is_none(tmp_path, unused):
    """It would be run and call nothing, so that no answer were right."""
    (problem,) = read(tmp_path, {"question": "a", "tests": {"function": "f", "cases": CASES, "script": unused}})
    assert problem.tests == UnitTests("f", (Case((1,), None),))
    with pytest.raises(ValueError, match="line 1: the tests of f have neither cases nor a script"):
        read(tmp_path, {"question": "a", "tests": {"function": "f", "cases": None, "script": unused}})


def test_tests_from_python_have_no_blank_script():
    with pytest.raises(ValueError, match="the script of the tests of f is blank; leave it out"):
        UnitTests("f", (Case((1,), 1),), " \n")


def test_keys_without_a_value_are_as_if_they_were_not_there(tmp_path):
    first, second = read(
        tmp_path,
        {"question": "a", "messages": None, "answer": "1", "tests": None, "language": None},
        {"question": "b", "answer": None, "tests": {"function": "f", "cases": CASES}},
    )
    assert (first.answer, first.tests, first.language, second.answer) == ("1", None, None, None)
    assert second.tests.cases == (Case((1,), None),)  # of a case it is a value


def test_the_fingerprint_is_that_of_older_checkpoints_and_has_tests(tmp_path):
    """Problems could have a language before it was judged by; a run of that time goes on."""
    plain, tested = {"question": "a", "answer": "1", "language": "en"}, {"function": "f", "cases": CASES}

    def fingerprint(*lines):
        return Problems([Prompt(problem, [3, 4]) for problem in read(tmp_path, *lines)], []).fingerprint

    older = hashlib.blake2b(json.dumps([("a", "1", [3, 4])]).encode(), digest_size=16).hexdigest()
    assert fingerprint(plain) == older
    others = [fingerprint(plain | {"tests": tested | more}) for more in ({}, {"script": "f(1)"}, {"function": "g"})]
    assert len({older, *others}) == 4
