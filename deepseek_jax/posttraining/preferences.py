"""Pairs of answers of which one was preferred: their file, the settings of a reward model, and the batches of pairs.

    {"question": "sort 21", "chosen": "12", "rejected": "21"}

or `messages`, whose last is the user's, in the place of the question. Which pairs are held out is a hash of what is
asked, so all pairs of one prompt are on one side. The position of a run is the number of the next pair.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inputs import json_lines, local_path, shown
from deepseek_jax.posttraining.reward_model import PAIR, answers_batch, encode_answer
from deepseek_jax.posttraining.rollouts import prompt_at

PATH = "config.posttraining.reward_model"
SIDES = "chosen", "rejected"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """The training of a reward model on pairs.

    Attributes:
        template: as that of SFT; it writes the prompts.
        pairs: a .jsonl file.
        heldout: prompts whose pairs are held out; at least one is trained on.
        epochs: passes over the pairs; `training.num_tokens` may end the run before.
    """

    template: str
    pairs: str
    heldout: int
    epochs: float


class Pairs(NamedTuple):
    """Encoded pairs, each the ids of the preferred answer and of the other, with their prompt."""

    train: list[tuple[list[int], list[int]]]
    heldout: list[tuple[list[int], list[int]]]

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on."""
        return hashlib.blake2b(json.dumps(self.train).encode(), digest_size=16).hexdigest()


def check_reward_model(settings: RewardModel, config: Config) -> None:
    """Refuse settings that do not go together or would not do what they say.

    Raises:
        ValueError: for the first fault that is found, with the remedy.
    """
    if not settings.template:
        raise ValueError(f"{PATH}.template is empty; name a template, 'folder' or 'plain' for example")
    if not settings.pairs.endswith(".jsonl"):
        raise ValueError(f"{PATH}.pairs = {shown(repr(settings.pairs))} must name a .jsonl file of pairs")
    if settings.heldout < 1:
        raise ValueError(f"{PATH}.heldout = {settings.heldout} must be at least 1: nothing else tells what was learned")
    if not (math.isfinite(settings.epochs) and settings.epochs > 0):
        raise ValueError(f"{PATH}.epochs = {settings.epochs} must be a positive number")
    schedule: Any = config.training.batch_size
    sizes = {"batch_size": [int(size) for *_, size in schedule], "micro_batch_size": [config.training.micro_batch_size]}
    for name, values in sizes.items():
        if len(values) != 1 or values[0] % PAIR:
            raise ValueError(f"config.training.{name} = {values} must be one even number: rows are pairs of answers")
    if config.optimizer.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay = {config.optimizer.weight_decay} would shrink all columns of the head but one,"
            " and MTP layers, which do not learn here; set it to 0"
        )


def with_length(config: Config, settings: RewardModel, pairs: Pairs) -> Config:
    """Return the configuration with the tokens of `epochs`, padding included, if that is fewer."""
    num_rows = math.ceil(settings.epochs * len(pairs.train)) * PAIR
    return config.with_(
        training={"num_tokens": float(min(num_rows * config.data.sequence_length, config.training.num_tokens))}
    )


def read_pairs(settings: RewardModel, length: int, template: ChatTemplate, tokenizer: Tokenizer) -> Pairs:
    """Return the pairs of the file, each whole in two rows of `length` tokens.

    Raises:
        ValueError: what is wrong, with file and line; or too few prompts.
    """
    path = local_path(settings.pairs, f"{PATH}.pairs")
    groups: dict[bytes, list[tuple[list[int], list[int]]]] = {}
    for where, found in json_lines(Path(path), shown(str(path))):
        messages, texts = _pair(found, where)
        try:
            better, worse = (encode_answer(template, tokenizer, messages, text) for text in texts)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if (longest := max(len(better), len(worse))) > length:
            raise ValueError(f"{where} has {longest} tokens, and data.sequence_length = {length}; change one")
        groups.setdefault(hashlib.blake2b(json.dumps(messages).encode()).digest(), []).append((better, worse))
    if len(groups) <= settings.heldout:
        raise ValueError(
            f"{PATH}.heldout = {settings.heldout} of the {len(groups)} prompts in {shown(str(path))} leaves none to"
            " train on; lower it, or add pairs"
        )
    keys = sorted(groups)
    parts = keys[settings.heldout :], keys[: settings.heldout]
    return Pairs(*([pair for key in part for pair in groups[key]] for part in parts))


def _pair(found: Any, where: str) -> tuple[list[dict[str, str]], list[str]]:
    keys = {*SIDES, "question"} if isinstance(found, dict) and "question" in found else {*SIDES, "messages"}
    if not isinstance(found, dict) or found.keys() != keys:
        raise ValueError(f'{where} must be an object with "question" or "messages", "chosen" and "rejected"')
    messages = found.get("messages", [{"role": "user", "content": found.get("question")}])
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise ValueError(f"{where}: messages are a list of objects, the last one the user's")
    if messages[-1].get("role") != "user":
        raise ValueError(f"{where}: the last message has the role {messages[-1].get('role')!r}, and must be the user's")
    texts = [found[side] for side in SIDES]
    if not all(isinstance(text, str) and text for text in [*texts, messages[-1].get("content")]):
        raise ValueError(f"{where}: what is asked and both answers are texts, and none is empty")
    if texts[0] == texts[1]:
        raise ValueError(f"{where}: both answers are the same, so neither is preferred; remove the line")
    return messages, texts


class PairBatches:
    """Rows of pairs: a `training.loop.Batches`."""

    def __init__(self, pairs: Pairs, length: int, pad: int, seed: int):
        """Begin at the first pair."""
        self.pairs, self.length, self.pad, self.seed = pairs, length, pad, seed
        self.number = 0

    def next_batch(self, batch_size: int) -> dict[str, np.ndarray]:
        """Return the next `batch_size / 2` pairs, epoch after epoch, each in an order of its own."""
        train, count = self.pairs.train, batch_size // PAIR
        chosen = [train[prompt_at(self.number + i, len(train), self.seed)] for i in range(count)]
        self.number += count
        return answers_batch([ids for pair in chosen for ids in pair], self.length, self.pad)

    def state(self) -> dict[str, Any]:
        """Return the position (JSON)."""
        return {"pair": self.number, "pairs": self.pairs.fingerprint}

    def restore(self, position: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            ValueError: it is of other pairs.
        """
        if position["pairs"] != self.pairs.fingerprint:
            raise ValueError(
                "the run's pairs, template or tokenizer have changed since its checkpoint; put them back, or begin"
                " another run with its weights: --initial with another --workdir"
            )
        self.number = position["pair"]


def heldout_row(score: Callable[[list[list[int]]], np.ndarray], pairs: Pairs) -> dict[str, Any]:
    """Return loss and accuracy over the held-out pairs, of the scores that `score` gives answers."""
    score_IP = np.float64(score([ids for pair in pairs.heldout for ids in pair])).reshape(-1, PAIR)
    margin_I = score_IP[:, 0] - score_IP[:, 1]
    return {
        "eval/pair_loss": float(np.logaddexp(0.0, -margin_I).mean()),
        "eval/pair_accuracy": float((margin_I > 0).mean()),
        "eval/margin": float(margin_I.mean()),
        "eval/pairs": len(margin_I),
    }
