"""Word problems: calculations are right, the story has their numbers, and no held-out chain begins a trained one."""

import re

import pytest

from deepseek_jax.posttraining.rewards.mathematics import gsm8k_reward
from deepseek_jax.posttraining.tasks import make_task
from deepseek_jax.posttraining.word_problems import LIMIT

ANNOTATION = re.compile(r"(\d+)([-+*/])(\d+) = <<\1\2\3=(\d+)>>\4 ")
DO = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y}


def chain(reply):
    """The calculations of a reply, each checked."""
    found = [(int(x), sign, int(y), int(z)) for x, sign, y, z in ANNOTATION.findall(reply)]
    assert len(found) == reply.count("<<") == reply.count("\n")
    for (x, sign, y, z), after in zip(found, [*found[1:], None], strict=True):
        assert DO[sign](x, y) == z and 0 < z < LIMIT
        assert after is None or after[0] == z
    assert reply.endswith(f"#### {found[-1][3]}")
    return found


def test_replies_are_right_step_by_step_and_rewarded():
    task = make_task("word_problems", 0, 1, 6)
    rows = [row["messages"] for row in task.cold_start(600)]
    lengths = set()
    for user, reply in rows:
        steps = chain(reply["content"])
        lengths.add(len(steps))
        digits = re.findall(r"\d+", user["content"])
        told = [str(steps[0][0])] + [str(y) for _, sign, y, _ in steps if (sign, y) != ("/", 2)]
        assert digits == told  # half of something is told without a number
    assert lengths == {1, 2, 3, 4, 5, 6}
    problems = task.train_problems(300)
    drawn = list(task._draw("train", 300, False))
    for problem, one in zip(problems, drawn, strict=True):
        assert problem.name == one.question and gsm8k_reward(problem, one.reply) == 1.0
        assert gsm8k_reward(problem, one.reply.replace("#### ", "#### 1")) == 0.0


def test_no_held_out_chain_is_trained_on():
    def keys(task, part, num, held_out):
        return {drawn.key for drawn in task._draw(part, num, held_out)}

    tasks = [make_task("word_problems", seed, 1, 3) for seed in (0, 1)]
    trained = {key for task in tasks for part in ("train", "texts") for key in keys(task, part, 2000, False)}
    trained |= {key for task in tasks for key in keys(task, "cold start", 500, False) | keys(task, "hasty", 500, False)}
    held_out = {key for task in tasks for key in keys(task, "heldout", 500, True)}
    assert len(trained) > 3000 and not trained & held_out
    chains = [key.split(" ") for key in trained]
    assert not {" ".join(chain[:n]) for chain in chains for n in range(1, len(chain))} & held_out  # no beginning either
    assert len({problem.name for problem in tasks[0].heldout_problems(500)}) == 500


def test_hasty_replies_are_right_and_have_no_steps():
    both = make_task("word_problems", 0, 2, 4).cold_start(20, 40)
    assert all("<<" in row["messages"][1]["content"] for row in both[:20])
    hasty = [row["messages"][1]["content"] for row in both[20:]]
    assert all(re.fullmatch(r"#### \d+", reply) for reply in hasty)
    drawn = list(make_task("word_problems", 0, 2, 4)._draw("hasty", 40, False))  # the same stories, with steps
    assert [one.answer for one in drawn] == [reply.removeprefix("#### ") for reply in hasty]


def test_texts_are_questions_with_solutions_and_the_same_on_any_machine():
    texts = make_task("word_problems", 0, 2, 6).texts(2)
    assert texts[0].partition("\n")[0].endswith("?") and texts[0].endswith("\n")
    assert texts == make_task("word_problems", 0, 2, 6).texts(3)[:2]
    chain(texts[1].partition("\n")[2].strip("\n"))
    first = make_task("word_problems", 0, 2, 2).heldout_problems(1)[0]
    assert (
        first.name.startswith("Felix has 19 pencils. A machine makes 8 pencils out of each") and first.answer == "108"
    )


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="0 to 3 calculations: 1 <= shortest <= longest <= 12"):
        make_task("word_problems", 0, 0, 3)
