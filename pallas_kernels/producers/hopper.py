"""SwiGLU to tiles on Hopper, in rows only: 5 bytes moved per value. `stream` tells how rows are streamed."""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.producers.reference import swiglu
from pallas_kernels.producers.stream import (
    GROUPS,
    TILE,
    TuningConfig,
    each_warpgroup,
    launch,
    load_tile,
    over_rows,
    quantize_tile,
    ring_slot,
    shape_of,
    stream,
)
from pallas_kernels.quantized import E4M3, GROUP, Quantized, Scale, scales_shape

SWIGLU = TuningConfig(rows=8, warpgroups=3, stages=3)


def swiglu_quantize(hidden: Array, weight: Array | None, scale: Scale, config: TuningConfig = SWIGLU, interpret=None) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]. A tile is `rows` x 512 of gate and the same of up."""
    m, f = hidden.shape[0], hidden.shape[1] // 2
    groups = f // GROUP
    rows, wide, ring = config.rows, -(-groups // GROUPS), config.warpgroups * config.stages
    num_tiles = -(-m // rows) * wide
    weights = () if weight is None else (jnp.pad(weight, (0, -m % rows)),)

    def body(*refs):
        hidden_ref, *weight_refs, values_ref, scales_ref, hidden_s, values_s, scales_s, full = refs

        def place(tile):
            return pl.ds(tile // wide * rows, rows), pl.ds(tile % wide * GROUPS, GROUPS)

        def load(tile, turn):
            at_rows, at_groups = place(tile)
            index = ring_slot(config, turn)
            for half in range(2):
                plgpu.copy_gmem_to_smem(hidden_ref.at[at_rows, half, at_groups], hidden_s.at[index, half], full.at[index])

        def compute(tile, turn, release):
            at_rows, at_groups = place(tile)
            index = ring_slot(config, turn)
            gate, up = (load_tile(hidden_s.at[index, half]) for half in range(2))
            weights_of_rows = [plgpu.load(ref.at[at_rows], layout=TILE.reduce((1, 2)), optimized=False) for ref in weight_refs]
            factors = [over_rows(x, gate.shape) for x in weights_of_rows]
            release()
            values, scales = quantize_tile(swiglu(gate, up, *factors), scale, at_rows.start, m)
            plgpu.wait_smem_to_gmem(2 * (config.stages - 1), wait_read_only=True)
            values_s[index] = values
            scales_s.at[index].transpose((1, 0))[...] = scales
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values_s.at[index], values_ref.at[at_rows, at_groups])
            plgpu.copy_smem_to_gmem(scales_s.at[index], scales_ref.at[at_groups, at_rows])

        stream(config, each_warpgroup(config), num_tiles, full, load, compute)

    tile = (rows, GROUPS, GROUP)
    scratch = [
        plgpu.SMEM((ring, 2, *tile), jnp.bfloat16),
        plgpu.SMEM((ring, *tile), E4M3),
        plgpu.SMEM((ring, GROUPS, rows), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=ring),
    ]
    outputs = [shape_of((m, groups, GROUP), E4M3), shape_of(scales_shape((m, f), "tile"), jnp.float32)]
    values, scales = launch(body, config, -(-num_tiles // config.warpgroups), outputs, scratch, interpret)(
        hidden.reshape(m, 2, groups, GROUP), *weights
    )
    return Quantized(values.reshape(m, f), scales, "tile")
