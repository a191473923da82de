"""Ragged cases of MLA decode with poisoned pages, and what they must give, in FP64."""

import jax.numpy as jnp
import numpy as np

PAGE, KEY, VALUE = 64, 576, 512
SCALE = 0.09
FOREIGN = 2147480000  # a page number that no cache has, as FlashMLA's tests put it behind a sequence's last page


def make(lengths, queries, heads, *, key=KEY, page=PAGE, dtype=jnp.bfloat16, seed=0):
    """Return q, cache, tables and lengths: pages in random order, NaN wherever no token of a sequence lies."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    pages = -(-lengths // page)
    num_pages = int(pages.sum()) + 2  # two that nobody owns
    order = rng.permutation(num_pages)
    cache = np.full((num_pages, page, key), np.nan)
    tables = np.full((len(lengths), pages.max() + 1), FOREIGN, np.int32)
    taken = 0
    for sequence, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        own = order[taken : taken + count]
        taken += count
        tables[sequence, :count] = own
        for i, number in enumerate(own):
            valid = min(page, length - i * page)
            cache[number, :valid] = rng.normal(size=(valid, key))
    q = rng.normal(size=(len(lengths), queries, heads, key)) / 2
    return jnp.asarray(q, dtype), jnp.asarray(cache, dtype), jnp.asarray(tables), jnp.asarray(lengths)


def expected(q, cache, tables, lengths, *, scale=SCALE, value=VALUE):
    """Return outputs and log-sum-exp in FP64, one query of one sequence after the other."""
    q, cache = np.asarray(q, np.float64), np.asarray(cache, np.float64)
    batch, queries, heads, _ = q.shape
    out, lse = np.zeros((batch, queries, heads, value)), np.full((batch, queries, heads), -np.inf)
    for sequence, length in enumerate(np.asarray(lengths)):
        count = -(-length // cache.shape[1])
        entries = cache[np.asarray(tables)[sequence, :count]].reshape(-1, cache.shape[2])
        for query in range(queries):
            seen = entries[: max(0, length - queries + 1 + query)]
            if not len(seen):
                continue
            scores = scale * q[sequence, query] @ seen.T
            largest = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - largest)
            total = weights.sum(axis=1, keepdims=True)
            out[sequence, query] = weights @ seen[:, :value] / total
            lse[sequence, query] = (largest + np.log(total))[:, 0]
    return out, lse


def errors(result, want):
    """Return the relative L2 error of the outputs and the largest absolute error of the log-sum-exp."""
    (out, lse), (want_out, want_lse) = ([np.asarray(x, np.float64) for x in pair] for pair in (result, want))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    assert not out[np.isinf(want_lse)].any()
    seen = np.isfinite(want_lse)
    return np.linalg.norm(out - want_out) / np.linalg.norm(want_out), np.abs(lse[seen] - want_lse[seen]).max(initial=0)
