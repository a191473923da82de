"""Tasks made by code: right, the same each time, and what is held out is never trained on."""

import re

import pytest

from deepseek_jax.posttraining.rewards.format import format_reward, text_reward
from deepseek_jax.posttraining.tasks import DIGITS, Task, make_task


def digits(question):
    return tuple(sorted(re.findall(r"\d", question)))


@pytest.mark.parametrize("name", DIGITS)
def test_what_is_held_out_is_not_trained_on_in_any_order(name):
    tasks = [make_task(name, seed) for seed in (0, 1)]
    trained = {digits(problem.name) for task in tasks for problem in task.train_problems(1500)}
    trained |= {digits(row["messages"][0]["content"]) for task in tasks for row in task.cold_start(1500)}
    held_out = {digits(problem.name) for task in tasks for problem in task.heldout_problems(300)}
    assert not trained & held_out
    assert len({problem.name for problem in tasks[0].heldout_problems(300)}) == 300


@pytest.mark.parametrize("name", DIGITS)
def test_a_cold_start_is_right_and_rewarded(name):
    task = make_task(name)
    answers = {problem.name: problem for problem in task.train_problems(3000)}
    rows = [row["messages"] for row in task.cold_start(500)]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    both = [(answers[user["content"]], reply["content"]) for user, reply in rows if user["content"] in answers]
    assert len(both) > 5
    assert all(text_reward(*pair) == format_reward(*pair) == 1.0 for pair in both)
    for problem in answers.values():
        numbers = [int(digit) for digit in digits(problem.name)]
        assert problem.answer == (str(sum(numbers)) if name == "add_digits" else "".join(map(str, numbers)))


def test_a_task_is_a_function_of_its_seed():
    assert make_task(seed=1).train_problems(9) == make_task(seed=1).train_problems(20)[:9]
    assert make_task(seed=1).train_problems(9) != make_task(seed=2).train_problems(9)
    assert [problem.name for problem in make_task().heldout_problems(2)] == [
        "sort 0687",
        "sort 33991",
    ]  # on any machine


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="the task is 'chess'"):
        make_task("chess")
    with pytest.raises(ValueError, match="digits"):
        Task("sort_digits", shortest=5, longest=4)
    with pytest.raises(ValueError, match="no 1000 different problems"):
        make_task(shortest=2, longest=2).train_problems(1000)


def test_a_hasty_way_shows_no_steps_and_is_often_wrong():
    task = make_task("sort_digits", 0, 4, 5)
    both = task.cold_start(500, 1000)
    assert both[:500] == task.cold_start(500)
    said = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in both[500:]]
    assert all(reply.startswith("<think>?</think><answer>") for _, reply in said)
    answers = [re.findall(r"\d", reply) for _, reply in said]
    assert all(sorted(answer) == list(digits(question)) for (question, _), answer in zip(said, answers, strict=True))
    assert all(answer[-1] == max(answer) for answer in answers)  # one sweep brings the largest to its place
    assert 0.1 < sum(answer == sorted(answer) for answer in answers) / 1000 < 0.5
    held_out = {digits(problem.name) for problem in task.heldout_problems(200)}
    assert not held_out & {digits(question) for question, _ in said}
    with pytest.raises(ValueError, match="hasty = 1: add_digits has no hasty way"):
        make_task("add_digits").cold_start(1, 1)
