"""How tiles stream through a Hopper multiprocessor: a ring of copies in, arithmetic in registers, copies out.

The problem. Quantisers and producers read and write each byte once and do ten to thirty operations per element: they
are bound by memory. An H200 moves about 4.3 TB/s, 33 bytes per nanosecond and multiprocessor, with about a microsecond
between question and answer. So each multiprocessor must have some 32 KB of questions open at all times, whatever its
arithmetic is doing, and answer at six elements per clock.

The choice. A persistent grid, one or several thread blocks per multiprocessor. The copy engine (TMA) fills a ring of
slots in shared memory ahead of the arithmetic, results wait in out slots until the copy engine has taken them away, and
warpgroups that compute hide the waits of those that don't. The copy engine also does the edges: it reads zeros outside
an array, and writes nothing there. What the warpgroups of a block have in common is the kernel's choice (`Share`):

    "nothing"    each has tiles and slots of its own; nobody waits for anybody. Whatever works along rows
    "tiles"      they work on one tile, from slots of their own: each copies its rows, and all meet for the maxima of
                 the columns
    "slots"      they work on one tile in one slot, of which each reads a part along rows, or along rows and columns:
                 the last one to read gives it back

What lost: loads straight into registers (no shared memory, but masks for the edges of an odd m, and a register for each
byte under way); and a warpgroup for the copies alone, as in a product: 128 threads that arithmetic can use here.

A row in registers: eight lanes hold the 128 elements of a group, so that its largest magnitude takes three exchanges
between lanes.

    `row_layout`    16 bytes per load, a line of swizzled shared memory at a time: for tiles that are one group wide
    `TILE`          4 elements of each 32, neighbouring lanes at neighbouring words of plain shared memory whatever the
                    type: for tiles of several groups, where one-byte and four-byte elements meet

Measured on an H100, as a share of its copy bandwidth of 3030 GB/s (experiments/results/kernels.md has each shape; an
H200 copies 4310 GB/s with the same multiprocessors, so that arithmetic shows more there). The target is 0.94. The
reasons are what the design suggests; none is proven by a run without it.

    quantize_blocks             0.98 to 0.99
    swiglu_quantize             0.97 to 0.99
    quantize_tiles              0.91 to 0.94    the lower ones are runs of 35 us, with the grid's start and end
    swiglu_backward_quantize    0.63 to 0.65    (an H200) three tensors through shared memory in FP32, a barrier each
    quantize_rows               0.86 to 0.87    copies of 2 KB, each behind a load of its row's index
    quantize_tiles_both         0.85 to 0.88    each element is read twice, and written two bytes at a time
    e5m6_unpack                 0.87
    rms_norm_quantize           0.81 to 0.89    a barrier in each tile; narrow loads (`producers.hopper_norm`)
    e5m6_pack                   0.82 to 0.83    rounding by integers, and stores of single bytes
    requantize_transposed       0.79 to 0.80    the detour through FP16: shared memory written and read once more
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.ring import SWIZZLE_BYTES
from pallas_kernels.lowering import layout_inference, manual_axes
from pallas_kernels.quantized import E4M3, Scale, largest_magnitude, scale_of, scales_shape

Share = Literal["nothing", "tiles", "slots"]
LOAD_BYTES = 16  # that a lane reads at once
TILE_ROWS, TILE_GROUPS = 4, 4  # of the smallest tile of `TILE`: a row per warp, 8 lanes per group
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((TILE_ROWS, TILE_GROUPS, GROUP), (32,), (4,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1
)

# All put `commit_smem` between a store to shared memory and a load of what other threads of the warpgroup stored, and
# between a load and a store over it, in place of the barriers that Pallas would put around each of their accesses.
# Quantisers divide exactly. Producers may take the hardware's exp, rsqrt and division, and are lowered lane by lane,
# for otherwise Pallas chooses tiled layouts for their slots, which an odd m does not fit.
EXACT = plgpu.CompilerParams(approx_math=False, unsafe_no_auto_barriers=True)
APPROXIMATE = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the tiles of a kernel stream.

    Attributes:
        blocks: thread blocks per multiprocessor; their shared memory must fit in 227 KB together.
        warpgroups: per block.
        stages: slots of a ring.
        out_slots: results that wait in shared memory for their way out, where a kernel has one result per tile.
        rows: of a tile, where a kernel leaves them open.
    """

    blocks: int = 1
    warpgroups: int = 1
    stages: int = 2
    out_slots: int = 2
    rows: int = 64


