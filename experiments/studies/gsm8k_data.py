"""The data of `experiments.studies.gsm8k`: texts, conversations, a tokenizer, and two sets of held-out problems.

    tokenizer.json    BPE of the texts without their digits, so that each digit is a token
    texts.jsonl       problems of the task with solutions, for pre-training
    gsm8k.jsonl       GSM8K's training problems with solutions, for pre-training
    solutions.jsonl   conversations for fine-tuning: GSM8K's solutions, and the task's with steps
    hasty.jsonl       the task's with the bare answer
    data.json         what all of this was made of: only the same may be measured beside it

A held-out problem is in none of these.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.tokenizer import TOKENIZER_FILES
from deepseek_jax.files import write_atomically
from deepseek_jax.inputs import read_json, shown
from deepseek_jax.posttraining.grpo_settings import TaskName
from deepseek_jax.posttraining.problems import read_problems, split
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.tasks import make_task

DIGIT = re.compile(r"\d")
RECORD = "data.json"
NUM_LEARNED = 2_000  # texts of the task that the tokenizer learns from, beside GSM8K's


class Sizes(NamedTuple):
    """Numbers of texts, conversations and problems."""

    texts: int = 120_000  # 17M tokens
    with_steps: int = 2_000
    hasty: int = 4_000
    gsm8k_heldout: int = 500
    heldout: int = 500  # of the task, equally many of each number of calculations


class HeldOut(NamedTuple):
    """What is measured."""

    gsm8k: list[Problem]
    task: dict[int, list[Problem]]  # by number of calculations


def prepare(folder: Path, gsm8k: Path, task: TaskName, vocab_size: int, seed: int, sizes: Sizes) -> HeldOut:
    """Write what is missing into a folder, and return the held-out problems.

    Args:
        folder: of the files.
        gsm8k: its training split.
        task: of word problems.
        vocab_size: of the tokenizer, at most.
        seed: of the task.
        sizes: of all parts.

    Raises:
        ValueError: GSM8K's file is not one of problems, or too small; the folder's data were made of something else.
    """
    made_of = {
        "gsm8k": hashlib.blake2b(gsm8k.read_bytes(), digest_size=16).hexdigest(),
        "task": f"{task.name}:{task.shortest}-{task.longest}",
        "seed": seed,
        "vocab_size": vocab_size,
        "sizes": sizes._asdict(),
    }
    complete = (folder / TOKENIZER_FILES[0]).exists()  # written last
    if complete:
        _check(folder, made_of)
    train, heldout = split(read_problems(gsm8k), sizes.gsm8k_heldout)
    steps = range(task.shortest, task.longest + 1)
    held = HeldOut(
        heldout, {n: make_task(task.name, seed, n, n).heldout_problems(sizes.heldout // len(steps)) for n in steps}
    )
    if complete:
        return held
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(made_of, indent=1) + "\n")
    made = make_task(task.name, seed, task.shortest, task.longest)
    texts = made.texts(sizes.texts)
    ours = [f"{problem.name}\n{problem.answer}\n" for problem in train]
    solutions = [
        {"messages": [*problem.messages, {"role": "assistant", "content": problem.answer}]} for problem in train
    ]
    shown_ways = made.cold_start(sizes.with_steps, sizes.hasty)
    _write(folder / "texts.jsonl", ({"text": text} for text in texts))
    _write(folder / "gsm8k.jsonl", ({"text": text} for text in ours))
    _write(folder / "solutions.jsonl", solutions + shown_ways[: sizes.with_steps])
    _write(folder / "hasty.jsonl", shown_ways[sizes.with_steps :])
    learned = [DIGIT.sub(" ", text) for text in [*ours, *texts[:NUM_LEARNED]]]
    train_bpe(learned, vocab_size).save(folder / TOKENIZER_FILES[0])
    return held


def _check(folder: Path, made_of: dict[str, Any]) -> None:
    """Refuse data of other problems: those held out today may have been trained on."""
    path = folder / RECORD
    stored = read_json(path) if path.exists() else {}
    for key, ours in made_of.items():
        if (theirs := stored.get(key)) != ours:
            raise ValueError(
                f"{shown(str(folder))} holds data that were made with {key} = {shown(repr(theirs))}, and this run has"
                f" {shown(repr(ours))}: problems held out now may be in them; give the former --gsm8k and settings, or"
                " a new folder as --runs"
            )


def _write(path: Path, records: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
