"""Rewards that fail as the text says, and others, for tests; a process finds them by this module's name."""

import os
import time


def misbehave(problem, text):
    """Return a number, or fail."""
    if text == "raise":
        raise KeyError("of the reward")
    if text == "hang":
        time.sleep(1000)
    if text == "exit":
        raise SystemExit(3)
    if text == "die":
        os._exit(3)
    return {"nan": float("nan"), "infinity": float("inf"), "words": "1.0", "nothing": None}.get(text, 0.5)


def one(problem, text):
    """Return 1."""
    return 1


def varied(problem, text):
    """Return a number that a model without any training gets different ones of."""
    return sum(text.encode()) % 5 / 4


def hang(problem, text):
    """Return after what is an eternity to tests."""
    time.sleep(1000)
    return 0
