"""Products of groups in plain jnp: what the grouped kernels must compute, whatever the group sizes are.

The sizes are data of the device, so a program can neither slice a group out nor loop over its rows. Multiplying all
rows by every group's matrix and keeping one would cost groups times as much. Here each group is cut into blocks of 128
rows, and each block is gathered: at most ceil(rows / 128) + groups blocks whatever the sizes are, each with one matrix.
For groups of 1, 0 and 3 rows and blocks of two:

    row              0   1   2   3   4 (of no group)
    block            0   1   1   2
    blocks           group 0: rows [0, -]     group 2: rows [1, 2]     group 2: rows [3, -]
                     "-" and later blocks: no row

A row of no group is in no block: it is never read, so what it holds (NaN included) can't leak, and never written, so it
stays zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP
from pallas_kernels.lowering import manual_axes
from pallas_kernels.matmul import reference as matmul_reference
from pallas_kernels.quantized import Quantized

BLOCK = 128  # rows


def grouped_matmul(
    a: Quantized, b: Quantized, group_sizes: Array, *, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Array:
    """Return a_g b_g^T [rows, n] for the rows of each group g; `a` tile [rows, k], `b` block [G, n, k]."""

    def multiply(group: Array, rows: Array) -> Array:
        a_block = Quantized(take(a.values, rows), take(a.scales.T, rows).T, "tile")
        b_group = Quantized(b.values[group], b.scales[group], "block")
        return matmul_reference.matmul(a_block, b_group, out_dtype=out_dtype)

    return _map_blocks(multiply, group_sizes, a.shape[0])


def masked_matmul(
    a: Quantized, b: Quantized, valid_rows: Array, *, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Array:
    """Return a_e b_e^T [E, r, n] for the first `valid_rows[e]` rows; `a` tile [E, r, k], `b` block [E, n, k].

    The other rows are unspecified. Here they are NaN, so that a test sees whoever reads them.
    """
    product = jax.vmap(lambda a, b: matmul_reference.matmul(a, b, out_dtype=out_dtype))(a, b)
    valid = jnp.arange(a.shape[1]) < valid_rows[:, None]
    return jnp.where(valid[:, :, None], product, jnp.nan)


def grouped_matmul_accumulate(a: Quantized, b: Quantized, group_sizes: Array, c: Array | None = None) -> Array:
    """Return c[g] + a_g b_g^T, FP32 [G, m, n], over the columns of group g of `a` and `b`.

    `a` is tile [m, K] and `b` tile [n, K]; group g has `group_sizes[g]` columns.

    No `c` is zero. A group is a multiple of 128 columns, so each segment belongs to one group, or to none: then its
    index is G, and the sum is dropped.
    """
    num_segments = a.shape[1] // GROUP
    group = jnp.searchsorted(jnp.cumsum(group_sizes), GROUP * jnp.arange(num_segments), side="right")

    def add_segment(c: Array, segment: tuple[Array, ...]) -> tuple[Array, None]:
        group, *operands = segment
        return c.at[group].add(matmul_reference.segment_product(*operands), mode="drop"), None

    a_segments, b_segments = (matmul_reference.split_segments(x.values) for x in (a, b))
    a_scales, b_scales = (x.scales[:, : x.shape[0]] for x in (a, b))
    c = _zeros(group_sizes, a.shape[0], b.shape[0], like=(a, b)) if c is None else c
    return jax.lax.scan(add_segment, c, (group, a_segments, b_segments, a_scales, b_scales))[0]


def grouped_matmul_bf16(
    a: Array, b: Array, group_sizes: Array, *, transpose_b: bool = False, out_dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Array:
    """Return a_g b_g^T [rows, n] for the rows of each group, in BF16.

    `a` is [rows, k], `b` [G, n, k], or [G, k, n] with `transpose_b`.
    """
    b_GKN = b if transpose_b else b.swapaxes(1, 2)

    def multiply(group: Array, rows: Array) -> Array:
        return _product_of_bf16(take(a, rows), b_GKN[group]).astype(out_dtype)

    return _map_blocks(multiply, group_sizes, a.shape[0])


def grouped_matmul_accumulate_bf16(a: Array, b: Array, group_sizes: Array, c: Array | None = None) -> Array:
    """Return c[g] + a_g^T b_g, FP32 [G, m, n], over the rows of each group of BF16 `a` [K, m] and `b` [K, n].

    Without a `c` it begins at zero.
    """

    def add_block(c: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        group, rows = block
        return c.at[group].add(_product_of_bf16(take(a, rows).T, take(b, rows)), mode="drop"), None

    c = _zeros(group_sizes, a.shape[1], b.shape[1], like=(a, b)) if c is None else c
    return jax.lax.scan(add_block, c, _blocks(group_sizes, a.shape[0]))[0]


def _zeros(group_sizes: Array, m: int, n: int, like: Any) -> Array:
    """FP32 [G, m, n] that varies over the mesh axes that the operands vary over, as the carry of a loop must."""
    return manual_axes.vary(
        jnp.zeros((group_sizes.shape[0], m, n), jnp.float32), manual_axes.varies_over((group_sizes, like))
    )


def _blocks(group_sizes: Array, num_rows: int) -> tuple[Array, Array]:
    """Return each block's group [blocks] and its rows [blocks, BLOCK].

    Past its group's end a row is `num_rows`; past all groups, the group is G.
    """
    num_groups = group_sizes.shape[0]
    ends, blocks = jnp.cumsum(group_sizes), jnp.cumsum(-(-group_sizes // BLOCK))
    block = jnp.arange(-(-num_rows // BLOCK) + num_groups)
    group = jnp.searchsorted(blocks, block, side="right")
    first_block = jnp.concatenate([jnp.zeros(1, blocks.dtype), blocks])[group]
    first_row = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[group] + BLOCK * (block - first_block)
    rows = first_row[:, None] + jnp.arange(BLOCK)
    inside = (group[:, None] < num_groups) & (rows < ends[group][:, None])
    return group, jnp.where(inside, rows, num_rows)


def _map_blocks(multiply: Callable[[Array, Array], Array], group_sizes: Array, num_rows: int) -> Array:
    """Put multiply(group, rows) [BLOCK, n] of every block in its rows of [num_rows, n]; the others are zero."""
    groups, rows = _blocks(group_sizes, num_rows)
    products = jax.lax.map(lambda block: multiply(*block), (groups, rows))
    *_, n = products.shape
    return jnp.zeros((num_rows, n), products.dtype).at[rows.reshape(-1)].set(products.reshape(-1, n), mode="drop")


def take(x: Array, rows: Array) -> Array:
    """Return x[rows], with zeros for rows that `x` does not have."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _product_of_bf16(a: Array, b: Array) -> Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
