"""RMSNorm to tiles on Hopper: x is read once, 3 bytes moved per value.

The problem. A row's sum of squares must be known before its first value can be quantised, and four rows of V3's width
of 7168, the least that `stream.TILE` takes, are 56 KiB. A warpgroup that holds them while it computes does not read,
unless there is room for more of them.

The choice. All warpgroups of a block work on one tile in one slot, each on neighbouring columns of it, a few chunks of
512:

    1. It loads its chunks into registers: 16 of a thread's for a chunk of 4 rows. That was the only read of the slot,
       which goes back to the copy engine at once: a slot is where x lands, and nearly all of the ring is under way at
       all times.
    2. It leaves the sums of squares of its part of the rows in shared memory. Behind a barrier each adds up all parts,
       in the same order.
    3. It norms, rounds and quantises its chunks. They leave together: one fence and one group of copies for a warpgroup
       and a tile.

Worked example, k = 7168: 14 chunks, 2 for each of 7 warpgroups, 32 registers of 72; a ring of two slots, 112 KiB,
beside gain and results of 28 KiB each. With 4 warpgroups a row counts as 16 chunks: the copy engine fills what is
beyond the row with zeros, which are normed like all else and go nowhere, so that nothing asks how many chunks there
are. The default is the number of warpgroups with the fewest of these.

Wider rows give up two things, one after the other. Where registers don't hold the chunks, they are loaded a second
time, and the slot goes back late. Where shared memory has no room for the gain, it is read from global memory, through
the cache.

Measured on an H100, as a share of its copy bandwidth: 4096 x 7168 0.83, 16384 x 7168 0.86, 32768 x 1536 0.89. What
binds was not isolated; TILE's loads and stores of fewer than 16 bytes a lane meet in banks of shared memory (counted,
not measured).

What lost. A tile for each warpgroup, with one slot each: in a warpgroup, reads and computes did not overlap, and 1024
tiles over 396 warpgroups were three rounds of 2.6 (0.675 for 4096 x 7168). Four or five warpgroups (0.79), a third slot
in the gain's place (0.72 and 0.89), two results on their way out (0.82). Chunks held as BF16, half the registers: the
compiler keeps the numbers that the first pass widened (without room for those, k = 16384 spills);
`lax.optimization_barrier`, which would hide them from it, changes the order of BF16 values in jax 0.11.2 where a thread
holds four neighbours (read in its source, not run).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.stream import (
    APPROXIMATE,
    TILE,
    TILE_GROUPS,
    TILE_ROWS,
    TuningConfig,
    launch,
    ones_beyond,
    put,
    quantize_registers,
    quantized_type,
    spread,
)
from pallas_kernels.quantized import E4M3, Quantized, Scale

WIDEST_ROW = 18432  # 4 rows in BF16 and their results fill shared memory
WIDTH = TILE_GROUPS * GROUP  # of a chunk
MOST_ROWS = 16  # of a tile: 64 values of a chunk per thread
TILE_VALUES = 2**14  # of a multiprocessor's blocks together: 32 KiB of BF16
# at least on a multiprocessor, to hide each other's waits; at most in a block: 72 registers for each thread
WARPGROUPS = (4, 7)
MOST_STAGES = 3
NUM_SUMS = 2  # of which one is filled while a slower warpgroup may still read the other
ALIGNED_GROUPS = 8  # scales of 8 groups and 4 rows are 128 bytes: the copy engine starts at multiples of them
REGISTERS = 512  # of a multiprocessor, for 128 threads of a warpgroup
OTHER_REGISTERS = 40  # of a thread, beside one for each value of x that it holds
MULTIPROCESSOR_BYTES = 228 * 1024  # of shared memory
SMALL_BYTES = 8 * 1024  # of a block: scales, sums, barriers, 2 KiB that Pallas asks for and 1 KiB of the system


def default_config(k: int) -> TuningConfig:
    """Return the tuning for rows of k.

    Tiles take 32 KiB per multiprocessor or have 4 rows, with as many slots as fit, and the fewest warpgroups that cut k
    most evenly.
    """
    num_chunks = pl.cdiv(k, WIDTH)
    fewest, most = (min(num_chunks, bound) for bound in WARPGROUPS)
    warpgroups = min(range(fewest, most + 1), key=lambda count: -num_chunks % count)
    blocks = pl.cdiv(WARPGROUPS[0], warpgroups)
    wide = warpgroups * _groups_each(k, warpgroups)
    rows = TILE_VALUES // blocks // (wide * GROUP) // TILE_ROWS * TILE_ROWS
    config = TuningConfig(blocks, warpgroups, stages=1, out_slots=1, rows=min(MOST_ROWS, max(TILE_ROWS, rows)))
    rings = (dataclasses.replace(config, stages=stages) for stages in range(MOST_STAGES, 0, -1))
    return next((ring for ring in rings if _has_room_for_gain(ring, wide)), config)


def _groups_each(k: int, warpgroups: int) -> int:
    """Return how many groups of a row of k a warpgroup works on: whole chunks."""
    return pl.cdiv(pl.cdiv(k, WIDTH), warpgroups) * TILE_GROUPS


def _has_room_for_gain(config: TuningConfig, wide: int) -> bool:
    """Return whether shared memory takes the gain of `wide` groups, FP32, beside tiles of BF16 and E4M3."""
    tile_bytes = (2 * config.stages + config.out_slots) * config.rows * wide * GROUP
    return tile_bytes + 4 * wide * GROUP <= MULTIPROCESSOR_BYTES // config.blocks - SMALL_BYTES


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale, config: TuningConfig | None = None) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    m, k = x.shape
    config = config or default_config(k)
    groups, rows, warpgroups = k // GROUP, config.rows, config.warpgroups
    each = _groups_each(k, warpgroups)
    wide = warpgroups * each
    holds = rows * each + OTHER_REGISTERS <= REGISTERS // (config.blocks * warpgroups)
    sums_layout = TILE.reduce((1, 2))

    def body(x, gain, values, scales, x_slots, value_slots, scale_slots, sums, summed, *gain_home):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * each, each)
        chunks = [pl.ds(warpgroup * each + first, TILE_GROUPS) for first in range(0, each, TILE_GROUPS)]

        def fetch(tile, slot, copied):
            # Pallas refuses slices that it sees end beyond their tensor; a product with zero hides where this one
            # starts.
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile * rows, rows), pl.ds(0 * tile, wide)], x_slots.at[slot], copied)

        def work(turn):
            def load(at_groups):
                return plgpu.load(x_slots.at[turn.slot, :, at_groups], layout=TILE, optimized=False)

            held = [load(at_groups) for at_groups in chunks]
            if holds:
                plgpu.commit_smem()
                turn.release()
            squares = sum(jnp.square(chunk.astype(jnp.float32)) for chunk in held)
            parts = sums.at[lax.rem(turn.number, NUM_SUMS)]
            put(parts.at[warpgroup], jnp.sum(jnp.sum(squares, axis=2), axis=1))
            plgpu.barrier_arrive(summed)
            plgpu.barrier_wait(summed)
            total = sum(plgpu.load(parts.at[other], layout=sums_layout, optimized=False) for other in range(warpgroups))
            inverse = spread(lax.rsqrt(total / k + eps), squares.shape, TILE, (0,))
            out, at_rows = turn.take_out_slot(), pl.ds(turn.tile * rows, rows)
            for chunk, at_groups, first in zip(held, chunks, range(0, each, TILE_GROUPS), strict=True):
                gains = spread(
                    plgpu.load(gain_in.at[at_groups], layout=TILE.reduce(0), optimized=False), chunk.shape, TILE, (1, 2)
                )
                chunk = chunk if holds else load(at_groups)
                normed = (chunk.astype(jnp.float32) * inverse * gains).astype(jnp.bfloat16)
                chunk_values, chunk_scales = quantize_registers(normed, scale, TILE)
                at_out = pl.ds(first, TILE_GROUPS)
                put(value_slots.at[out, warpgroup, :, at_out], chunk_values)
                put(
                    scale_slots.at[out, warpgroup, at_out].transpose((1, 0)),
                    ones_beyond(chunk_scales, at_rows.start, m, TILE),
                )
            plgpu.commit_smem()
            if not holds:
                turn.release()
            plgpu.copy_smem_to_gmem(value_slots.at[out, warpgroup], values.at[at_rows, mine], commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[out, warpgroup, pl.ds(0, each)], scales.at[mine, at_rows])

        gain_in = gain
        if gain_home:
            gain_in, gain_copied = gain_home

            @pl.when(warpgroup == 0)
            def _():
                plgpu.copy_gmem_to_smem(gain, gain_in, gain_copied)

            plgpu.barrier_wait(gain_copied)
        return fetch, work

    scratch = [
        plgpu.SMEM((config.stages, rows, wide, GROUP), jnp.bfloat16),
        plgpu.SMEM((config.out_slots, warpgroups, rows, each, GROUP), E4M3),
        plgpu.SMEM((config.out_slots, warpgroups, pl.cdiv(each, ALIGNED_GROUPS) * ALIGNED_GROUPS, rows), jnp.float32),
        plgpu.SMEM((NUM_SUMS, warpgroups, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=warpgroups),
    ]
    if _has_room_for_gain(config, wide):
        scratch += [plgpu.SMEM((wide, GROUP), jnp.float32), plgpu.Barrier()]
    out_type = (jax.ShapeDtypeStruct((m, groups, GROUP), E4M3), quantized_type((m, k))[1])
    kernel = launch(body, config, pl.cdiv(m, rows), out_type, scratch, share="slots", params=APPROXIMATE)
    gain = jnp.pad(gain.reshape(groups, GROUP), ((0, wide - groups), (0, 0)))
    values, scales = kernel(x.reshape(m, groups, GROUP), gain)
    return Quantized(values.reshape(m, k), scales, "tile")
