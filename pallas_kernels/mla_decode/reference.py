"""MLA decode attention in plain jnp: what the kernels must compute, whatever lies in pages that nobody owns."""

import jax.numpy as jnp
from jax import Array, lax


def mla_decode(
    q: Array, cache: Array, tables: Array, lengths: Array, schedule: None = None, *, scale: float, value_dim: int
) -> tuple[Array, Array]:
    """Return outputs [B, S, N, value_dim] of q's dtype and FP32 log-sum-exp [B, S, N]; softmax and sums in FP32.

    Pages are gathered whole, so this needs memory for the longest sequence times the batch. The schedule is not used.
    """
    page = cache.shape[1]
    num_queries, positions = q.shape[1], jnp.arange(tables.shape[1] * page)
    seen = lengths[:, None] - num_queries + 1 + jnp.arange(num_queries)  # [B, S]: positions that a query sees
    written = positions < lengths[:, None]
    used = written[:, ::page]
    entries = cache.at[jnp.where(used, tables, 0)].get(mode="clip").reshape(len(q), -1, cache.shape[2])
    entries = jnp.where(written[..., None], entries, 0).astype(jnp.float32)  # 0 times NaN would be NaN
    entries = lax.optimization_barrier(entries)  # made once, not once for each product
    scores = scale * jnp.einsum("bsnk,bmk->bsnm", q.astype(jnp.float32), entries, precision=lax.Precision.HIGHEST)
    mask = (positions < seen[..., None])[:, :, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    largest = jnp.where(seen > 0, scores.max(axis=(2, 3)), 0)[:, :, None, None]
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    # whole entries: a product with a part of each would copy that part
    out = jnp.einsum("bsnm,bmk->bsnk", weights, entries, precision=lax.Precision.HIGHEST)[..., :value_dim]
    empty = total == 0
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + largest)
    return jnp.where(empty, 0, out / jnp.where(empty, 1, total)).astype(q.dtype), lse[..., 0]
