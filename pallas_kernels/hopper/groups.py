"""The results [m, n] of groups that weight gradients write: whose tile is next, and how it gets there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.ring import WARPGROUPS, launch
from pallas_kernels.hopper.store import padded_columns


def over_group_tiles(config: Any, num_groups: int, tiles: tuple[int, int], steps_of: Callable, body: Callable) -> None:
    """Run `body` for this block's tiles of every group that has steps.

    `body` takes row, column, group, first step, number of steps, and the slot of the first.

    Args:
        config: the size of a tile, the order of tiles, and the number of slots.
        num_groups: how many results [m, n] there are.
        tiles: of one result, along m and n.
        steps_of: group -> its first step and their number.
        body: of the copying or of the multiplying warpgroups.
    """

    @plgpu.nd_loop((num_groups * tiles[0] * tiles[1],), collective_axes="sm", init_carry=jnp.int32(0))
    def _(info, carry):
        group = lax.div(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        within = lax.rem(info.index[0], jnp.int32(tiles[0] * tiles[1]))
        mi, ni = plgpu.planar_snake(within, tiles, config.grid_minor, config.grid_width)
        first, num_steps = steps_of(group)

        @pl.when(num_steps > 0)
        def _():
            body(
                mi * config.tile_m,
                ni * config.tile_n,
                group,
                first,
                num_steps,
                lax.rem(carry, jnp.int32(config.stages)),
            )

        return carry + num_steps


def send_out(config: Any, c: Array | None, ref: Any, target: Any) -> None:
    """Add a finished piece to `target` in C; without a C, or where `config.interpreted`, store it there."""
    stores = c is None or config.interpreted
    plgpu.copy_smem_to_gmem(ref, target, commit_group=False, reduction_op=None if stores else "add")


def launch_onto(
    c: Array | None, shape: tuple[int, int, int], kernel: Callable, num_tiles: int, scratch: list, operands: tuple
) -> Array:
    """Return FP32 `shape` [G, m, n]: `c` after `kernel(*operands, c, *scratch)`.

    Without a `c`, it is what the kernel writes into a new array.

    The kernel's array has columns up to `padded_columns(n)`.
    """
    *lead, n = shape
    padded = padded_columns(n, jnp.float32)
    num_blocks = min(num_multiprocessors(), num_tiles)
    if c is None:
        return launch(kernel, jax.ShapeDtypeStruct((*lead, padded), jnp.float32), num_blocks, scratch)(*operands)[
            ..., :n
        ]
    total = jax.new_ref(jnp.pad(c, ((0, 0), (0, 0), (0, padded - n))))
    launch(kernel, (), num_blocks, scratch)(*operands, total)
    return jax.freeze(total)[..., :n]


def clear_empty_groups(size_of: Callable[[Array], Array], wg: Array, piece: Any, out: Any) -> None:
    """Store zeros in the results [m, n] of groups of size 0, one `piece` at a time.

    All blocks and their warpgroups share the work.

    Call it after the tiles that are multiplied: as a branch beside them, the assembler spills.
    """
    num_groups, m, n = out.shape
    rows, columns = piece.shape
    across = pl.cdiv(n, columns)
    first, stride = WARPGROUPS * lax.axis_index("sm") + wg, WARPGROUPS * lax.axis_size("sm")
    count = lax.div(pl.cdiv(m, rows) * across - first + stride - 1, jnp.int32(stride))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    piece[...] = plgpu.layout_cast(jnp.zeros(piece.shape, jnp.float32), plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    def clear(group, _):
        @pl.when(size_of(group) == 0)
        def _():
            def one(i, _):
                down, right = (
                    lax.div(first + i * stride, jnp.int32(across)),
                    lax.rem(first + i * stride, jnp.int32(across)),
                )
                plgpu.copy_smem_to_gmem(piece, out.at[group, pl.ds(down * rows, rows), pl.ds(right * columns, columns)])

            lax.fori_loop(0, count, one, None)

    lax.fori_loop(0, num_groups, clear, None)
