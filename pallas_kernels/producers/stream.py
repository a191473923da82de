"""How a memory-bound kernel of rows keeps Hopper's memory busy: every warpgroup streams tiles of its own.

The problem. These kernels read and write each byte once and compute little; at 4.3 TB/s an SM has some 20 instructions per element for
everything, and must have about 30 KB of reads under way at any time. So copies must be large and early, and many warps must compute.

The choice. A thread block per SM with a few warpgroups that share nothing (but a gain). Each has a ring of slots in shared memory that the
copy engine fills ahead of it, and a ring of slots for results on their way out. While one warpgroup waits, the others compute; there
are no roles, and no barriers between warpgroups. The copy engine also does the edges: it reads zeros beyond the end of a tensor and
writes nothing there, so no kernel here has a mask for values.

What lost: a warpgroup of copiers as in matrix products (a memory-bound loop has the time to issue its own copies), and loads to registers
without shared memory (the whole tile's addresses in registers, and masks).

How a tile lies in registers. A group of 128 belongs to 8 lanes, which hold 4 neighbours each out of every 32: lanes read and write
neighbouring words of shared memory, without bank conflicts in E4M3, BF16 and FP32 alike, and the largest of a group takes 15 comparisons
and 3 exchanges.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.quantized import E4M3, GROUP, Scale, scale_of

ROWS, GROUPS = 4, 4  # of the smallest tile: a row per warp, 8 lanes per group
TILE = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, GROUPS, GROUP), (32,), (4,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How rows are streamed.

    Attributes:
        rows: of a tile, a multiple of 4.
        warpgroups: of a thread block, each with rings of its own.
        stages: slots of a ring.
        blocks_per_sm: thread blocks that share an SM, if their shared memory fits.
    """

    rows: int = 16
    warpgroups: int = 3
    stages: int = 2
    blocks_per_sm: int = 1


def stream(config: TuningConfig, workers: tuple, num_tiles: int, full, load: Callable, compute: Callable) -> None:
    """Run this worker's share of the tiles: tile `worker`, then every `num_workers`-th.

    Args:
        config: the warpgroups and slots.
        workers: `each_warpgroup(config)`, or `each_block()` where the warpgroups of a block work on one tile together.
        num_tiles: of all workers.
        full: barriers [warpgroups * stages].
        load: (tile, turn) starts this warpgroup's copies into the slot of its `turn`-th tile.
        compute: (tile, turn, release) reads the slot, calls `release()` after its last read, and sends the results out.
    """
    worker, num_workers = workers
    share = lax.div(num_tiles - worker + num_workers - 1, num_workers)

    def load_turn(turn):
        @pl.when(turn < share)
        def _():
            load(worker + turn * num_workers, turn)

    for turn in range(config.stages):
        load_turn(jnp.int32(turn))

    def one_turn(turn, _):
        def release():
            plgpu.commit_smem()  # every warp has read
            load_turn(turn + config.stages)

        plgpu.barrier_wait(full.at[ring_slot(config, turn)])
        compute(worker + turn * num_workers, turn, release)

    lax.fori_loop(0, share, one_turn, None)
    plgpu.wait_smem_to_gmem(0)


def each_warpgroup(config: TuningConfig) -> tuple[Array, Array]:
    """Return the index and number of the workers, where every warpgroup has tiles of its own."""
    return lax.axis_index("block") * config.warpgroups + lax.axis_index("wg"), lax.axis_size("block") * config.warpgroups


def each_block() -> tuple[Array, Array]:
    """Return the index and number of the workers, where a block has a tile."""
    return lax.axis_index("block"), lax.axis_size("block")


def ring_slot(config: TuningConfig, turn: Array) -> Array:
    """Return where a turn's slot lies among those of all warpgroups."""
    return lax.axis_index("wg") * config.stages + lax.rem(turn, config.stages)


def launch(body: Callable, config: TuningConfig, num_blocks: int, out_type: list, scratch_types: list, interpret: Any) -> Callable:
    """Return the kernel of `body(*inputs, *outputs, *scratch)`: persistent blocks, `num_blocks` at most."""
    num_blocks = min(num_multiprocessors() * config.blocks_per_sm, num_blocks)
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def past_end(start: int, size: int) -> Any:
    """A slice that may end beyond its tensor, where the copy engine reads zeros and writes nothing.

    Pallas refuses such a slice if it knows the start, so the start is hidden behind a product with zero.
    """
    return pl.ds(start + 0 * lax.axis_index("wg"), size)


def load_tile(ref) -> Array:
    """Return FP32 [rows, groups, 128] from shared memory, as a tile lies in registers."""
    return plgpu.load(ref, layout=TILE, optimized=False).astype(jnp.float32)


def over_groups(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeat [rows, groups] along the 128 elements of each group."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0, 1)), TILE)


def over_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeat [rows] along the groups and elements of each row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0,)), TILE)


def quantize_tile(x: Array, scale: Scale, row: Array, num_rows: int) -> tuple[Array, Array]:
    """Return E4M3 [rows, groups, 128] and scales [rows, groups] of FP32 x, whose first row is `row` of `num_rows`: 1 beyond the last.

    What `encode` clips needs no clipping here: the largest of a group is 448 up to an FP32 rounding, and that rounds to 448.
    """
    scales = scale_of(jnp.max(jnp.abs(x), axis=2), scale)
    values = (x * over_groups(1.0 / scales, x.shape)).astype(E4M3)
    rows = row + plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=TILE.reduce(2))
    return values, jnp.where(rows < num_rows, scales, 1.0)


def shape_of(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """A ShapeDtypeStruct, for `launch`."""
    return jax.ShapeDtypeStruct(shape, dtype)
