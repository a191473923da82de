"""The problems of a run, to train on and held out, with their prompts as ids."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.data.chat import ChatTemplate, check_messages
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inputs import json_lines, local_path, shown
from deepseek_jax.posttraining.grpo_settings import PATH, Grpo, task_of
from deepseek_jax.posttraining.rewards import MATHEMATICAL, NEEDS
from deepseek_jax.posttraining.rewards.language import SCRIPTS
from deepseek_jax.posttraining.rewards.mathematics import reference
from deepseek_jax.posttraining.rewards.problem import Case, Problem, Tests
from deepseek_jax.posttraining.tasks import make_task

KEYS = {"question", "messages", "answer", "language", "tests"}
FORM_OF_TESTS = (
    '{"function": name, "cases": [{"arguments": [...], "expected": ...}], "script": text}, with cases, a script or both'
)


class Prompt(NamedTuple):
    """A problem, and the ids that ask for it."""

    problem: Problem
    ids: list[int]


class Problems(NamedTuple):
    """Two disjoint parts."""

    train: list[Prompt]
    heldout: list[Prompt]

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on, but for languages.

        Runs from before there were tests have it in their checkpoints, so what it says of problems without any stays.
        """
        text = json.dumps([(p.problem.name, p.problem.answer, p.ids, *_tests_in(p.problem)) for p in self.train])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_problems(config: Config, grpo: Grpo, template: ChatTemplate, tokenizer: Tokenizer) -> Problems:
    """Return the problems of a run.

    Raises:
        ValueError: a bad file, fewer problems than are asked for, or a prompt that leaves no room for an output.
    """

    def prompt(problem: Problem) -> Prompt:
        try:
            return Prompt(problem, template.encode(tokenizer, problem.messages))
        except ValueError as error:
            raise ValueError(f"problem {shown(repr(problem.name))}: {error}") from error

    prompts = Problems(*([prompt(p) for p in part] for part in find_problems(config.seed, grpo)))
    longest = max(prompts.train + prompts.heldout, key=lambda prompt: len(prompt.ids))
    if len(longest.ids) + grpo.max_new_tokens > config.data.sequence_length:
        raise ValueError(
            f"problem {shown(repr(longest.problem.name))} has {len(longest.ids)} tokens, and with {PATH}.max_new_tokens"
            f" = {grpo.max_new_tokens} does not fit data.sequence_length = {config.data.sequence_length}; change one"
        )
    return prompts


def find_problems(seed: int, grpo: Grpo) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and the held-out ones, of a run with this seed.

    Raises:
        ValueError: a bad file, fewer problems than are asked for, or one that is judged and lacks what a reward reads.
    """
    if task := task_of(grpo.problems):
        made = make_task(task.name, seed, task.shortest, task.longest)
        parts = made.train_problems(grpo.num_problems), made.heldout_problems(grpo.heldout)
    else:
        parts = split(read_problems(local_path(grpo.problems, f"{PATH}.problems")), grpo.heldout)
    judged = [part for name, part in zip(Problems._fields, parts, strict=True) if name in grpo.judged]
    for problem in itertools.chain(*judged):
        _check_needs(problem, grpo)
    return parts


def _check_needs(problem: Problem, grpo: Grpo) -> None:
    """Refuse a problem that a reward could not judge: in a run it would fail, or count as 0, each time."""
    for name in grpo.rewards:
        need = NEEDS.get(name)
        if need and not _serves(need, getattr(problem, need)):
            known = f", one of {', '.join(sorted(SCRIPTS))}" if need == "language" else ""
            raise ValueError(
                f"the reward {name!r} reads {need!r}{known}, and problem {shown(repr(problem.name))} of"
                f" {shown(repr(grpo.problems))} has {shown(repr(getattr(problem, need)))}; write it in a .jsonl"
                " file of problems, or use another reward"
            )
        if name in MATHEMATICAL:
            try:
                reference(str(problem.answer))
            except ValueError as error:
                raise ValueError(
                    f"the answer of problem {shown(repr(problem.name))} of {shown(repr(grpo.problems))} can never be"
                    f" met by the reward {name!r}: {error}"
                ) from error


def _serves(need: str, value: Any) -> bool:
    """Return whether a reward can judge by this value of a problem's field."""
    if need == "language":
        return value in SCRIPTS
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def read_problems(path: Path) -> list[Problem]:
    """Return the problems of a file, one JSON object a line: a text "question" or "messages", and a text "answer".

    A "language" may stand beside them, and "tests" of code (`FORM_OF_TESTS`), with which there may be no answer. Cases
    cannot expect a tuple, a set or numbers as keys, which JSON has not; a script can. The name of a problem is its
    question, or the last of its messages.

    Raises:
        ValueError: what is wrong, with file and line.
    """
    problems: dict[str, Problem] = {}
    for where, found in json_lines(path, shown(str(path))):
        problem = _problem(found, where)
        key = json.dumps(problem.messages)
        if key in problems:
            raise ValueError(f"{where} asks what an earlier line asks; remove one, or it might be on both sides")
        problems[key] = problem
    return list(problems.values())


