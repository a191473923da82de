"""One tick of a pipeline: what a device reads, makes and keeps, and which kinds of cells there are."""

from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.parallel.stages import Stage
from deepseek_jax.pipeline.program import KIND_CODES, Program
from deepseek_jax.training.kept import Flat


class Sums(NamedTuple):
    """What the ticks of a device add up."""

    grads: Any
    terms: Any
    router: Any


class Read(NamedTuple):
    """What a device reads at the beginning of a tick, one slot of each buffer.

    Attributes:
        activation, gradient: of the inboxes, [B, S, D].
        kept: what F left for this B or W.
        pending: what B left for this W.
    """

    activation: jax.Array
    gradient: jax.Array
    kept: Flat
    pending: Flat


class Made(NamedTuple):
    """What a device makes in a tick: for its neighbours, and for two slots of its own.

    A slot that no part of the cell writes is the one that was read, and goes back to its place.
    """

    activation: jax.Array
    gradient: jax.Array
    kept: Flat
    pending: Flat


class Carry(NamedTuple):
    """What a device has between two ticks."""

    sums: Sums
    inboxes: dict[str, jax.Array]  # "activation", "gradient": [slots + 1, B, S, D]; the last takes what is for nobody
    kept: Flat
    pending: Flat


def branches_of(program: Program, stages: list[Stage]) -> tuple[list[tuple], np.ndarray]:
    """Return the kinds of cells that occur, as shapes of (F, B, W), and which of them each device's ticks are."""
    names = {code: kind for kind, code in KIND_CODES.items()}
    keys: dict[tuple, int] = {(None, None, None): 0}
    branch = np.zeros(program.kind.shape, np.int32)
    for place in np.ndindex(program.kind.shape):
        kind = names[int(program.kind[place])]
        key = tuple(
            stages[getattr(program, f"{part}_stage")[place]].shape if letter in kind else None
            for letter, part in (("F", "forward"), ("B", "backward"), ("W", "weight"))
        )
        branch[place] = keys.setdefault(key, len(keys))
    return list(keys), branch
