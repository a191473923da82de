"""MLA decode attention over a paged latent cache, in the absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token's cache entry is its latent and its rotary key, the same for all heads. With the up-projections absorbed into
the queries and the output, a head attends to the entries themselves: they are the keys, and their latent part the
values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from pallas_kernels import dispatch
from pallas_kernels.mla_decode import hopper, reference, tpu
from pallas_kernels.mla_decode.schedule import PAGE, Schedule
from pallas_kernels.quantized import check_array

LATENT, ROTARY = 512, 64  # of DeepSeek-V2 and V3, the widths that the kernels are made for
MOST_QUERIES = 4  # of a sequence: a token and three drafts
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def mla_decode(
    q: Array,
    cache: Array,
    tables: Array,
    lengths: Array,
    schedule: Schedule | None = None,
    *,
    scale: float,
    value_dim: int = LATENT,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Return softmax(scale q k^T) v over each sequence's pages, and the log of the sum under the softmax.

    A sequence's last S tokens are those of its queries, already in the cache: query s sees the positions before
    lengths - S + 1 + s. What lies in a page behind a sequence's length, and page numbers behind its last page, may be
    anything, NaN too. A query that sees nothing (an empty sequence) gets output 0 and log-sum-exp -inf, so that results
    over parts of a context can be merged.

    Args:
        q: BF16 or FP32 [B, S, N, K], queries with absorbed up-projections: latent, then rotary part.
        cache: [pages, page length, K] of q's dtype, latent and rotary key of tokens.
        tables: int32 [B, pages of a sequence at most], numbers of its pages in order.
        lengths: int32 [B], tokens, those of the queries included.
        schedule: what `plan` returns for these lengths; a step of many layers makes it once. None makes it here.
        scale: of the scores.
        value_dim: the first dims of an entry, which are its value.
        implementation: "auto", "reference", "hopper" or "tpu". The kernels take BF16, K = 576, values of 512 dims and
            pages of 64 tokens; "auto" takes the reference for others.

    Returns:
        Outputs [B, S, N, value_dim] of q's dtype, and FP32 [B, S, N], a natural logarithm.

    Raises:
        ValueError: a shape or dtype, more than four queries, or lengths beyond the tables where they are known.
        NotImplementedError: there is no such kernel here.
    """
    check(q, cache, tables, lengths, value_dim)
    faces = {"reference": reference.mla_decode}
    fault = kernel_fault(q, cache, value_dim)
    if not fault:
        faces |= {"hopper": hopper.mla_decode, "tpu": tpu.mla_decode}
    elif implementation in ("hopper", "tpu"):
        raise NotImplementedError(f"mla_decode has no {implementation!r} kernel for {fault}; use 'auto' or 'reference'")
    face = dispatch.choose("mla_decode", implementation, faces)
    return face(q, cache, tables, lengths, schedule, scale=float(scale), value_dim=value_dim)


def plan(lengths: Array, num_rows: int) -> Schedule:
    """Return the schedule of the Hopper kernels for `lengths` int32 [B].

    `num_rows` is heads x queries of a sequence.
    """
    check_lengths(lengths)
    return hopper.plan(lengths, num_rows)


def check(q: Array, cache: Array, tables: Array, lengths: Array, value_dim: int) -> None:
    """Refuse operands that do not fit each other.

    Raises:
        ValueError: with the shapes or dtypes.
    """
    for name, array, num_dims in (("q", q, 4), ("cache", cache, 3), ("tables", tables, 2)):
        check_array(name, array)
        if array.ndim != num_dims or 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}; it must have {num_dims} dims, none of them empty")
    check_lengths(lengths)
    if q.dtype not in DTYPES or cache.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and cache {cache.dtype}; both must be bfloat16, or both float32")
    if q.shape[3] != cache.shape[2] or not 0 < value_dim <= q.shape[3]:
        raise ValueError(
            f"q has {q.shape[3]} dims, an entry of the cache {cache.shape[2]} and a value {value_dim}: the first two"
            " must be equal, the last between 1 and these"
        )
    if q.shape[1] > MOST_QUERIES:
        raise ValueError(f"q has {q.shape[1]} queries a sequence; a decoding step takes 1 to {MOST_QUERIES}")
    if tables.dtype != jnp.int32 or not len(q) == len(tables) == len(lengths):
        raise ValueError(
            f"tables is {tables.dtype} {tables.shape} and lengths {lengths.shape}; for {len(q)} sequences they must be"
            " int32 with a row and a number for each"
        )
    most = tables.shape[1] * cache.shape[1]
    if not isinstance(lengths, Tracer | jax.ShapeDtypeStruct) and np.max(lengths) > most:
        raise ValueError(f"a sequence of {np.max(lengths)} tokens does not fit the {most} of its row in tables")


def check_lengths(lengths: Array) -> None:
    """Refuse lengths that are not int32 [B], or, where they are known, negative.

    Raises:
        ValueError: with shape, dtype or number.
    """
    check_array("lengths", lengths)
    if lengths.ndim != 1 or not len(lengths) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths is {lengths.dtype} {lengths.shape}; it must be int32 with one for each sequence")
    if not isinstance(lengths, Tracer | jax.ShapeDtypeStruct) and np.min(lengths) < 0:
        raise ValueError(f"lengths has {np.min(lengths)}; a sequence has 0 tokens or more")


def kernel_fault(q: Array, cache: Array, value_dim: int) -> str | None:
    """Return what the kernels are not made for, or None."""
    if q.dtype != jnp.bfloat16:
        return str(q.dtype)
    if (q.shape[3], value_dim) != (LATENT + ROTARY, LATENT):
        return f"entries of {q.shape[3]} dims with values of {value_dim}, only for {LATENT + ROTARY} and {LATENT}"
    if cache.shape[1] != PAGE:
        return f"pages of {cache.shape[1]} tokens, only for {PAGE}"
    return None
