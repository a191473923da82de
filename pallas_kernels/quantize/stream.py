"""How tiles stream through a Hopper multiprocessor: a ring of copies in, arithmetic in registers, copies out.

The problem. Quantisation does ten operations per element, so it is bound by memory: an H200 moves about 4.3 TB/s, 33 bytes per
nanosecond and multiprocessor, with about a microsecond between question and answer. So each multiprocessor must have some 32 KB of
questions open at all times, whatever its arithmetic is doing, and answer at six elements per clock.

The choice. A persistent grid, several thread blocks per multiprocessor. A block of one or more warpgroups takes every
`num_blocks`-th tile: the copy engine (TMA) fills a ring of `stages` slots ahead, each warpgroup reads its part of a slot into registers,
writes its results to shared memory, and the copy engine takes them away while the next tile is computed. Blocks beside each other hide
each other's waits. The copy engine also does the edges: it reads zeros outside an array, and does not write there.

The alternatives. Loads straight into registers need no shared memory, but leave the edges of an odd m to masks, and hold a register for
each byte in flight. A warpgroup for the copies alone, as in a product, costs 128 threads that arithmetic can use here.

A row in registers (`row_layout`): eight lanes hold the 128 elements, 16 bytes per load, one line of swizzled shared memory per load, so
that the largest magnitude takes three exchanges between lanes and banks never collide.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.quantize.reference import largest_magnitude
from pallas_kernels.quantized import E4M3, GROUP, Scale, scale_of

ROWS = 64  # that a warpgroup holds in registers at a time
SWIZZLE_BYTES = 128  # of one line of swizzled shared memory
TILE_ROWS = 8  # over which the swizzle repeats
LOAD_BYTES = 16  # that a lane reads at once


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the tiles of a kernel stream.

    Attributes:
        blocks: thread blocks per multiprocessor; their shared memory must fit in 227 KB together.
        warpgroups: per block; each does its part of every tile.
        stages: slots of the ring, at least 2.
        out_slots: results that wait in shared memory for their way out.
    """

    blocks: int
    warpgroups: int = 1
    stages: int = 2
    out_slots: int = 2


def lines(shape: tuple[int, ...], dtype: Any, line_bytes: int = SWIZZLE_BYTES) -> plgpu.SMEM:
    """Shared memory in swizzled lines of `line_bytes`, for arrays of any number of rows."""
    columns = line_bytes // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((columns,)), plgpu.SwizzleTransform(line_bytes)))


def tiled(shape: tuple[int, ...], dtype: Any) -> plgpu.SMEM:
    """Shared memory in tiles of 8 swizzled lines, which can be read transposed; an array copied here must have a multiple of 8 rows."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((TILE_ROWS, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)))


def row_layout(dtype: Any, lanes_per_row: int = 8) -> plgpu.Layout:
    """Registers of rows of `dtype`: a warp's 32 lanes hold 32 / `lanes_per_row` rows, each lane 16 bytes at a time."""
    vector = LOAD_BYTES // jnp.dtype(dtype).itemsize
    columns, rows = lanes_per_row * vector, 32 // lanes_per_row
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def quantize_registers(x: Array, scale: Scale) -> tuple[Array, Array]:
    """Return the values E4M3 [r, 128] and scales FP32 [r] of rows held in registers.

    `quantized.encode` without its clip: an element is at most its group's largest magnitude, so that the product is at most 448 and a
    rounding error, which the cast takes to 448.
    """
    if x.dtype == jnp.bfloat16:
        amax = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)  # two at a time
    else:
        amax = largest_magnitude(x, axis=1)
    scales = scale_of(amax, scale)
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(1.0 / scales, x.shape, [0])).astype(E4M3), scales


def ones_beyond(scales: Array, first_row: Array, m: int, layout: plgpu.Layout) -> Array:
    """Return `scales` of the rows from `first_row`, 1 for rows from m: the scales of tiles are padded with ones."""
    rows = first_row + plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=layout.reduce(1))
    return jnp.where(rows < m, scales, 1.0)


def stream(config: TuningConfig, num_tiles: int, barriers: tuple, fetch: Callable, work: Callable) -> None:
    """Take this block through its tiles.

    Args:
        config: how.
        num_tiles: of all blocks together.
        barriers: `full`, which the copies of a tile complete, and `empty`, at which the warpgroups arrive.
        fetch: (tile, slot) starts the copies of a tile into a slot, with `full.at[slot]`.
        work: (tile, slot, out) reads the slot and starts one group of copies out of the out slot, after `commit_smem`.
    """
    full, empty = barriers
    block, num_blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(num_tiles - 1 - block, num_blocks) + 1

    def fetch_if(condition, i, slot):
        @pl.when((lax.axis_index("warpgroup") == 0) & condition)
        def _():
            fetch(block + i * num_blocks, slot)

    for i in range(config.stages):
        fetch_if(i < mine, i, i)

    def step(i, _):
        slot, out = lax.rem(i, config.stages), lax.rem(i, config.out_slots)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wait_smem_to_gmem(config.out_slots - 1, wait_read_only=True)
        work(block + i * num_blocks, slot, out)
        refill = i + config.stages < mine

        @pl.when(refill)
        def _():
            plgpu.barrier_arrive(empty.at[slot])

        @pl.when((lax.axis_index("warpgroup") == 0) & refill)
        def _():
            plgpu.barrier_wait(empty.at[slot])
            fetch(block + (i + config.stages) * num_blocks, slot)

    lax.fori_loop(0, mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def launch(
    body: Callable,
    config: TuningConfig,
    num_tiles: int,
    out_type: Any,
    scratch: list,
    *,
    copies_per_tile: int,
) -> Callable:
    """Return the kernel of `body(*inputs, *outputs, *scratch, full, empty)`.

    Args:
        body: calls `stream`. No barriers are put around its accesses to shared memory: `commit_smem` must stand between a store and a load.
        config: how tiles stream.
        num_tiles: of all blocks together.
        out_type: of the outputs.
        scratch: shared memory.
        copies_per_tile: that `fetch` starts.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(min(num_tiles, config.blocks * num_multiprocessors()),),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=copies_per_tile, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True),
    )


def groups_of(k: int) -> int:
    """Return the tiles along k."""
    return pl.cdiv(k, GROUP)
