"""Queries into latent space on Hopper: their content through W_UK, their rotary channels turned, side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_projections.hopper import (
    COLUMNS,
    FEW_ROWS,
    L,
    TuningConfig,
    begin,
    launch,
    multiply,
    turned,
    wait,
)
from pallas_kernels.hopper.ring import tiled

PAIRS = L.TILED(plgpu.Tiling(((16, 8), (4, 8), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def turn_pairs(layout: Any, parts: Sequence[Callable[[int], Any]], table: tuple[Any, Any], store: Callable) -> None:
    """Rotate pairs of channels whose sum over `parts` is rounded to BF16.

    Args:
        layout: of a channel, an array with one number for each pair.
        parts: side -> ref of the even channels (0) or the odd ones (1).
        table: refs of cos and sin.
        store: takes a side and its values.
    """

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False)

    def channel(side):
        read = [load(part(side)) for part in parts]
        return sum(read[1:], read[0]).astype(jnp.bfloat16).astype(jnp.float32)

    even, odd = channel(0), channel(1)
    cos, sin = map(load, table)
    store(0, (even * cos - odd * sin).astype(jnp.bfloat16))
    store(1, (odd * cos + even * sin).astype(jnp.bfloat16))


def absorb(parts: Array, key_NPC: Array, table: tuple[Array, Array], *, config: TuningConfig) -> Array:
    """Return queries BF16 [N, heads * (C + R)].

    Args:
        parts: FP32 [splits, N, heads * (P + R)], whose sum are the queries.
        key_NPC: BF16 [heads, P, C].
        table: cos and sin [N, R / 2].
        config: tuning.
    """
    splits, n, width = parts.shape
    heads, content, columns = key_NPC.shape
    each = width // heads
    rotary, out_each = each - content, columns + each - content
    tiles, chunks, depth = columns // COLUMNS, content // COLUMNS, COLUMNS

    def kernel(parts_ref, pairs_ref, weight_ref, cos_ref, sin_ref, out_ref, weights, rows, full):
        begin(config)
        block = lax.axis_index("block")
        head, tile = lax.div(block, jnp.int32(tiles)), lax.rem(block, jnp.int32(tiles))
        for chunk in range(chunks):
            source = weight_ref.at[head, pl.ds(chunk * depth, depth), pl.ds(tile * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(source, weights.at[chunk], full.at[chunk])
        wait(config)

        def read(chunk):
            own = pl.ds(head * each + chunk * depth, depth)
            return [
                plgpu.load(parts_ref.at[i, :, own].transpose((1, 0)), layout=L.WGMMA_TRANSPOSED, optimized=False)
                for i in range(splits)
            ]

        at_once = [read(chunk) for chunk in range(chunks)] if n <= FEW_ROWS else None  # they have registers
        for chunk in range(chunks):
            found = at_once[chunk] if at_once else read(chunk)
            target = rows.at[chunk].transpose((1, 0))
            target[...] = sum(found[1:], found[0]).astype(jnp.bfloat16)
        plgpu.commit_smem()
        total = multiply(config, weights, rows, full)

        def columns_at(start, count):
            return out_ref.at[:, pl.ds(lax.div(head * out_each + start, jnp.int32(2)), count // 2)]

        own = out_ref.reshape(n, heads * out_each) if not config.interpreted else None
        store_pairs(columns_at(tile * COLUMNS, COLUMNS), total, own, head * out_each + tile * COLUMNS)

        @pl.when(tile == 0)
        def _():
            pairs = pl.ds(lax.div(head * each + content, jnp.int32(2)), rotary // 2)
            parts = [lambda side, i=i: pairs_ref.at[i, :, pairs, side].transpose((1, 0)) for i in range(splits)]
            target = columns_at(columns, rotary)

            def store(side, values):
                target.at[:, :, side].transpose((1, 0))[...] = values

            turn_pairs(PAIRS, parts, (cos_ref.transpose((1, 0)), sin_ref.transpose((1, 0))), store)

    out = launch(
        kernel,
        "decode_absorb",
        jax.ShapeDtypeStruct((n, heads * out_each // 2, 2), jnp.bfloat16),
        heads * tiles,
        [
            tiled((chunks, depth, COLUMNS), jnp.bfloat16),
            tiled((chunks, n, depth), jnp.bfloat16),
            plgpu.Barrier(num_barriers=chunks),
        ],
    )(parts, parts.reshape(splits, n, width // 2, 2), key_NPC, *table)
    return out.reshape(n, heads * out_each)


def store_pairs(target, total, own, column) -> None:
    """Store FP32 [64, N] into the pairs `target` [N, 32, 2]."""
    if own is None:
        target[...] = total.T.reshape(target.shape).astype(jnp.bfloat16)
    else:
        own.at[:, pl.ds(column, COLUMNS)].transpose((1, 0))[...] = turned(total, jnp.bfloat16)
