"""RMSNorm to tiles on Hopper: x is read once, 3 bytes moved per value.

A row's sum of squares must be known before its first value can be quantised, so the whole row waits in shared memory: at V3's width of 7168
a tile of 4 rows is 56 KiB. Three warpgroups with one slot each, of which the copy engine fills one or two while the others compute, have
more bytes under way than two slots of one; results leave in pieces of 512 columns, so that they need no room for a row. Registers instead
of shared memory would hold a row of 7168 in 112 of a thread's, as BF16, but not a wider one, and would have to mask the last rows.

It reaches 0.52 of the copy bandwidth, the least of its family (`pallas_kernels.stream`): with one slot each, a warpgroup's
reads and computes do not overlap.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale
from pallas_kernels.stream import (
    APPROXIMATE,
    TILE,
    TILE_GROUPS,
    TILE_ROWS,
    TuningConfig,
    launch,
    load_tile,
    ones_beyond,
    put,
    quantize_registers,
    quantized_type,
    spread,
)

NORM = TuningConfig(rows=4, warpgroups=3, stages=1)  # for V3's width; narrower rows come in taller tiles of as many values
TILE_VALUES = 4 * 7168
WIDEST_ROW = 18432  # 4 rows in BF16 and the gain in FP32 fill shared memory
MOST_ROWS = 16  # of a tile: 64 values of a piece per thread
WIDTH = TILE_GROUPS * GROUP  # of a piece
OUT_SLOTS = 2  # of pieces


def default_config(k: int) -> TuningConfig:
    """Return tiles of about 56 KiB for rows of k, whose last piece may be partial."""
    k = pl.cdiv(k, WIDTH) * WIDTH
    rows = min(MOST_ROWS, max(TILE_ROWS, TILE_VALUES // k // TILE_ROWS * TILE_ROWS))
    warpgroups = max(1, min(NORM.warpgroups, NORM.warpgroups * TILE_VALUES // (rows * k)))
    return dataclasses.replace(NORM, rows=rows, warpgroups=warpgroups, stages=max(1, TILE_VALUES // (rows * k)))


def rms_norm_quantize(x: Array, gain: Array, eps: float, scale: Scale, config: TuningConfig | None = None) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    m, k = x.shape
    config = config or default_config(k)
    groups, rows = k // GROUP, config.rows
    num_pieces = pl.cdiv(k, WIDTH)
    wide = num_pieces * TILE_GROUPS
    pieces = [pl.ds(piece * TILE_GROUPS, TILE_GROUPS) for piece in range(num_pieces)]

    def body(x, gain, values, scales, x_slots, gain_slot, value_slots, scale_slots, gain_copied):
        warpgroup = lax.axis_index("warpgroup")

        def past_end(start, size):
            """A slice that may end beyond its tensor, which Pallas refuses where it knows the start: a product with zero hides it."""
            return pl.ds(start + 0 * warpgroup, size)

        def fetch(tile, slot, copied):
            plgpu.copy_gmem_to_smem(x.at[pl.ds(tile * rows, rows), past_end(0, wide)], x_slots.at[slot], copied)

        def work(turn):
            x_slot, at_rows = x_slots.at[turn.slot], pl.ds(turn.tile * rows, rows)
            squares = sum(jnp.square(load_tile(x_slot.at[:, at_groups])) for at_groups in pieces)
            total = jnp.sum(jnp.sum(squares, axis=2), axis=1)
            inverse = spread(lax.rsqrt(total / k + eps), squares.shape, TILE, (0,))
            for piece, at_groups in enumerate(pieces):
                gains = plgpu.load(gain_slot.at[at_groups], layout=TILE.reduce(0), optimized=False)
                gains = spread(gains, squares.shape, TILE, (1, 2))
                normed = (load_tile(x_slot.at[:, at_groups]) * inverse * gains).astype(jnp.bfloat16)
                piece_values, piece_scales = quantize_registers(normed, scale, TILE)
                # The first piece also waits for the scales of the tile before, which left last.
                plgpu.wait_smem_to_gmem(OUT_SLOTS - 1 if piece else 0, wait_read_only=True)
                out = value_slots.at[warpgroup, piece % OUT_SLOTS]
                put(out, piece_values)
                put(scale_slots.at[warpgroup, at_groups].transpose((1, 0)), ones_beyond(piece_scales, at_rows.start, m, TILE))
                plgpu.commit_smem()
                if piece == num_pieces - 1:
                    turn.release()
                plgpu.copy_smem_to_gmem(out, values.at[at_rows, past_end(piece * TILE_GROUPS, TILE_GROUPS)])
            plgpu.copy_smem_to_gmem(scale_slots.at[warpgroup, pl.ds(0, wide)], scales.at[past_end(0, wide), at_rows])

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(gain.at[past_end(0, wide)], gain_slot, gain_copied)

        plgpu.barrier_wait(gain_copied)
        return fetch, work

    scratch = [
        plgpu.SMEM((config.warpgroups * config.stages, rows, wide, GROUP), jnp.bfloat16),
        plgpu.SMEM((wide, GROUP), jnp.float32),
        plgpu.SMEM((config.warpgroups, OUT_SLOTS, rows, TILE_GROUPS, GROUP), E4M3),
        plgpu.SMEM(
            (config.warpgroups, pl.cdiv(num_pieces, 2) * 2 * TILE_GROUPS, rows), jnp.float32
        ),  # whole 128 bytes, for the copy engine
        plgpu.Barrier(),
    ]
    out_type = (jax.ShapeDtypeStruct((m, groups, GROUP), E4M3), quantized_type((m, k))[1])
    kernel = launch(body, config, pl.cdiv(m, rows), out_type, scratch, params=APPROXIMATE)
    values, scales = kernel(x.reshape(m, groups, GROUP), gain.reshape(groups, GROUP))
    return Quantized(values.reshape(m, k), scales, "tile")
