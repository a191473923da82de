"""What the requests of a load ask: prompts of random ids or from a file, and lengths from a distribution."""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.inputs import local_path, read_text, shown

LONGEST = 2**20  # tokens, of a drawn length


class Lengths(NamedTuple):
    """A distribution of lengths: "512", "uniform:64,1024", or "lognormal:200,0.8" (median, sigma of the logarithm)."""

    kind: str
    first: float
    second: float

    def draw(self, rng: np.random.Generator) -> int:
        """Return a length between 1 and `LONGEST`."""
        if self.kind == "uniform":
            return int(rng.integers(int(self.first), int(self.second) + 1))
        if self.kind == "lognormal":
            return int(np.clip(round(self.first * math.exp(self.second * rng.standard_normal())), 1, LONGEST))
        return int(self.first)


def parse_lengths(text: str, name: str) -> Lengths:
    """Return the distribution that a flag names.

    Raises:
        ValueError: there is no such distribution, or its numbers are out of their range.
    """
    kind, colon, numbers = text.partition(":")
    try:
        values = [float(number) for number in (numbers if colon else text).split(",")]
    except ValueError:
        values = []
    if not colon and len(values) == 1 and values[0].is_integer() and 1 <= values[0] <= LONGEST:
        return Lengths("fixed", values[0], 0.0)
    is_whole = all(value.is_integer() for value in values)
    if kind == "uniform" and len(values) == 2 and is_whole and 1 <= values[0] <= values[1] <= LONGEST:
        return Lengths(kind, *values)
    if kind == "lognormal" and len(values) == 2 and 1 <= values[0] <= LONGEST and 0 <= values[1] <= 10:
        return Lengths(kind, *values)
    raise ValueError(
        f"{name}={shown(text)} is no distribution of lengths; write 512, uniform:64,1024 or lognormal:200,0.8"
        f" (median, sigma), in tokens from 1 to {LONGEST}"
    )


def read_prompts(file: str) -> list[Any]:
    """Return the prompts of a file of JSON lines: texts, and lists of messages.

    Raises:
        ValueError: a line holds neither, or there is none.
    """
    found = []
    for number, text in enumerate(read_text(local_path(file, "--prompts")).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            prompt, messages = line.get("prompt"), line.get("messages")
        except (ValueError, RecursionError, AttributeError):
            prompt, messages = None, None
        is_chat = isinstance(messages, list) and messages and all(isinstance(part, dict) for part in messages)
        if not (is_chat or (isinstance(prompt, str) and prompt)):
            raise ValueError(
                f'--prompts={shown(file)}, line {number} has no prompt; write {{"prompt": "..."}} or'
                ' {"messages": [{"role": "user", "content": "..."}]}'
            )
        found.append(messages if is_chat else prompt)
    if not found:
        raise ValueError(f"--prompts={shown(file)} holds no prompt; write one object a line")
    return found
