"""What stands between the products of a decoding step on Hopper: a block for each row."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_projections.hopper import L, TuningConfig, begin, launch, wait
from pallas_kernels.decode_projections.hopper_absorb import turn_pairs

VECTOR = 4
ROW_PAIRS = L.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)  # every warp has all 32


def add(refs, layout):
    """Return the sum of what `refs` hold, FP32."""
    read = [plgpu.load(ref, layout=layout).astype(jnp.float32) for ref in refs]
    return sum(read[1:], read[0])


def normed(x: Array, gain: Array, eps: float) -> Array:
    """Return rms_norm(x) * gain of a row in BF16, or FP32 [...]."""
    x = x.astype(jnp.float32)
    size = x.size
    return (x * lax.rsqrt(jnp.sum(x * x) / size + eps) * gain).astype(jnp.bfloat16)


def add_norm(x: Array, parts: Array, gain: Array, *, eps: float, config: TuningConfig) -> tuple[Array, Array]:
    """Return x + the sum of parts, and its norm, both BF16 [N, D].

    Args:
        x: residual stream [N, D], BF16 or FP32.
        parts: [splits, N, D], BF16 or FP32.
        gain: FP32 [D].
        eps: added to the mean square.
        config: tuning.
    """
    splits, n, width = parts.shape
    layout = L.WG_STRIDED((width,), vec_size=VECTOR)

    def kernel(x_ref, parts_ref, gain_ref, sum_ref, out_ref):
        begin(config)
        row = lax.axis_index("block")
        gains = plgpu.load(gain_ref, layout=layout)
        wait(config)
        total = add([x_ref.at[row], *(parts_ref.at[i, row] for i in range(splits))], layout).astype(jnp.bfloat16)
        sum_ref[row, :] = total
        out_ref[row, :] = normed(total, gains, eps)

    rows = jax.ShapeDtypeStruct((n, width), jnp.bfloat16)
    return launch(kernel, "decode_add_norm", (rows, rows), n, [])(x, parts, gain)


def latents(
    parts: Array,
    gains: tuple[Array, Array],
    table: tuple[Array, Array],
    pages: Array,
    places: tuple[Array, Array],
    *,
    eps: float,
    config: TuningConfig,
) -> tuple[Array, Array]:
    """Return normed query latents BF16 [N, A], and the pages with the entry of each row in its place.

    Args:
        parts: FP32 [splits, N, A + C + R], whose sum are query latents, latents and rotary keys.
        gains: FP32 [A] and [C].
        table: cos and sin [N, R / 2].
        pages: BF16 [pages, page length, C + R]; they are overwritten.
        places: int32 [N] page and row of each row; a page that does not exist is nowhere.
        eps: added to the mean square.
        config: tuning.
    """
    splits, n, width = parts.shape
    queries, latent = (len(gain) for gain in gains)
    num_pages, length, entry = pages.shape
    of_queries = L.WG_STRIDED((queries,), vec_size=VECTOR)
    of_latents = L.WG_STRIDED((latent // 2, 2), vec_size=VECTOR)

    def kernel(parts_ref, pairs_ref, q_gain_ref, gain_ref, cos_ref, sin_ref, page_ref, row_ref, pages_ref, out_ref):
        begin(config)
        own = lax.axis_index("block")
        q_gain, gain = plgpu.load(q_gain_ref, layout=of_queries), plgpu.load(gain_ref, layout=of_latents)
        wait(config)
        page, row = page_ref[own], row_ref[own]

        def rounded(refs, layout):
            return add(refs, layout).astype(jnp.bfloat16)

        q = rounded([parts_ref.at[i, own, pl.ds(0, queries)] for i in range(splits)], of_queries)
        out_ref[own, :] = normed(q, q_gain, eps)

        @pl.when((page >= 0) & (page < num_pages))
        def _():
            pairs = pl.ds(queries // 2, latent // 2)
            values = rounded([pairs_ref.at[i, own, pairs] for i in range(splits)], of_latents)
            pages_ref[page, row, pl.ds(0, latent // 2)] = normed(values, gain, eps)
            rotary = pl.ds((queries + latent) // 2, (entry - latent) // 2)
            parts = [lambda side, i=i: pairs_ref.at[i, own, rotary, side] for i in range(splits)]

            def store(side, values):
                pages_ref[page, row, pl.ds(latent // 2, (entry - latent) // 2), side] = values

            turn_pairs(ROW_PAIRS, parts, (cos_ref.at[own], sin_ref.at[own]), store)

    pages_ref = jax.new_ref(pages.reshape(num_pages, length, entry // 2, 2))
    pairs = parts.reshape(splits, n, width // 2, 2)
    out = launch(kernel, "decode_latents", jax.ShapeDtypeStruct((n, queries), jnp.bfloat16), n, [])(
        parts, pairs, gains[0], gains[1].reshape(-1, 2), *table, *places, pages_ref
    )
    return out, jax.freeze(pages_ref).reshape(pages.shape)
