"""Plain values as JSON, and their comparison: all that crosses the pipe of a sandbox.

None, bool, int, finite floats, str and lists are themselves; all else carries its name: {"tuple": [1, 2]},
{"set": [1]}, {"dict": [["a", 1]]}, {"bytes": "00ff"}, {"float": "nan"}. Types count exactly: an object of a class of
its own, whose `__eq__` or `__hash__` could lie, has no such form. So what arrives is data, never behaviour.
"""

import math
from typing import Any

MOST_NESTED = 50  # containers in containers
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, depth: int = 0) -> Any:
    """Return a plain value in the form that `json` writes.

    Raises:
        ValueError: the value, or one in it, is no plain value, or is nested deeper than `MOST_NESTED`.
    """
    kind = type(value)
    if depth > MOST_NESTED:
        raise ValueError(f"a value is nested deeper than {MOST_NESTED}")
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    raise ValueError("a value of another type than None, bool, int, float, str, bytes, list, tuple, set, dict")


def decode(value: Any) -> Any:
    """Return the plain value that `encode` had; for forms from elsewhere only inside a sandbox.

    Elements of a set can be chosen so that their hashes collide, which takes minutes for a megabyte: `same` has no
    such case.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return CONTAINERS[kind](decode(item) for item in content)


def same(expected: Any, answer: Any, tolerance: float = 0.0) -> bool:
    """Tell whether an encoded `answer` is the value `expected`.

    Types count, but an int equals a float of its value; a bool equals no number; NaN equals nothing. Floats may differ
    by `tolerance` times the larger of 1 and the expected number. The depth and the cost follow `expected`, whatever the
    answer is.
    """
    kind = type(expected)
    if expected is None or kind in (bool, str):
        return type(answer) is kind and answer == expected
    if kind in (int, float):
        if type(answer) not in (int, float):
            return type(answer) is dict and answer == {"float": repr(expected)} and not math.isnan(expected)
        return answer == expected or (
            kind is float
            and abs(answer) < 1e300  # so that an int becomes a float
            and math.isfinite(expected)
            and abs(answer - expected) <= tolerance * max(1.0, abs(expected))
        )
    if kind is list:
        return isinstance(answer, list) and _same_items(expected, answer, tolerance)
    content = answer[kind.__name__] if isinstance(answer, dict) and list(answer) == [kind.__name__] else None
    if kind is bytes:
        return content == expected.hex()
    if not isinstance(content, list) or len(content) != len(expected):
        return False
    if kind is tuple:
        return _same_items(expected, content, tolerance)
    if kind is dict:
        return _same_dict(expected, content, tolerance)
    # Encoded forms as text: equal elements have equal forms, as the types of a set's elements count here.
    return sorted(map(repr, encode(expected)[kind.__name__])) == sorted(map(repr, content))


def _same_items(expected: Any, answer: list, tolerance: float) -> bool:
    return len(expected) == len(answer) and all(
        same(item, other, tolerance) for item, other in zip(expected, answer, strict=True)
    )


def _same_dict(expected: dict, pairs: list, tolerance: float) -> bool:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    answers = {repr(key): value for key, value in pairs}
    keys = {repr(encode(key)): key for key in expected}
    return answers.keys() == keys.keys() and all(same(expected[keys[key]], answers[key], tolerance) for key in keys)
