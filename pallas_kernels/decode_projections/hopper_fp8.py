"""Products of few rows with weights in FP8 on Hopper: of rows in tiles, or each block quantises its part of them.

Where the kernel before makes whole groups of 128, it quantises them (`hopper_rows`). Else the block that multiplies
rows does, where many do the same work. That was 2 us for 16 rows and 4 for 32 beside a product of 3 us, most of it the
way of one group after the other through memory: up to 32 rows, all of a block's groups are asked for at once now.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.decode_projections.hopper import COLUMNS, FEW_ROWS, L, TuningConfig, begin, launch, wait
from pallas_kernels.hopper.ring import tiled
from pallas_kernels.hopper.stream import put, quantize_registers
from pallas_kernels.quantized import E4M3, Quantized, Scale

UNTYPED: Any = plgpu  # the type checker does not see all that it exports
# Of rows [N, 128]: a row for each warp, four neighbours for each lane.
ROWS: Any = L.TILED(plgpu.Tiling(((4, GROUP), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def project(
    x: Array | Quantized, values: Array, scales: Array, *, splits: int, scale: Scale, config: TuningConfig
) -> Array:
    """Return partial sums FP32 [splits, N, C] of x W.

    Args:
        x: BF16 [N, K], or tiles.
        values: E4M3 [C, K]: W turned.
        scales: FP32 [ceil(C / 128), K / 128].
        splits: parts of k, of whole groups of 128.
        scale: of the groups of rows in BF16.
        config: tuning.
    """
    n, in_tiles = x.shape[0], isinstance(x, Quantized)
    columns, k = values.shape
    tiles, part = columns // COLUMNS, k // splits
    chunks = part // GROUP

    def kernel(weight_ref, scales_ref, x_ref, *refs):
        *x_scales, out_ref, weights, rows, row_scales, full = refs
        begin(config)
        block = lax.axis_index("block")
        split, tile = lax.div(block, jnp.int32(tiles)), lax.rem(block, jnp.int32(tiles))
        column, groups = tile * COLUMNS, split * chunks
        for chunk in range(chunks):
            source = weight_ref.at[pl.ds(column, COLUMNS), pl.ds((groups + chunk) * GROUP, GROUP)]
            plgpu.copy_gmem_to_smem(source, weights.at[chunk], full.at[chunk])
        block_scales = [scales_ref[lax.div(column, jnp.int32(GROUP)), groups + chunk] for chunk in range(chunks)]
        wait(config)
        if in_tiles:
            for chunk in range(chunks):
                source = x_ref.at[:, pl.ds((groups + chunk) * GROUP, GROUP)]
                plgpu.copy_gmem_to_smem(source, rows.at[chunk], full.at[chunk])
        else:
            together = chunks if n <= FEW_ROWS else 1
            for first in range(0, chunks, together):
                own_chunks = range(first, min(first + together, chunks))
                sources = [x_ref.at[:, pl.ds((groups + chunk) * GROUP, GROUP)] for chunk in own_chunks]
                read = [plgpu.load(source, layout=ROWS, optimized=False) for source in sources]
                for chunk, group in zip(own_chunks, read, strict=True):
                    quantized, own = quantize_registers(group, scale, ROWS)
                    put(rows.at[chunk], quantized)
                    put(row_scales.at[chunk], own)
            plgpu.commit_smem()

        def product(chunk):
            if config.interpreted:
                left, right = weights[chunk].astype(jnp.float32), rows[chunk].astype(jnp.float32)
                return jnp.dot(left, right.T, preferred_element_type=jnp.float32)

            def run(accumulator):
                plgpu.wgmma(accumulator, weights.at[chunk], rows.at[chunk].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return accumulator[...]

            return pl.run_scoped(run, UNTYPED.ACC((COLUMNS, n), jnp.float32))

        def scale_of(chunk):
            source = x_scales[0].at[groups + chunk] if in_tiles else row_scales.at[chunk]
            return plgpu.load(source, layout=L.WGMMA.reduce(0), optimized=False)

        total = plgpu.layout_cast(jnp.zeros((COLUMNS, n), jnp.float32), L.WGMMA)
        ready = [scale_of(chunk) for chunk in range(chunks)] if n <= FEW_ROWS else None  # before anything is waited for
        for chunk, block_scale in enumerate(block_scales):
            own = ready[chunk] if ready else scale_of(chunk)
            plgpu.barrier_wait(full.at[chunk])
            total += product(chunk) * lax.broadcast_in_dim(own * block_scale, total.shape, [1])
        target = out_ref.at[split, :, pl.ds(column, COLUMNS)]
        target.transpose((1, 0))[...] = plgpu.layout_cast(total, L.WGMMA_TRANSPOSED)

    return launch(
        kernel,
        "decode_project_fp8",
        jax.ShapeDtypeStruct((splits, n, columns), jnp.float32),
        splits * tiles,
        [
            tiled((chunks, COLUMNS, GROUP), E4M3),
            tiled((chunks, n, GROUP), E4M3),
            plgpu.SMEM((chunks, n), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + in_tiles, num_barriers=chunks),
        ],
    )(values, scales, *jax.tree.leaves(x))
