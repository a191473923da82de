"""SwiGLU to tiles on Hopper, in rows only: 5 bytes moved per value.

`pallas_kernels.hopper.stream` tells how tiles stream, and what speed this kernel reaches.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.hopper.stream import (
    APPROXIMATE,
    TILE,
    TILE_GROUPS,
    TuningConfig,
    launch,
    load_tile,
    ones_beyond,
    position,
    put,
    quantize_registers,
    quantized_type,
    spread,
    tiles_of_rows,
)
from pallas_kernels.producers.reference import swiglu
from pallas_kernels.quantized import E4M3, Quantized, Scale

SWIGLU_QUANTIZE = TuningConfig(rows=8, warpgroups=3, stages=3, out_slots=3)


def swiglu_quantize(
    hidden: Array,
    weight: Array | None,
    scale: Scale,
    config: TuningConfig = SWIGLU_QUANTIZE,
    *,
    num_rows: Array | None = None,
) -> Quantized:
    """Return silu(gate) * up (* weight) in tiles [m, f]. A tile is `rows` x 512 of gate and the same of up.

    Tiles behind the first `num_rows` rows are not written.
    """
    m, f = hidden.shape[0], hidden.shape[1] // 2
    groups, rows = f // GROUP, config.rows
    tall, wide = pl.cdiv(m, rows), pl.cdiv(groups, TILE_GROUPS)
    weights = () if weight is None else (jnp.pad(weight, (0, -m % rows)),)
    counts = () if num_rows is None else (num_rows.reshape(1),)

    def at(tile):
        i, j = position(tile, wide)
        return pl.ds(i * rows, rows), pl.ds(j * TILE_GROUPS, TILE_GROUPS)

    def body(hidden, *refs):
        weight_refs, refs = refs[: len(weights)], refs[len(weights) + len(counts) :]
        values, scales, hidden_slots, value_slots, scale_slots = refs

        def fetch(tile, slot, copied):
            at_rows, at_groups = at(tile)
            for half in range(2):
                plgpu.copy_gmem_to_smem(hidden.at[at_rows, half, at_groups], hidden_slots.at[slot, half], copied)

        def work(turn):
            at_rows, at_groups = at(turn.tile)
            gate, up = (load_tile(hidden_slots.at[turn.slot, half]) for half in range(2))
            factors = [plgpu.load(ref.at[at_rows], layout=TILE.reduce((1, 2)), optimized=False) for ref in weight_refs]
            plgpu.commit_smem()
            turn.release()
            product = swiglu(gate, up, *(spread(factor, gate.shape, TILE, (0,)) for factor in factors))
            tile_values, tile_scales = quantize_registers(product, scale, TILE)
            out = turn.take_out_slot()
            put(value_slots.at[out], tile_values)
            put(scale_slots.at[out].transpose((1, 0)), ones_beyond(tile_scales, at_rows.start, m, TILE))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(value_slots.at[out], values.at[at_rows, at_groups], commit_group=False)
            plgpu.copy_smem_to_gmem(scale_slots.at[out], scales.at[at_groups, at_rows])

        return fetch, work

    def used(_, *refs):
        return tiles_of_rows(refs[len(weights)], rows, wide)

    tile, out_ring = (rows, TILE_GROUPS, GROUP), config.warpgroups * config.out_slots
    scratch = [
        plgpu.SMEM((config.warpgroups * config.stages, 2, *tile), jnp.bfloat16),
        plgpu.SMEM((out_ring, *tile), E4M3),
        plgpu.SMEM((out_ring, TILE_GROUPS, rows), jnp.float32),
    ]
    out_type = (jax.ShapeDtypeStruct((m, groups, GROUP), E4M3), quantized_type((m, f))[1])
    kernel = launch(
        body,
        config,
        tall * wide,
        out_type,
        scratch,
        copies_per_slot=2,
        params=APPROXIMATE,
        used=used if counts else None,
    )
    values, scales = kernel(hidden.reshape(m, 2, groups, GROUP), *weights, *counts)
    return Quantized(values.reshape(m, f), scales, "tile")
