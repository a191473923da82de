"""A file of prompts, JSON lines in and out: what a line may hold, and how batch after batch is completed."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import Config
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.files import replacing, write_all
from deepseek_jax.inference.completions import Completion, TokenLogprob
from deepseek_jax.inference.generate import prompt_ids
from deepseek_jax.inference.requests import Request, check_bias
from deepseek_jax.inputs import json_lines, local_path, shown
from deepseek_jax.progress import Bar


class Line(NamedTuple):
    """A line of the file: the whole object, and what it asks for."""

    object: dict[str, Any]
    request: Request

    @property
    def prompt(self) -> str:
        """The text to continue."""
        return self.object["prompt"]


def read_lines(file: str) -> list[Line]:
    """Return the lines of the file of --prompts.

    Raises:
        ValueError: a line is not an object with a text "prompt", what it asks for cannot be met, or there is none.
    """
    path, lines = local_path(file, "--prompts"), []
    for where, found in json_lines(path, f"--prompts={shown(file)}"):
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
            raise ValueError(f'{where} has no text "prompt"; write {{"prompt": "..."}}')
        try:
            lines.append(Line(found, request_of(found)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not lines:
        raise ValueError(f"--prompts={shown(file)} holds no prompt; write one object a line")
    return lines


def request_of(found: dict[str, Any]) -> Request:
    """Return what a line asks for, in the words of OpenAI's API.

    Raises:
        ValueError: a value has the wrong type, or is out of its range.
    """
    for key in ("seed", "logprobs"):
        if type(found.get(key)) not in (int, type(None)):
            raise ValueError(f'"{key}" is {shown(repr(found[key]))}; write a whole number')
    bias = found.get("logit_bias")
    bias = {} if bias is None else bias
    numbers = bias.values() if isinstance(bias, dict) else [None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers) or not all(
        key.isascii() and key.isdecimal() and len(key) < 20 for key in bias
    ):
        raise ValueError(f'"logit_bias" is {shown(repr(bias))}; write ids and numbers: {{"17": -100}}')
    values = {int(token): float(value) for token, value in bias.items()}
    return Request(seed=found.get("seed"), logit_bias=values, num_logprobs=found.get("logprobs"))


def check_lines(
    config: Config, tokenizer: Tokenizer, lines: Sequence[Line], max_new_tokens: int, file: str | None
) -> None:
    """Refuse the first prompt that cannot be continued; of several, the message has its number."""
    for number, line in enumerate(lines, start=1):
        try:
            prompt_ids(config, tokenizer, line.prompt, max_new_tokens)
            check_bias(line.request, tokenizer.vocab_size)
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(f"prompt {number} of --prompts={shown(file)}: {error}") from error


def answer(
    lines: Sequence[Line],
    batch_size: int,
    tokenizer: Tokenizer,
    run: Callable[[Sequence[Line], int], list[Completion]],
    write: Callable[[str], None],
) -> None:
    """Complete lines batch by batch, and write each batch when it is done."""
    with Bar(len(lines), "decode", "prompts") as bar:
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            for line, found in zip(batch, run(batch, start), strict=True):
                result = {"completion": found.text, "finish_reason": found.reason, "num_tokens": found.num_tokens}
                if found.logprobs is not None:
                    result["token_logprobs"] = [_spelled(tokenizer, token) for token in found.logprobs]
                write(json.dumps(line.object | result) + "\n")
            bar.update(len(batch))


@contextlib.contextmanager
def lines_to(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield what writes a line to standard output, or to a file that is there when all are written."""
    if path is None:
        yield lambda line: print(line, end="", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as descriptor:
        yield lambda line: write_all(descriptor, memoryview(line.encode()))
        os.fsync(descriptor)


def _spelled(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, Any]:
    """Return a token's log-probabilities with ids and texts; a token that is part of a character has U+FFFD."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    return one(found.token, found.logprob) | {"top": [one(token, logprob) for token, logprob in found.top]}
