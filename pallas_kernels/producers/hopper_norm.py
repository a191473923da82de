"""RMSNorm to tiles on Hopper: x is read once, 3 bytes moved per value.

A row's sum of squares must be known before its first value can be quantised, so the whole row waits in shared memory: at V3's width of 7168
a tile of 4 rows is 56 KiB. Three warpgroups with one slot each, of which the copy engine fills one or two while the others compute, have
more bytes under way than two slots of one; results leave in pieces of 512 columns, so that they need no room for a row. Registers instead
of shared memory would hold a row of 7168 in 112 of a thread's, as BF16, but not a wider one, and would have to mask the last rows.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.producers.stream import (
    GROUPS,
    ROWS,
    TILE,
    TuningConfig,
    each_warpgroup,
    launch,
    load_tile,
    over_rows,
    past_end,
    quantize_tile,
    ring_slot,
    shape_of,
    stream,
)
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, scales_shape

NORM = TuningConfig(rows=4, warpgroups=3, stages=1)  # for V3's width; narrower rows come in taller tiles of as many values
TILE_VALUES = 4 * 7168
WIDEST_ROW = 18432  # 4 rows in BF16 and the gain in FP32 fill shared memory
MOST_ROWS = 16  # of a tile: 64 values of a piece per thread
OUT_SLOTS = 2


def default_config(k: int) -> TuningConfig:
    """Return tiles of about 56 KiB for rows of k, whose last piece may be partial."""
    k = -(-k // (GROUPS * GROUP)) * GROUPS * GROUP
    rows = min(MOST_ROWS, max(ROWS, TILE_VALUES // k // ROWS * ROWS))
    warpgroups = max(1, min(NORM.warpgroups, NORM.warpgroups * TILE_VALUES // (rows * k)))
    return dataclasses.replace(NORM, rows=rows, warpgroups=warpgroups, stages=max(1, TILE_VALUES // (rows * k)))


def rms_norm_quantize(
    x: Array, gain: Array, eps: float, scale: Scale, config: TuningConfig | None = None, interpret: object = None
) -> Quantized:
    """Return rms_norm(x) * gain in tiles [m, k]."""
    m, k = x.shape
    config = config or default_config(k)
    groups, rows, ring = k // GROUP, config.rows, config.warpgroups * config.stages
    pieces = -(-groups // GROUPS)
    num_tiles = -(-m // rows)

    def body(x_ref, gain_ref, values_ref, scales_ref, x_s, gain_s, values_s, scales_s, full, gain_full):
        wg = lax.axis_index("wg")

        def load(tile, turn):
            index = ring_slot(config, turn)
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(tile * rows, rows), past_end(0, pieces * GROUPS)], x_s.at[index], full.at[index])

        def compute(tile, turn, release):
            x_slot, at_rows = x_s.at[ring_slot(config, turn)], pl.ds(tile * rows, rows)
            piece_of = [pl.ds(piece * GROUPS, GROUPS) for piece in range(pieces)]
            squares = sum(jnp.square(load_tile(x_slot.at[:, at_groups])) for at_groups in piece_of)
            total = jnp.sum(jnp.sum(squares, axis=2), axis=1)
            inverse = over_rows(lax.rsqrt(total / k + eps), squares.shape)
            for piece, at_groups in enumerate(piece_of):
                gains = plgpu.load(gain_s.at[at_groups], layout=TILE.reduce(0), optimized=False)
                gains = plgpu.layout_cast(lax.broadcast_in_dim(gains, squares.shape, (1, 2)), TILE)
                normed = (load_tile(x_slot.at[:, at_groups]) * inverse * gains).astype(jnp.bfloat16)
                values, scales = quantize_tile(normed.astype(jnp.float32), scale, at_rows.start, m)
                # The first piece also waits for the scales of the tile before, which left last.
                plgpu.wait_smem_to_gmem(OUT_SLOTS - 1 if piece else 0, wait_read_only=True)
                out = values_s.at[wg, piece % OUT_SLOTS]
                out[...] = values
                scales_s.at[wg, at_groups].transpose((1, 0))[...] = scales
                plgpu.commit_smem()
                if piece == pieces - 1:
                    release()
                plgpu.copy_smem_to_gmem(out, values_ref.at[at_rows, past_end(piece * GROUPS, GROUPS)])
            whole = pl.ds(0, pieces * GROUPS)
            plgpu.copy_smem_to_gmem(scales_s.at[wg, whole], scales_ref.at[past_end(0, pieces * GROUPS), at_rows])

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(gain_ref.at[past_end(0, pieces * GROUPS)], gain_s, gain_full)

        plgpu.barrier_wait(gain_full)
        stream(config, each_warpgroup(config), num_tiles, full, load, compute)

    scratch = [
        plgpu.SMEM((ring, rows, pieces * GROUPS, GROUP), jnp.bfloat16),
        plgpu.SMEM((pieces * GROUPS, GROUP), jnp.float32),
        plgpu.SMEM((config.warpgroups, OUT_SLOTS, rows, GROUPS, GROUP), E4M3),
        plgpu.SMEM((config.warpgroups, -(-pieces // 2) * 2 * GROUPS, rows), jnp.float32),  # the copy engine wants multiples of 128 bytes
        plgpu.Barrier(num_barriers=ring),
        plgpu.Barrier(),
    ]
    outputs = [shape_of((m, groups, GROUP), E4M3), shape_of(scales_shape((m, k), "tile"), jnp.float32)]
    kernel = launch(body, config, -(-num_tiles // config.warpgroups), outputs, scratch, interpret)
    values, scales = kernel(x.reshape(m, groups, GROUP), gain.reshape(groups, GROUP))
    return Quantized(values.reshape(m, k), scales, "tile")
