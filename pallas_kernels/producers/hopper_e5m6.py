"""E5M6 on Hopper: 3.5 bytes moved per value of BF16.

`pallas_kernels.hopper.stream` tells how tiles stream and what speed each kernel reaches, `e5m6` what the bytes are.

The two halves of a tile are worked on side by side, because a byte of the high plane takes a nibble of either.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.stream import (
    APPROXIMATE,
    TILE_GROUPS,
    TILE_ROWS,
    TuningConfig,
    launch,
    ones_beyond,
    position,
    put,
    spread,
)
from pallas_kernels.producers import e5m6
from pallas_kernels.quantized import scales_shape

E5M6 = TuningConfig(blocks=2, rows=8, warpgroups=4, stages=2, out_slots=2)
HALF_TILE = plgpu.Layout.TILED(  # `stream.TILE` of half groups
    plgpu.Tiling(((TILE_ROWS, TILE_GROUPS, e5m6.HALF), (32,), (4,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1
)
HALVES = [pl.ds(0, e5m6.HALF), pl.ds(e5m6.HALF, e5m6.HALF)]
PLANES = [*HALVES, pl.ds(GROUP, e5m6.HALF)]


def e5m6_pack(x: Array, config: TuningConfig = E5M6) -> tuple[Array, Array]:
    """Return x [m, k] as uint8 [m, k * 3 // 2] and FP32 scales [k / 128, pad4(m)]."""
    m, k = x.shape
    groups, ring, out_ring = k // GROUP, config.warpgroups * config.stages, config.warpgroups * config.out_slots
    num_tiles, at = _cut(m, k, config.rows)

    def body(x, packed, scales, x_slots, packed_slots, scale_slots):
        def fetch(tile, slot, copied):
            plgpu.copy_gmem_to_smem(x.at[at(tile)], x_slots.at[slot], copied)

        def work(turn):
            at_rows, at_groups = at(turn.tile)
            first, second = (_load(x_slots.at[turn.slot, :, :, half]).astype(jnp.float32) for half in HALVES)
            plgpu.commit_smem()
            turn.release()
            tile_scales = e5m6.scale_of(jnp.max(jnp.maximum(jnp.abs(first), jnp.abs(second)), axis=2))
            inverse = spread(1.0 / tile_scales, first.shape, HALF_TILE, (0, 1))
            out = turn.take_out_slot()
            for plane, values in zip(
                PLANES, e5m6.pack(e5m6.encode(first * inverse), e5m6.encode(second * inverse)), strict=True
            ):
                packed_slots[out, :, :, plane] = values.astype(jnp.uint8)
            put(scale_slots.at[out].transpose((1, 0)), ones_beyond(tile_scales, at_rows.start, m, HALF_TILE))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(packed_slots.at[out], packed.at[at_rows, at_groups], commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[out], scales.at[at_groups, at_rows])

        return fetch, work

    scratch = [
        plgpu.SMEM((ring, config.rows, TILE_GROUPS, GROUP), x.dtype),
        plgpu.SMEM((out_ring, config.rows, TILE_GROUPS, e5m6.TILE_BYTES), jnp.uint8),
        plgpu.SMEM((out_ring, TILE_GROUPS, config.rows), jnp.float32),
    ]
    planes = jax.ShapeDtypeStruct((m, groups, e5m6.TILE_BYTES), jnp.uint8)
    out_type = (planes, jax.ShapeDtypeStruct(scales_shape((m, k), "tile"), jnp.float32))
    kernel = launch(body, config, num_tiles, out_type, scratch, params=APPROXIMATE)
    packed, scales = kernel(x.reshape(m, groups, GROUP))
    return packed.reshape(m, groups * e5m6.TILE_BYTES), scales


def e5m6_unpack(packed: Array, scales: Array, m: int, dtype: jnp.dtype, config: TuningConfig = E5M6) -> Array:
    """Return [m, k] of `dtype`."""
    k = packed.shape[1] // e5m6.TILE_BYTES * GROUP
    groups, ring, out_ring = k // GROUP, config.warpgroups * config.stages, config.warpgroups * config.out_slots
    num_tiles, at = _cut(m, k, config.rows)

    def body(packed, scales, x, packed_slots, scale_slots, x_slots):
        def fetch(tile, slot, copied):
            at_rows, at_groups = at(tile)
            plgpu.copy_gmem_to_smem(packed.at[at_rows, at_groups], packed_slots.at[slot], copied)
            plgpu.copy_gmem_to_smem(scales.at[at_groups, at_rows], scale_slots.at[slot], copied)

        def work(turn):
            planes = [_load(packed_slots.at[turn.slot, :, :, plane]).astype(jnp.int32) for plane in PLANES]
            factors = plgpu.load(
                scale_slots.at[turn.slot].transpose((1, 0)), layout=HALF_TILE.reduce(2), optimized=False
            )
            plgpu.commit_smem()
            turn.release()
            factors = spread(factors, planes[0].shape, HALF_TILE, (0, 1))
            out = turn.take_out_slot()
            for half, codes in zip(HALVES, e5m6.unpack(*planes), strict=True):
                x_slots[out, :, :, half] = (e5m6.decode(codes) * factors).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_slots.at[out], x.at[at(turn.tile)])

        return fetch, work

    scratch = [
        plgpu.SMEM((ring, config.rows, TILE_GROUPS, e5m6.TILE_BYTES), jnp.uint8),
        plgpu.SMEM((ring, TILE_GROUPS, config.rows), jnp.float32),
        plgpu.SMEM((out_ring, config.rows, TILE_GROUPS, GROUP), dtype),
    ]
    out_type = jax.ShapeDtypeStruct((m, groups, GROUP), dtype)
    kernel = launch(body, config, num_tiles, out_type, scratch, copies_per_slot=2, params=APPROXIMATE)
    return kernel(packed.reshape(m, groups, e5m6.TILE_BYTES), scales).reshape(m, k)


def _cut(m: int, k: int, rows: int) -> tuple[int, Callable[[Array], tuple]]:
    """The number of tiles, `rows` x 512, and their place: tile -> slices of rows and groups."""
    wide = pl.cdiv(k // GROUP, TILE_GROUPS)

    def at(tile):
        i, j = position(tile, wide)
        return pl.ds(i * rows, rows), pl.ds(j * TILE_GROUPS, TILE_GROUPS)

    return pl.cdiv(m, rows) * wide, at


def _load(ref: Any) -> Array:
    return plgpu.load(ref, layout=HALF_TILE, optimized=False)
