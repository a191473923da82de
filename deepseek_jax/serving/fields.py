"""The fields of a request's body, each of its type and within its range; null is the same as nothing."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, overload

from deepseek_jax.inputs import shown
from deepseek_jax.serving.errors import ApiError


def wrong(name: str, value: Any, remedy: str) -> ApiError:
    """Return the refusal of a field's value."""
    return ApiError(400, f"{name} is {told(value)}; {remedy}", param=name, code="invalid_value")


def told(value: Any) -> str:
    """Return a value as a message shows it: in JSON, short, and without building the text of a large one."""
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    value = value[:400] if isinstance(value, str) else value
    return shown(json.dumps(value, ensure_ascii=False, default=repr))


class Fields:
    """A body whose fields are asked for one by one."""

    def __init__(self, body: Mapping[str, Any]):
        """Wrap a parsed object."""
        self._body = body

    def get(self, name: str) -> Any:
        """Return a field as it is; None without it."""
        return self._body.get(name)

    @overload
    def integer(self, name: str, default: int, low: int, high: int) -> int: ...
    @overload
    def integer(self, name: str, default: None, low: int, high: int) -> int | None: ...
    def integer(self, name, default, low, high):
        """Return a whole number from `low` to `high`.

        Raises:
            ApiError: it is something else, as for all others here.
        """
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, value, f"write a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a finite number from `low` to `high`."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise wrong(name, value, f"write a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise wrong(name, value, "write true or false")
        return value

    def text(self, name: str) -> str | None:
        """Return a text."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "write a text")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """Return an object."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong(name, value, "write an object")
        return value

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """Return a list of up to `most` texts of up to `longest` characters, or one text as a list."""
        value = self._body.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) and text for text in values):
            raise wrong(name, value, "write a text that is not empty, or a list of such texts")
        if len(values) > most:
            raise wrong(name, value, f"give at most {most}")
        if any(len(text) > longest for text in values):
            raise wrong(name, value, f"a text of it may have {longest} characters")
        return values

    def ids(self, name: str, vocab_size: int) -> list[int]:
        """Return a list of ids of tokens."""
        value = self._body.get(name)
        return [] if value is None else checked_ids(name, value, vocab_size)

    def biases(self, name: str, vocab_size: int) -> dict[int, float]:
        """Return numbers by id, written as an object: {"17": -100}."""
        value = self.object(name) or {}
        biases = {}
        for key, number in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 20 and int(key) < vocab_size):
                raise wrong(name, value, f"{told(key)} is not an id from 0 to {vocab_size - 1}")
            if isinstance(number, bool) or not isinstance(number, int | float) or not -100 <= number <= 100:
                raise wrong(name, value, f"the bias of {key} must be a number from -100 to 100")
            biases[int(key)] = float(number)
        return biases

    def refuse(self, allowed: Mapping[str, Collection[Any]]) -> None:
        """Refuse fields that change the answer in a way that is not done here, unless they ask for nothing.

        Args:
            allowed: by field, the values that ask for nothing, beside null.
        """
        for name, values in allowed.items():
            value = self._body.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in values):
                raise ApiError(400, f"{name} is not done here; leave it out", param=name, code="unsupported_value")


def checked_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """Return a list of ids, all of the vocabulary.

    Raises:
        ApiError: it is something else.
    """
    if not isinstance(value, list):
        raise wrong(name, value, "write a list of ids")
    for token in value:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise wrong(name, token, f"an id is a whole number from 0 to {vocab_size - 1}")
    return value


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can write: -9999 for that of a token that is ruled out, as OpenAI's."""
    return logprob if math.isfinite(logprob) else -9999.0
