"""The data of `experiments.studies.gsm8k`: texts, conversations, a tokenizer, and two sets of held-out problems.

    tokenizer.json    BPE of the texts without their digits, so that each digit is a token
    texts.jsonl       problems of the task with solutions, for pre-training
    gsm8k.jsonl       GSM8K's training problems with solutions, for pre-training
    chats.jsonl       conversations for fine-tuning: GSM8K's solutions, the task's with steps and hasty ones

A held-out problem is in none of these.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.data.bpe import train_bpe
from deepseek_jax.data.tokenizer import TOKENIZER_FILES
from deepseek_jax.files import write_atomically
from deepseek_jax.posttraining.grpo_settings import TaskName
from deepseek_jax.posttraining.problems import read_problems, split
from deepseek_jax.posttraining.rewards.problem import Problem
from deepseek_jax.posttraining.tasks import make_task

DIGIT = re.compile(r"\d")
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
        ValueError: GSM8K's file is not one of problems, or too small.
    """
    train, heldout = split(read_problems(gsm8k), sizes.gsm8k_heldout)
    steps = range(task.shortest, task.longest + 1)
    held = HeldOut(
        heldout, {n: make_task(task.name, seed, n, n).heldout_problems(sizes.heldout // len(steps)) for n in steps}
    )
    if (folder / TOKENIZER_FILES[0]).exists():  # written last
        return held
    folder.mkdir(parents=True, exist_ok=True)
    made = make_task(task.name, seed, task.shortest, task.longest)
    texts = made.texts(sizes.texts)
    ours = [f"{problem.name}\n{problem.answer}\n" for problem in train]
    chats = [
        {"messages": [*problem.messages, {"role": "assistant", "content": problem.answer}]} for problem in train
    ] + made.cold_start(sizes.with_steps, sizes.hasty)
    _write(folder / "texts.jsonl", ({"text": text} for text in texts))
    _write(folder / "gsm8k.jsonl", ({"text": text} for text in ours))
    _write(folder / "chats.jsonl", chats)
    learned = [DIGIT.sub(" ", text) for text in [*ours, *texts[:NUM_LEARNED]]]
    train_bpe(learned, vocab_size).save(folder / TOKENIZER_FILES[0])
    return held


def _write(path: Path, records: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
