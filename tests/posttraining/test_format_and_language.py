"""R1's template, and the share of words in a language."""

import pytest

from deepseek_jax.posttraining.rewards.format import format_reward, parts, text_reward
from deepseek_jax.posttraining.rewards.language import language_reward, words
from deepseek_jax.posttraining.rewards.problem import Problem

PROBLEM = Problem("p", (), answer="7", language="en")


def test_the_template_is_strict():
    good = " <think>\nwhy\n</think>\n\n<answer> 7 </answer>\n"
    assert parts(good) == ("why", "7")
    assert format_reward(PROBLEM, good) == text_reward(PROBLEM, good) == 1.0
    for bad in (
        "<think>why</think>7",
        "<answer>7</answer><think>why</think>",
        "<think></think><answer>7</answer>",
        "<think>why</think><answer> </answer>",
        "<think>why</think>so<answer>7</answer>",
        "<think>why</think><answer>7</answer>.",
        "<think>why</think><answer>7</answer><answer>7</answer>",
        "<think>why<think></think><answer>7</answer>",
        "why</think><answer>7</answer>",
        "<THINK>why</THINK><answer>7</answer>",
    ):
        assert format_reward(PROBLEM, bad) == text_reward(PROBLEM, bad) == 0.0, bad


def test_a_long_text_without_an_answer_is_judged_at_once():
    """A pattern that searches for something in both parts takes the square of their length: hours of this text."""
    assert parts("<think>" + "so " * 300_000 + "</think><answer> </answer>") is None
    assert parts("<think>" + " " * 900_000 + "</think><answer>7</answer>") is None


def test_an_answer_must_be_there_letter_for_letter():
    assert text_reward(PROBLEM, "<think>t</think><answer>77</answer>") == 0.0
    with pytest.raises(ValueError, match="no answer"):
        text_reward(Problem("p", ()), "x")


@pytest.mark.parametrize(
    "text, scripts",
    [
        ("don't stop", ["LATIN"] * 2),
        ("你好 world", ["CJK", "CJK", "LATIN"]),
        ("naïve cafe\u0301", ["LATIN"] * 2),
        ("Привет, мир", ["CYRILLIC"] * 2),
        ("x + y = 3, so ab", []),
        ("$x α length$ `name` \\frac ```\ndef code(value)\n```", []),
        ("$你$ `好` \\frac ```\nкод\n```", ["CJK", "CJK", "CYRILLIC"]),
        ("<think>word</think>", ["LATIN"]),
        ("wordслово", ["LATIN", "CYRILLIC"]),
        ("한국어 말", ["HANGUL"] * 2),
    ],
)
def test_words_are_runs_of_one_script(text, scripts):
    assert words(text) == scripts


def test_the_reward_is_the_share_of_words():
    assert language_reward(PROBLEM, "all of this text") == 1.0
    assert language_reward(PROBLEM, "three words and 你") == 0.75
    assert language_reward(PROBLEM, "hello $中文$ `中文` ```中文中文") == pytest.approx(1 / 9)
    assert language_reward(PROBLEM, "12 + 3") == 0.0
    assert language_reward(Problem("p", (), language="zh"), "你好 hello") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="language 'xx': one of ar, bg"):
        language_reward(Problem("p", (), language="xx"), "text")