def split(problems: list[Problem], heldout: int) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on, and `heldout` others: those whose messages have the smallest hashes."""
    if not 0 < heldout < len(problems):
        raise ValueError(f"{PATH}.heldout = {heldout} of {len(problems)} problems leaves none on one side; change it")
    order = sorted(problems, key=lambda p: hashlib.blake2b(json.dumps(p.messages).encode()).digest())
    aside = {id(problem) for problem in order[:heldout]}
    return [p for p in problems if id(p) not in aside], order[:heldout]


def _problem(found: Any, where: str) -> Problem:
    found = _given(found)
    if not isinstance(found, dict) or not found.keys() <= KEYS or ("question" in found) == ("messages" in found):
        raise ValueError(
            f'{where} must be an object with "question" or "messages", and "answer"; "language" and "tests" may follow'
        )
    messages = found.get("messages", [{"role": "user", "content": found.get("question")}])
    texts = isinstance(messages, list) and all(
        isinstance(m, dict) and m.keys() == {"role", "content"} and all(isinstance(v, str) and v for v in m.values())
        for m in messages
    )
    if not texts or not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages are objects with the texts role and content, and the last is the user's")
    try:
        check_messages(messages)
        tests = _tests(found["tests"]) if "tests" in found else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    answer = found.get("answer")
    if not isinstance(answer, str) and not (tests and "answer" not in found):
        raise ValueError(f'{where} has no text "answer", which the rewards compare with; write it as a text')
    if not isinstance(found.get("language", ""), str):
        raise ValueError(f'{where}: "language" must be a text, "en" for example')
    return Problem(messages[-1]["content"], tuple(messages), answer, tests, found.get("language"))


def _tests(found: Any) -> Tests:
    """Return tests of code in the form that `FORM_OF_TESTS` says."""
    found = _given(found)
    cases: Any = found.get("cases", []) if isinstance(found, dict) else None
    script: Any = found.get("script", "") if isinstance(found, dict) else None
    is_form = (
        isinstance(cases, list)
        and all(isinstance(case, dict) and case.keys() == {"arguments", "expected"} for case in cases)
        and all(isinstance(case["arguments"], list) for case in cases)
        and found.keys() <= {"function", "cases", "script"}
        and isinstance(found.get("function"), str)
        and isinstance(script, str)
    )
    if not is_form:
        raise ValueError(f'"tests" = {shown(repr(found))} must be {FORM_OF_TESTS}')
    made = tuple(Case(tuple(case["arguments"]), case["expected"]) for case in cases)
    return Tests(found["function"], made, script if script.strip() else None)


def _given(found: Any) -> Any:
    """Return an object without the keys whose value is null: files made of tables have all keys in every line."""
    return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else found


def _tests_in(problem: Problem) -> list[Any]:
    return [dataclasses.asdict(problem.tests)] if problem.tests else []
