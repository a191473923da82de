"""How the grouped kernels on Hopper walk over their visits (see `visits.py`): neighbours share the L2 cache."""

from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped.visits import make_visits

# first index of A and out, first row of the tile, group, rows to store from and to
Visit = tuple[Array, Array, Array, Array, Array]


class Order(Protocol):
    """What a tuning config says about the order of tiles."""

    tile_n: int
    grid_minor: int
    grid_width: int


def visit_tiles(
    config: Order, num_visits: Any, tiles_n: int, num_groups: int, find: Callable[[Array], Visit], body: Callable
) -> None:
    """Run `body(visit, column, used)` for this block's visits that store something.

    `used` is the number of visits before it that multiplied.
    """

    @plgpu.nd_loop((num_visits * tiles_n,), collective_axes="sm", init_carry=jnp.int32(0))
    def _(info, carry):
        visit, ni = plgpu.planar_snake(info.index[0], (num_visits, tiles_n), config.grid_minor, config.grid_width)
        visit = find(visit)
        *_, group, start, end = visit

        @pl.when(start < end)
        def _():
            body(visit, ni * config.tile_n, carry)

        return carry + ((start < end) & (group < num_groups)).astype(jnp.int32)


def schedule_groups(group_sizes: Array, rows: int, tile_m: int) -> tuple[Any, Callable]:
    """Return the visits of groups of rows as tables for the kernel, and how a kernel reads them.

    The latter takes refs of the tables, and returns what `visit_tiles` takes.
    """
    visits = make_visits(group_sizes, rows, tile_m)

    def schedule(group_ref, tile_ref, offsets_ref):
        def find(visit):
            group = group_ref[visit]
            return jnp.int32(0), tile_ref[visit] * tile_m, group, offsets_ref[group], offsets_ref[group + 1]

        return visits.group.size, find

    return visits, schedule
