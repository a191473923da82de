"""Which thread block reads which pages: sequences of any lengths, cut into equal parts.

A sequence costs its pages and a constant, for queries that are loaded and results that are stored. Lay the costs of all
sequences end to end and cut the line into as many equal parts as there are blocks. A part may hold the end of a
sequence, whole ones, and the beginning of another; each of these is a fragment. With pages of three sequences, one page
of overhead `-` and three parts:

    line            - 0 0 0 0 0 0 - 1 - 2 2 2 2 2          15 places
    parts           0 0 0 0 0 1 1 1 1 1 2 2 2 2 2
    fragments       (part 0, sequence 0), (1, 0), (1, 1), (2, 2); (1, 2) is empty

Fragment (p, b) has the number p + b. From one fragment to the next, the part or the sequence goes up by one, so numbers
never collide, and nothing is counted or sorted: everything follows from one cumulative sum and searches. Numbers
that are skipped belong to empty fragments.

A sequence of one fragment gets its result at once. The fragments of others leave FP32 results, each normalised by
itself, and their log-sum-exp; the combine adds them up. That costs, so the number of parts is not always that of the
blocks: 128 equal sequences on 132 multiprocessors are 128 parts, and none is cut. All numbers from half the blocks on
are tried at once, and that of the least cost is taken: the longest part, where a fragment costs `overhead`, and as much
again if its sequence is cut.

The schedule depends on the lengths alone. A decoding step makes it once for all its layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

PAGE = 64  # tokens, as FlashMLA has them
FIELDS = 8  # sequence, first page, end page, whether split, length; padded to 32 bytes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "fragments", "sequences"], meta_fields=["unit"]
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The work of every part.

    Attributes:
        parts: int32 [parts, 8]: a part's first fragment, how many it has, and the fields of the first.
        fragments: int32 [parts + B, 8]: sequence, first page, end page, whether its sequence has others, the length.
        sequences: int32 [B, 2]: a sequence's first fragment, and how many it has; 0 of an empty sequence.
        unit: pages that are never parted. An end page may lie beyond the last page, up to a multiple of it.
    """

    parts: Array
    fragments: Array
    sequences: Array
    unit: int


def make_schedule(lengths: Array, num_parts: int, *, unit: int, overhead: int) -> Schedule:
    """Cut sequences into equal parts.

    Args:
        lengths: int32 [B], tokens.
        num_parts: of the schedule; fewer are used where there is less work than parts.
        unit: pages that are read together.
        overhead: what a sequence costs beside its pages, in units.
    """
    batch = len(lengths)
    units = -(-lengths // (unit * PAGE))
    ends = jnp.cumsum(units + overhead, dtype=jnp.int32)
    firsts = ends - units  # of each sequence, behind its overhead
    total = ends[-1]
    candidates = jnp.clip(total, 1, jnp.arange(max(1, num_parts // 2), num_parts + 1, dtype=jnp.int32))  # none is empty
    positions = jnp.arange(num_parts + 1, dtype=jnp.int32)
    every = jnp.minimum(positions, candidates[:, None]) * total // candidates[:, None]
    cuts = every[jnp.argmin(longest(every, firsts, units, overhead))]
    first, last = (jnp.minimum(search(ends, x), batch - 1) for x in (cuts[:-1], cuts[1:] - 1))
    part = jnp.arange(num_parts, dtype=jnp.int32)

    number = jnp.arange(num_parts + batch, dtype=jnp.int32)
    part_of = search(part + first, number) - 1
    sequence = jnp.minimum(number - part_of, batch - 1)
    start, end = (jnp.clip(cuts[part_of + i] - firsts[sequence], 0, units[sequence]) for i in range(2))

    first_part = search(cuts, firsts) - 1
    last_part = search(cuts, ends - 1) - 1
    count = jnp.where(units > 0, last_part - first_part + 1, 0)
    sequences = jnp.stack([first_part + jnp.arange(batch, dtype=jnp.int32), count], axis=1)
    fields = [sequence, start * unit, end * unit, (count > 1)[sequence].astype(jnp.int32), lengths[sequence]]
    padding = [jnp.zeros_like(sequence)] * (FIELDS - len(fields))
    fragments = jnp.stack([*fields, *padding], axis=1)
    starts = jnp.stack([part + first, jnp.where(cuts[1:] > cuts[:-1], last - first + 1, 0)], axis=1)
    parts = jnp.concatenate([starts, fragments[starts[:, 0], : FIELDS - 2]], axis=1)
    return Schedule(parts, fragments, sequences, unit)


def longest(cuts: Array, firsts: Array, units: Array, overhead: int) -> Array:
    """Return the cost of the longest part of every row of `cuts`."""
    before = jnp.clip(cuts[..., None] - firsts, 0, units)  # [candidates, cuts, B]: units of a sequence before a cut
    taken = before[:, 1:] - before[:, :-1]
    cost = taken + overhead * (taken > 0) + overhead * ((taken > 0) & (taken < units))
    return cost.sum(axis=2).max(axis=1)


def search(ascending: Array, values: Array) -> Array:
    """Return, for each value, how many of `ascending` are not above it; int32, in one fusion of all comparisons."""
    return (ascending <= values[:, None]).sum(axis=1, dtype=jnp.int32)
