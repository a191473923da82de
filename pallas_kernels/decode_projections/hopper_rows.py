"""What stands between the products of a decoding step on Hopper: a block for each row."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import GROUP
from pallas_kernels.decode_projections.hopper import L, TuningConfig, begin, launch, wait
from pallas_kernels.decode_projections.hopper_absorb import turn_pairs
from pallas_kernels.hopper.marks import write_zeros
from pallas_kernels.hopper.stream import put, quantize_registers
from pallas_kernels.quantized import E4M3, Scale

VECTOR = 4
# Of a row [D / 128, 128]: a group for each warp, four neighbours for each lane.
GROUPS: Any = L.TILED(plgpu.Tiling(((4, GROUP), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
ROW_PAIRS = L.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)  # every warp has all 32


def load(ref, layout):
    """Return what `ref` holds."""
    return plgpu.load(ref, layout=layout) if layout is not GROUPS else plgpu.load(ref, layout=layout, optimized=False)


def add(refs, layout):
    """Return the sum of what `refs` hold, FP32."""
    read = [load(ref, layout).astype(jnp.float32) for ref in refs]
    return sum(read[1:], read[0])


def normed(x: Array, gain: Array, eps: float, layout: Any) -> Array:
    """Return rms_norm(x) * gain of a row in BF16, which `layout` holds."""
    x, size = x.astype(jnp.float32), x.size
    squares = jnp.sum(x * x, axis=1) if layout is GROUPS else x * x  # of groups in their warps first
    return (x * lax.rsqrt(jnp.sum(squares) / size + eps) * gain).astype(jnp.bfloat16)


def in_groups(home: Any, config: TuningConfig) -> Array:
    """Return what shared memory holds of a row, in the layout `GROUPS`."""
    if config.interpreted:  # which knows no reshaped refs
        return home[...].reshape(-1, GROUP)
    return load(home.reshape(home.shape[0] // GROUP, GROUP), GROUPS)


def add_norm(
    x: Array,
    parts: Array,
    gain: Array,
    *,
    eps: float,
    scale: Scale | None,
    zeros: int = 0,
    config: TuningConfig,
) -> tuple[Array, ...]:
    """Return x + the sum of parts and its norm, both BF16 [N, D], with `scale` the norm in tiles, and zeros.

    Args:
        x: residual stream [N, D], BF16 or FP32.
        parts: [splits, N, D], BF16 or FP32.
        gain: FP32 [D].
        eps: added to the mean square.
        scale: of the tiles, E4M3 [N, D] and FP32 [D / 128, N].
        zeros: int32 zeros that the first block writes.
        config: tuning.
    """
    splits, n, width = parts.shape
    groups = width // GROUP

    def kernel(x_ref, parts_ref, gain_ref, sum_ref, out_ref, *more):
        begin(config)
        row = lax.axis_index("block")
        gains = load(gain_ref, GROUPS)
        wait(config)
        total = add([x_ref.at[row], *(parts_ref.at[i, row] for i in range(splits))], GROUPS).astype(jnp.bfloat16)
        sum_ref.at[row][...] = total
        h = normed(total, gains, eps, GROUPS)
        out_ref.at[row][...] = h
        if scale:
            values, scales = quantize_registers(h, scale, GROUPS)
            more[0].at[row][...] = values
            more[1].at[:, row][...] = scales
        if zeros:

            @pl.when(row == 0)
            def _():
                write_zeros(more[-1])

    rows = jax.ShapeDtypeStruct((n, groups, GROUP), jnp.bfloat16)
    out_type = [rows, rows]
    if scale:
        out_type += [jax.ShapeDtypeStruct(rows.shape, E4M3), jax.ShapeDtypeStruct((groups, n), jnp.float32)]
    if zeros:
        out_type.append(jax.ShapeDtypeStruct((zeros,), jnp.int32))
    operands = x.reshape(rows.shape), parts.reshape(splits, *rows.shape), gain.reshape(groups, GROUP)
    results = launch(kernel, "decode_add_norm", tuple(out_type), n, [])(*operands)
    many = 3 if scale else 2
    return *(result.reshape(n, width) for result in results[:many]), *results[many:]


def latents(
    parts: Array,
    gains: tuple[Array, Array],
    table: tuple[Array, Array],
    pages: Array,
    places: tuple[Array, Array],
    *,
    eps: float,
    scale: Scale | None = None,
    config: TuningConfig,
) -> tuple[Array, ...]:
    """Return the pages with the entry of each row in its place, and normed query latents: BF16 [N, A], or tiles.

    Args:
        parts: FP32 [splits, N, A + C + R], whose sum are query latents, latents and rotary keys.
        gains: FP32 [A] and [C].
        table: cos and sin [N, R / 2].
        pages: BF16 [pages, page length, C + R]; they are overwritten.
        places: int32 [N] page and row of each row; a page that does not exist is nowhere.
        eps: added to the mean square.
        scale: of the tiles, E4M3 [N, A] and FP32 [A / 128, N]; None: the latents stay in BF16.
        config: tuning.
    """
    splits, n, width = parts.shape
    queries, latent = (len(gain) for gain in gains)
    num_pages, length, entry = pages.shape
    groups = queries // GROUP
    of_queries = L.WG_STRIDED((queries,), vec_size=VECTOR)
    of_latents = L.WG_STRIDED((latent // 2, 2), vec_size=VECTOR)

    def kernel(
        parts_ref, pairs_ref, q_gain_ref, gain_ref, cos_ref, sin_ref, page_ref, row_ref, pages_ref, out_ref, *more
    ):
        begin(config)
        own = lax.axis_index("block")
        q_gain, gain = plgpu.load(q_gain_ref, layout=of_queries), plgpu.load(gain_ref, layout=of_latents)
        wait(config)
        page, row = page_ref[own], row_ref[own]

        def rounded(refs, layout):
            return add(refs, layout).astype(jnp.bfloat16)

        q = rounded([parts_ref.at[i, own, pl.ds(0, queries)] for i in range(splits)], of_queries)
        q = normed(q, q_gain, eps, of_queries)
        if scale:  # groups lie in other lanes: they meet in shared memory
            scales_ref, home = more
            put(home, q)
            plgpu.commit_smem()
            values, scales = quantize_registers(in_groups(home, config), scale, GROUPS)
            out_ref.at[own][...] = values
            scales_ref.at[:, own][...] = scales
        else:
            out_ref[own, :] = q

        @pl.when((page >= 0) & (page < num_pages))
        def _():
            pairs = pl.ds(queries // 2, latent // 2)
            values = rounded([pairs_ref.at[i, own, pairs] for i in range(splits)], of_latents)
            pages_ref[page, row, pl.ds(0, latent // 2)] = normed(values, gain, eps, of_latents)
            rotary = pl.ds((queries + latent) // 2, (entry - latent) // 2)
            parts = [lambda side, i=i: pairs_ref.at[i, own, rotary, side] for i in range(splits)]

            def store(side, values):
                pages_ref[page, row, pl.ds(latent // 2, (entry - latent) // 2), side] = values

            turn_pairs(ROW_PAIRS, parts, (cos_ref.at[own], sin_ref.at[own]), store)

    pages_ref = jax.new_ref(pages.reshape(num_pages, length, entry // 2, 2))
    pairs = parts.reshape(splits, n, width // 2, 2)
    out_type, scratch = jax.ShapeDtypeStruct((n, queries), jnp.bfloat16), []
    if scale:
        out_type = jax.ShapeDtypeStruct((n, groups, GROUP), E4M3), jax.ShapeDtypeStruct((groups, n), jnp.float32)
        scratch = [plgpu.SMEM((queries,), jnp.bfloat16)]
    out = launch(kernel, "decode_latents", out_type, n, scratch)(
        parts, pairs, gains[0], gains[1].reshape(-1, 2), *table, *places, pages_ref
    )
    pages = jax.freeze(pages_ref).reshape(pages.shape)
    return (pages, out[0].reshape(n, queries), out[1]) if scale else (pages, out)
