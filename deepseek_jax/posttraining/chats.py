"""The conversations of a run: read from files, encoded, split into those to train on and those held out.

A record has a list of messages under `data.text_field`, and may have `tools` and `chat_template_kwargs`, which go to
the template:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

What cannot be used is refused or skipped as `data.on_error` says, with its file and line: broken JSON, no reply, an
unknown role, an empty content, a template that fails, a conversation that is longer than a row. Nothing is ever cut: a
reply without its end would teach the model not to stop.

The split reads what comes before the first reply, so that all answers to one question are on one side. It is by hash,
as that of texts is (`data.split`); of a few conversations at least one is on each side.

The ids stay in memory, five bytes a token: 4 GB for 800,000 conversations of 1,000 tokens.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from deepseek_jax.config import Data
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.documents import Problems
from deepseek_jax.data.examples import Example
from deepseek_jax.data.packing import Batch, Rows, best_fit, next_token_batch, pack
from deepseek_jax.data.records import Record, read_records
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inputs import shown
from deepseek_jax.posttraining.conversations import TOOLS, encode_conversation

VARIABLES = "chat_template_kwargs"  # field of a record beside its messages and tools: variables of the template


class Chats(NamedTuple):
    """Encoded conversations; `num_conversations` and `num_heldout` count them, an example may be a part of one."""

    train: list[Example]
    heldout: list[Example]
    num_conversations: int
    num_heldout: int


def read_chats(data: Data, template: ChatTemplate, tokenizer: Tokenizer) -> Chats:
    """Return the conversations of `data.sources` in their fixed order.

    Raises:
        ValueError: something cannot be used (see the module) and `data.on_error` refuses it, or nothing is left.
    """
    problems = Problems(data.on_error)
    keys: list[int] = []
    found: list[list[Example]] = []
    for source in data.sources:
        for record in read_records(source, problems):
            field = source.text_field or data.text_field
            examples = _encoded(record, field, template, tokenizer, data.sequence_length, problems)
            if examples:
                keys.append(_key(_messages(record.value[field])))
                found.append(examples)
    if problems.count:
        logging.warning("%d conversations are left out, for example: %s", problems.count, problems.messages[0])
    if not found:
        first = f"; the first of {problems.count} that cannot be used: {problems.messages[0]}" if problems.count else ""
        raise ValueError(
            f"data.sources have no conversation to train on{first}; give records with a list {data.text_field!r}"
        )
    below = _threshold(keys, data.heldout_fraction)
    train = [example for key, examples in zip(keys, found, strict=True) if key >= below for example in examples]
    heldout = [example for key, examples in zip(keys, found, strict=True) if key < below for example in examples]
    return Chats(train, heldout, len(found), sum(key < below for key in keys))


def rows_per_epoch(examples: list[Example], sequence_length: int) -> int:
    """Return how many rows hold all examples once; a run packs a window at a time (`data.pipeline`), nearly as well."""
    return len(best_fit([len(example.ids) for example in examples], sequence_length + 1))


class HeldOutChats:
    """The held-out conversations as batches: repeatable, each conversation whole, the last batch filled with padding.

    Rows are in a fixed random order, so that the first few are a fair sample.
    """

    def __init__(
        self,
        data: Data,
        pad: int,
        examples: list[Example],
        batch_size: int,
        num_batches: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Pack the examples.

        Args:
            data: masks and positions.
            pad: id of padding.
            examples: at least one.
            batch_size: rows of a batch, over all processes.
            num_batches: at most.
            process_index: of this process, which gets its part of every batch.
            process_count: of the run.
        """
        rows = pack(examples, data.sequence_length + 1, pad)
        order = np.random.default_rng(0).permutation(len(rows.tokens))[: num_batches * batch_size]
        missing = -len(order) % batch_size
        fills = (pad, 0, 0)
        self._rows = Rows(
            *(np.pad(a[order], ((0, missing), (0, 0)), constant_values=f) for a, f in zip(rows, fills, strict=True))
        )
        self._data, self._batch_size = data, batch_size
        self._share = batch_size // process_count
        self._first = process_index * self._share

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._rows.tokens) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's part of each batch."""
        for batch in range(len(self)):
            start = batch * self._batch_size + self._first
            yield next_token_batch(Rows(*(array[start : start + self._share] for array in self._rows)), self._data)


def _encoded(
    record: Record, field: str, template: ChatTemplate, tokenizer: Tokenizer, length: int, problems: Problems
) -> list[Example]:
    """Return the examples of a record; none if it is left out."""
    raw = record.value.get(field)
    if not isinstance(raw, list):
        fault = (
            f"has {shown(repr(raw))} under {field!r}, not a list of messages; make it one, or"
            if field in record.value
            else f"has no list of messages under {field!r} (it has {shown(str(sorted(record.value)))});"
        )
        problems.report(f"{record.where} {fault} name their field in data.text_field")
        return []
    messages = _messages(raw)
    given = record.value.get(VARIABLES) or {}
    if not isinstance(given, Mapping):
        problems.report(f"{record.where} has {VARIABLES} = {shown(repr(given))}; make it an object, or leave it out")
        return []
    variables = dict(given)
    if record.value.get(TOOLS):
        variables[TOOLS] = record.value[TOOLS]
    try:
        examples = encode_conversation(template, tokenizer, messages, **variables)
    except (ValueError, TypeError) as error:
        problems.report(f"{record.where}: {error}")
        return []
    longest = max(len(example.ids) for example in examples)
    if longest > length + 1:
        problems.report(
            f"{record.where} has {longest} tokens, and data.sequence_length = {length} holds {length + 1}; raise it"
        )
        return []
    return examples


def _messages(raw: list[Any]) -> list[Any]:
    """Return messages without empty fields, which a table gives to every message if any has them, but for contents.

    Templates ask whether a content is None, beside calls of tools.
    """
    return [
        {"content": None} | {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in raw
    ]


def _key(messages: list[Any]) -> int:
    """Return a number that depends on what comes before the first reply."""
    first = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))
    text = json.dumps(messages[:first], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _threshold(keys: list[int], fraction: float) -> int:
    """Return the number below which keys are held out: some on each side, if there are two different ones.

    Raises:
        ValueError: a fraction is to be held out, and all conversations ask the same.
    """
    different = sorted(set(keys))
    below = math.ceil(fraction * 2**64)
    if not fraction:
        return 0
    if len(different) == 1:
        raise ValueError(
            f"data.heldout_fraction = {fraction}, and all {len(keys)} conversations begin alike, so they cannot be"
            " split; set it to 0, or add others"
        )
    return min(max(below, different[0] + 1), different[-1])
