"""Schedules over the tokens of a run: learning rate, MTP weight, gamma, batch size.

A schedule is a sequence of pieces (shape, end, value); an end is a fraction of `training.num_tokens`. In a config a
plain number is a schedule that is constant.
"""

import math
from typing import Any

Piece = tuple[str, float, float]  # shape, end as a fraction of training.num_tokens, value at the end
Schedule = tuple[Piece, ...]


def from_number(value: Any) -> Any:
    """Return the constant schedule of a number; anything else as it is.

    A flag of ml_collections makes a tuple of one number of `--config.optimizer.learning_rate=1e-3`.
    """
    number = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return (("constant", 1.0, number),) if is_number else value


def schedule_value(pieces: Schedule, fraction: float) -> float:
    """Evaluate a schedule at `fraction` of the run's tokens, on the host and in double precision.

    A piece reaches from the previous piece's end to its own. "constant" holds its value throughout; "linear" and
    "cosine" lead to it from the previous piece's value. A piece contains its start but not its end; after the last end
    the last value holds.
    """
    start, before = 0.0, pieces[0][2]
    for shape, until, value in pieces:
        if fraction < until:
            done = (fraction - start) / (until - start)
            if shape == "linear":
                return before + (value - before) * done
            if shape == "cosine":
                return value + (before - value) * 0.5 * (1.0 + math.cos(math.pi * done))
            return value
        start, before = until, value
    return before


def check_schedule(path: str, pieces: Schedule) -> None:
    """Refuse a schedule whose ends do not rise to 1, an unknown shape, and an impossible value."""
    ends = [until for _, until, _ in pieces]
    if not all(a < b for a, b in zip([0.0, *ends], ends, strict=False)) or ends[-1:] != [1.0]:
        raise ValueError(
            f"{path}: the ends {ends} are fractions of training.num_tokens; they must rise from above 0 to exactly 1.0"
        )
    for shape, _, value in pieces:
        if shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"{path}: shape {shape!r} is unknown; choose 'constant', 'linear' or 'cosine'")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{path}: value {value} must be finite and not negative")
