"""The same in plain jnp: the specification, and the way on CPUs."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, Scale, dequantize


def project(x: Array, weight: Array, *, whole: bool) -> Array:
    """Return the products of each row's parts with their matrices, [1, N, B * C]; in FP32 unless `whole`."""
    batch, k, _ = weight.shape
    parts = x.reshape(len(x), batch, k)
    y = jnp.einsum("nbk,bkc->nbc", *_in_fp32(parts, weight)).reshape(1, len(x), -1)
    return y.astype(x.dtype) if whole else y


def _in_fp32(*arrays: Array) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]


def project_fp8(x: Array | Quantized, values: Array, scales: Array, *, scale: Scale) -> Array:
    """Return the product of x in tiles with blocks [C, K], FP32 [1, N, C]."""
    rows = x if isinstance(x, Quantized) else quantize_tiles(x, scale=scale, implementation="reference")
    return (dequantize(rows) @ dequantize(Quantized(values, scales, "block")).T)[None]


def absorb(parts: Array, key_NPC: Array, table: tuple[Array, Array]) -> Array:
    """Return queries in latent space [N, heads * (C + R)]."""
    heads, content, _ = key_NPC.shape
    q = parts.sum(0).astype(key_NPC.dtype).reshape(parts.shape[1], heads, -1)
    latent = jnp.einsum("tnp,npc->tnc", *_in_fp32(q[..., :content], key_NPC))
    turned = rotated(q[..., content:], (table[0][:, None], table[1][:, None]))
    return jnp.concatenate([latent.astype(q.dtype), turned], -1).reshape(len(q), -1)


def rotated(x: Array, table: tuple[Array, Array]) -> Array:
    """Rotate pairs of neighbouring channels [..., R]."""
    cos, sin = table
    even, odd = (x[..., side::2].astype(jnp.float32) for side in (0, 1))
    both = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return both.reshape(x.shape).astype(x.dtype)


def normed(x: Array, gain: Array, eps: float) -> Array:
    """Return rms_norm(x) * gain over the last dim; FP32 inside."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * gain).astype(x.dtype)


def add_norm(
    x: Array, parts: Array, gain: Array, *, eps: float, scale: Scale | None = None, zeros: int = 0
) -> tuple[Array, ...]:
    """Return x + the sum of parts, its norm, with `scale` values and scales of the norm in tiles, and zeros."""
    total = (x.astype(jnp.float32) + parts.astype(jnp.float32).sum(0)).astype(x.dtype)
    h = normed(total, gain, eps)
    made = [total, h]
    if scale:
        tiles = quantize_tiles(h, scale=scale, implementation="reference")
        made += [tiles.values, tiles.scales]
    return *made, *([jnp.zeros(zeros, jnp.int32)] if zeros else [])


def latents(
    parts: Array,
    gains: tuple[Array, Array],
    table: tuple[Array, Array],
    pages: Array,
    places: tuple[Array, Array],
    *,
    eps: float,
    scale: Scale | None = None,
) -> tuple[Array, ...]:
    """Return the pages with the entry of each row in its place, and normed query latents, with `scale` in tiles."""
    queries, latent = (len(gain) for gain in gains)
    both = parts.sum(0).astype(pages.dtype)
    entry = normed(both[:, queries : queries + latent], gains[1], eps), rotated(both[:, queries + latent :], table)
    page = jnp.where(places[0] < 0, len(pages), places[0])
    pages = pages.at[page, places[1]].set(jnp.concatenate(entry, -1), mode="drop")
    q = normed(both[:, :queries], gains[0], eps)
    if scale:
        tiles = quantize_tiles(q, scale=scale, implementation="reference")
        return lax.optimization_barrier(pages), tiles.values, tiles.scales
    return lax.optimization_barrier(pages), q
