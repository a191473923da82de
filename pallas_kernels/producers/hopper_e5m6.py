"""E5M6 on Hopper: 3.5 bytes moved per value of BF16. `stream` tells how rows are streamed, `e5m6` what the bytes are.

The two halves of a tile are worked on side by side, because a byte of the high plane takes a nibble of either.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.producers import e5m6
from pallas_kernels.producers.stream import GROUPS, ROWS, TuningConfig, each_warpgroup, launch, ring_slot, shape_of, stream
from pallas_kernels.quantized import GROUP, scales_shape

PACK = TuningConfig(rows=8, warpgroups=4, stages=3)
HALF_LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, GROUPS, e5m6.HALF), (32,), (4,))), warp_dims=(-5,), lane_dims=(-4, -2), vector_dim=-1)
HALVES = [pl.ds(0, e5m6.HALF), pl.ds(e5m6.HALF, e5m6.HALF)]
PLANES = [*HALVES, pl.ds(GROUP, e5m6.HALF)]


def e5m6_pack(x: Array, config: TuningConfig = PACK, interpret: Any = None) -> tuple[Array, Array]:
    """Return x [m, k] as uint8 [m, k * 3 // 2] and FP32 scales [k / 128, pad4(m)]."""
    m, k = x.shape
    groups, rows, ring, wide, num_tiles = _cut(m, k, config)

    def body(x_ref, packed_ref, scales_ref, x_s, packed_s, scales_s, full):
        def load(tile, turn):
            index = ring_slot(config, turn)
            plgpu.copy_gmem_to_smem(x_ref.at[_place(tile, wide, rows)], x_s.at[index], full.at[index])

        def compute(tile, turn, release):
            index, (at_rows, at_groups) = ring_slot(config, turn), _place(tile, wide, rows)
            first, second = (_load(x_s.at[index, :, :, half]).astype(jnp.float32) for half in HALVES)
            release()
            scales = e5m6.scale_of(jnp.max(jnp.maximum(jnp.abs(first), jnp.abs(second)), axis=2))
            inverse = _over_half(1.0 / scales, first.shape)
            numbers = at_rows.start + plgpu.broadcasted_iota(jnp.int32, scales.shape, 0, layout=HALF_LAYOUT.reduce(2))
            plgpu.wait_smem_to_gmem(2 * (config.stages - 1), wait_read_only=True)
            for plane, values in zip(PLANES, e5m6.pack(e5m6.encode(first * inverse), e5m6.encode(second * inverse)), strict=True):
                packed_s[index, :, :, plane] = values.astype(jnp.uint8)
            scales_s.at[index].transpose((1, 0))[...] = jnp.where(numbers < m, scales, 1.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(packed_s.at[index], packed_ref.at[at_rows, at_groups])
            plgpu.copy_smem_to_gmem(scales_s.at[index], scales_ref.at[at_groups, at_rows])

        stream(config, each_warpgroup(config), num_tiles, full, load, compute)

    scratch = [
        plgpu.SMEM((ring, rows, GROUPS, GROUP), x.dtype),
        plgpu.SMEM((ring, rows, GROUPS, e5m6.TILE_BYTES), jnp.uint8),
        plgpu.SMEM((ring, GROUPS, rows), jnp.float32),
        plgpu.Barrier(num_barriers=ring),
    ]
    outputs = [shape_of((m, groups, e5m6.TILE_BYTES), jnp.uint8), shape_of(scales_shape((m, k), "tile"), jnp.float32)]
    packed, scales = launch(body, config, -(-num_tiles // config.warpgroups), outputs, scratch, interpret)(x.reshape(m, groups, GROUP))
    return packed.reshape(m, groups * e5m6.TILE_BYTES), scales


def e5m6_unpack(packed: Array, scales: Array, m: int, dtype: jnp.dtype, config: TuningConfig = PACK, interpret: Any = None) -> Array:
    """Return [m, k] of `dtype`."""
    k = packed.shape[1] // e5m6.TILE_BYTES * GROUP
    groups, rows, ring, wide, num_tiles = _cut(m, k, config)

    def body(packed_ref, scales_ref, x_ref, packed_s, scales_s, x_s, full):
        def load(tile, turn):
            index, (at_rows, at_groups) = ring_slot(config, turn), _place(tile, wide, rows)
            plgpu.copy_gmem_to_smem(packed_ref.at[at_rows, at_groups], packed_s.at[index], full.at[index])
            plgpu.copy_gmem_to_smem(scales_ref.at[at_groups, at_rows], scales_s.at[index], full.at[index])

        def compute(tile, turn, release):
            index = ring_slot(config, turn)
            planes = [_load(packed_s.at[index, :, :, plane]).astype(jnp.int32) for plane in PLANES]
            factors = plgpu.load(scales_s.at[index].transpose((1, 0)), layout=HALF_LAYOUT.reduce(2), optimized=False)
            release()
            factors = _over_half(factors, planes[0].shape)
            plgpu.wait_smem_to_gmem(config.stages - 1, wait_read_only=True)
            for half, codes in zip(HALVES, e5m6.unpack(*planes), strict=True):
                x_s[index, :, :, half] = (e5m6.decode(codes) * factors).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_s.at[index], x_ref.at[_place(tile, wide, rows)])

        stream(config, each_warpgroup(config), num_tiles, full, load, compute)

    scratch = [
        plgpu.SMEM((ring, rows, GROUPS, e5m6.TILE_BYTES), jnp.uint8),
        plgpu.SMEM((ring, GROUPS, rows), jnp.float32),
        plgpu.SMEM((ring, rows, GROUPS, GROUP), dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=ring),
    ]
    output = [shape_of((m, groups, GROUP), dtype)]
    kernel = launch(body, config, -(-num_tiles // config.warpgroups), output, scratch, interpret)
    return kernel(packed.reshape(m, groups, e5m6.TILE_BYTES), scales)[0].reshape(m, k)


def _cut(m: int, k: int, config: TuningConfig) -> tuple[int, int, int, int, int]:
    """Groups of a row, rows of a tile, slots of a block, tiles of a row, tiles."""
    groups, wide = k // GROUP, -(-k // (GROUP * GROUPS))
    return groups, config.rows, config.warpgroups * config.stages, wide, -(-m // config.rows) * wide


def _place(tile: Array, wide: int, rows: int) -> tuple:
    return pl.ds(tile // wide * rows, rows), pl.ds(tile % wide * GROUPS, GROUPS)


def _load(ref) -> Array:
    return plgpu.load(ref, layout=HALF_LAYOUT, optimized=False)


def _over_half(x: Array, shape: tuple[int, ...]) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (0, 1)), HALF_LAYOUT)
