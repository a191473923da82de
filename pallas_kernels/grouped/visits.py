"""Which tiles of rows meet which groups: the schedule of the grouped kernels, computed on the device.

Groups end anywhere, tiles every `tile` rows. A visit is one group's rows within one tile; a kernel computes the whole
tile and keeps these rows. The rows of no group are made one more group, number G, so that every row is kept by exactly
one visit. Sizes 3, 0, 2 of 8 rows, tiles of 4:

    tile 0: rows 0 1 2 3      tile 1: rows 4 5 6 7
            0 0 0 2                   2 3 3 3

    visit    0   1   2   3   4
    group    0   2   2   3   4       a group without rows gets no visit; 4 = G + 1 fills up, with no rows
    tile     0   0   1   1   1       never falls, so the visits of one tile are neighbours and its output stays in VMEM

Each group that has rows adds at most one visit to the tiles' number: tiles + G visits are enough for any sizes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Visits(NamedTuple):
    """Visit v is the rows offsets[group[v]] to offsets[group[v] + 1] of tile[v]. All int32."""

    group: Array  # [V]
    tile: Array  # [V]
    offsets: Array  # [G + 3]


def make_visits(group_sizes: Array, num_rows: int, tile: int) -> Visits:
    """Return the visits of groups of `group_sizes` int32 [G] to tiles of `tile` rows."""
    num_groups, num_tiles = group_sizes.shape[0], -(-num_rows // tile)
    tail = jnp.maximum(num_rows - jnp.sum(group_sizes), 0)
    sizes = jnp.concatenate([group_sizes, tail[None]])
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first_tiles = starts // tile
    counts = jnp.where(sizes > 0, -(-ends // tile) - first_tiles, 0)
    last_visits = jnp.cumsum(counts)

    visit = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    # one fusion, not a loop of launches
    group = jnp.searchsorted(last_visits, visit, side="right", method="compare_all")
    within = visit - (last_visits - counts)[group]
    tiles = jnp.where(group <= num_groups, first_tiles[group] + within, num_tiles - 1)
    offsets = jnp.concatenate([starts, ends[-1:], ends[-1:]])
    return Visits(
        group.astype(jnp.int32), jnp.minimum(tiles, num_tiles - 1).astype(jnp.int32), offsets.astype(jnp.int32)
    )