@dataclasses.dataclass(frozen=True)
class Turn:
    """One tile in the hands of a warpgroup.

    Attributes:
        tile: its number among those of all blocks.
        number: how many tiles this warpgroup had before.
        slot: where it lies, counted through the rings of all warpgroups unless they share one.
        release: () gives the slot back and starts the copies of a later tile into it. Between the last read of the slot
            and this call there must be a `commit_smem`.
        take_out_slot: () waits until the results in the next out slot have left, and returns its number, counted as in
            `slot`. A turn's copies of results must be one group.
    """

    tile: Array
    number: Array
    slot: Array
    release: Callable[[], None]
    take_out_slot: Callable[[], Array]


def launch(
    body: Callable,
    config: TuningConfig,
    num_tiles: int,
    out_type: Any,
    scratch: list,
    *,
    share: Share = "nothing",
    copies_per_slot: int = 1,
    params: plgpu.CompilerParams = EXACT,
    used: Callable[..., Array] | None = None,
) -> Callable:
    """Return the kernel that takes each block through its tiles.

    Args:
        body: (*inputs, *outputs, *scratch) -> (fetch, work). `fetch(tile, slot, copied)` starts the copies of a tile
            into a slot, with the barrier `copied`; `work(turn)` reads the slot, calls `turn.release()` and starts the
            copies of the results.
        config: how tiles stream.
        num_tiles: of all blocks together.
        out_type: of the outputs.
        scratch: shared memory.
        share: what the warpgroups of a block have in common.
        copies_per_slot: that `fetch` starts.
        params: `EXACT` or `APPROXIMATE`.
        used: (*inputs, *outputs, *scratch) -> how many of the tiles are worked on, the first ones; None: all.
    """
    sharing_blocks = num_tiles if share != "nothing" else pl.cdiv(num_tiles, config.warpgroups)
    num_slots = config.stages * (1 if share == "slots" else config.warpgroups)
    barriers = [plgpu.Barrier(num_arrivals=copies_per_slot, num_barriers=num_slots)]
    if share == "slots":
        barriers.append(plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=num_slots))

    def kernel(*refs):
        first_barrier = len(refs) - len(barriers)
        fetch, work = body(*refs[:first_barrier])
        count = num_tiles if used is None else used(*refs[:first_barrier])
        _stream(config, share, count, refs[first_barrier:], fetch, work)

    layout_inference.install()
    return plgpu.kernel(
        kernel,
        kernel_name=manual_axes.operation(body),
        out_type=out_type,
        grid=(min(sharing_blocks, config.blocks * num_multiprocessors()),),
        grid_names=("block",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[*scratch, *barriers],
        compiler_params=params,
    )


def _stream(
    config: TuningConfig, share: Share, num_tiles: int | Array, barriers: tuple, fetch: Callable, work: Callable
) -> None:
    """Take this warpgroup through tile `worker`, then every `num_workers`-th."""
    copied, *read = barriers  # a slot is full; with shared slots: a slot has been read by all
    warpgroup = lax.axis_index("warpgroup")
    worker, num_workers = lax.axis_index("block"), lax.axis_size("block")
    if share == "nothing":
        worker, num_workers = worker * config.warpgroups + warpgroup, num_workers * config.warpgroups
    ring = 0 if share == "slots" else warpgroup  # whose slots
    fetches = warpgroup == 0 if share == "slots" else True
    mine = lax.div(num_tiles - worker + num_workers - 1, num_workers)

    def slot_of(number):
        return ring * config.stages + lax.rem(number, config.stages)

    def fetch_turn(number):
        fetch(worker + number * num_workers, slot_of(number), copied.at[slot_of(number)])

    def refill(number):
        """Fetch a later turn into a slot that has been in use."""
        for barrier in read:

            @pl.when(number < mine)
            def _(barrier=barrier):
                plgpu.barrier_arrive(barrier.at[slot_of(number)])

        @pl.when(fetches & (number < mine))
        def _():
            for barrier in read:
                plgpu.barrier_wait(barrier.at[slot_of(number)])
            fetch_turn(number)

    def take_out_slot(number):
        plgpu.wait_smem_to_gmem(config.out_slots - 1, wait_read_only=True)
        return ring * config.out_slots + lax.rem(number, config.out_slots)

    def step(number, _):
        plgpu.barrier_wait(copied.at[slot_of(number)])
        release, take = lambda: refill(number + config.stages), lambda: take_out_slot(number)
        work(Turn(worker + number * num_workers, number, slot_of(number), release, take))

    for number in range(config.stages):
        pl.when(fetches & (number < mine))(lambda number=number: fetch_turn(number))
    lax.fori_loop(0, mine, step, None)
    plgpu.wait_smem_to_gmem(0)


def tiles_of_rows(num_rows: Any, rows: int, columns: int) -> Array:
    """Return the number of tiles, in rows of `columns`, that hold the first `num_rows[0]` rows, `rows` each."""
    return lax.div(num_rows[0] + (rows - 1), jnp.int32(rows)) * columns


def position(tile: Array, columns: int) -> tuple[Array, Array]:
    """Return row and column of a tile, where tiles lie in rows of `columns`."""
    return lax.div(tile, columns), lax.rem(tile, columns)


def lines(shape: tuple[int, ...], dtype: Any, line_bytes: int = SWIZZLE_BYTES) -> plgpu.SMEM:
    """Shared memory in swizzled lines of `line_bytes`, for arrays of any number of rows."""
    columns = line_bytes // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((columns,)), plgpu.SwizzleTransform(line_bytes)))


def row_layout(dtype: Any, lanes_per_row: int = 8) -> plgpu.Layout:
    """Registers of rows of `dtype`: a warp's 32 lanes hold 32 / `lanes_per_row` rows, each lane 16 bytes at a time."""
    vector = LOAD_BYTES // jnp.dtype(dtype).itemsize
    columns, rows = lanes_per_row * vector, 32 // lanes_per_row
    tiling = plgpu.Tiling(((4 * rows, columns), (rows, columns), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def load_tile(ref: Any) -> Array:
    """Return FP32 [rows, groups, 128] from shared memory, laid out as `TILE`."""
    return plgpu.load(ref, layout=TILE, optimized=False).astype(jnp.float32)


def spread(x: Array, shape: tuple[int, ...], layout: plgpu.Layout, dims: tuple[int, ...]) -> Array:
    """Repeat `x`, whose dims are `dims` of `shape`, along the others."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, dims), layout)


def quantize_registers(x: Array, scale: Scale, layout: plgpu.Layout) -> tuple[Array, Array]:
    """Return the values E4M3 [..., 128] and scales FP32 [...] of groups held in registers.

    `quantized.encode` without its clip: an element is at most its group's largest magnitude, so that the product is at
    most 448 and a rounding error, which the cast takes to 448.
    """
    last = x.ndim - 1
    if x.dtype == jnp.bfloat16:
        amax = jnp.max(jnp.abs(x), axis=last).astype(jnp.float32)  # two at a time
    else:
        amax = largest_magnitude(x, axis=last)
    scales = scale_of(amax, scale)
    return (x.astype(jnp.float32) * spread(1.0 / scales, x.shape, layout, tuple(range(last)))).astype(E4M3), scales


def put(slot: Any, value: Array) -> None:
    """Write `value` to shared memory.

    From jax 0.12 on, a plain assignment also reads what was there, and refuses patterns whose banks meet;
    `plgpu.store`, which 0.11 does not have, does neither.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(slot, value, optimized=False)
    else:
        slot[...] = value


def ones_beyond(scales: Array, first_row: Array, m: int, layout: plgpu.Layout) -> Array:
    """Return `scales` [rows, ...] of groups in `layout` from row `first_row`, with ones from row m on.

    The scales of tiles are padded with ones.
    """
    rows = first_row + plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=layout.reduce(scales.ndim))
    return jnp.where(rows < m, scales, 1.0)


def quantized_type(shape: tuple[int, ...], grouping: str = "tile") -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the types of the values and scales of a quantised tensor."""
    return jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scales_shape(shape, grouping), jnp.float32)


def whole_tiles(scales: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    """Return the type of scales [groups, m] with m up to a multiple of `rows`, those of a tile.

    The scales of one group and tile are one piece of memory, which is clipped at the end of the array only (jax
    0.11.2). In a row that is not whole tiles long it would overwrite the scales of the next group.
    """
    return jax.ShapeDtypeStruct((scales.shape[0], pl.cdiv(scales.shape[1], rows) * rows), scales.dtype)
