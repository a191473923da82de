"""One tick of a pipeline: what a device makes and keeps, and which kinds of cells there are."""

from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.parallel.stages import Stage
from deepseek_jax.pipeline.program import KIND_CODES, Program
from deepseek_jax.training.kept import Flat

Inboxes = dict[str, jax.Array]  # "activation", "gradient": [slots + 1, B, S, D]; the last takes what is for nobody


class Sums(NamedTuple):
    """What the ticks of a device add up."""

    grads: Any
    terms: Any
    router: Any


class Made(NamedTuple):
    """What a device makes in a tick for its neighbours: [B, S, D] each, zeros if the cell makes none."""

    activation: jax.Array
    gradient: jax.Array


class Own(NamedTuple):
    """What the cells of a device change.

    Attributes:
        sums: what they add up.
        kept: slots of what F leaves for its B and W.
        pending: slots of what B leaves for its W.
    """

    sums: Sums
    kept: Flat
    pending: Flat


class Carry(NamedTuple):
    """What a device has between two ticks."""

    own: Own
    inboxes: Inboxes


class Work(NamedTuple):
    """What a program knows of a piece of work before it runs: the shape of the stage, and which chunk it is."""

    stage: Stage
    chunk: int


def branches_of(program: Program, stages: list[Stage]) -> tuple[list[tuple], np.ndarray]:
    """Return the kinds of cells that occur, as `Work`s of (F, B, W), and which of them each device's ticks are."""
    names = {code: kind for kind, code in KIND_CODES.items()}
    keys: dict[tuple, int] = {(None, None, None): 0}
    branch = np.zeros(program.kind.shape, np.int32)

    def work(part: str, place: tuple[int, ...]) -> Work:
        stage, chunk = (getattr(program, f"{part}_{what}")[place] for what in ("stage", "chunk"))
        return Work(stages[stage].shape, int(chunk))

    for place in np.ndindex(program.kind.shape):
        kind = names[int(program.kind[place])]
        parts = ("F", "forward"), ("B", "backward"), ("W", "weight")
        key = tuple(work(part, place) if letter in kind else None for letter, part in parts)
        branch[place] = keys.setdefault(key, len(keys))
    return list(keys), branch
