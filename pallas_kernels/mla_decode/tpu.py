"""MLA decode on TPUs; speed on TPU is unmeasured.

A step of the grid is a sequence. Its pages lie anywhere in HBM, so the kernel copies them itself, some pages at a time
into one of two buffers: while one block of pages is multiplied, the next is on its way. The last block of a sequence
starts the first copies of the next sequence that has tokens, so only the first sequence waits for memory.

    lengths        [150, 0, 70], two pages a block
    first block    [  0, 2,  2]     blocks of all sequences before; block i of sequence b lies in buffer (first + i) % 2
    next sequence  [  2, 2,  3]     that has tokens; 3: there is none

A block gives scores, and the softmax goes on from block to block (Milakov and Gimelshein, arXiv 1805.02867): the
largest score, the sum under the softmax and the output are kept in FP32. Where a larger score comes, the last two are
scaled down. A sequence is not cut over several cores, and where a chip has two, one of them does all.

Only pages that hold tokens are copied. Rows behind the last token hold rubbish or what an earlier block left there:
they are zeroed once, in the last block, because a NaN times zero would be NaN.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul.tpu import TRANSPOSED
from pallas_kernels.tpu_tiles import VMEM_BYTES, Interpret

ROW_TILE = 16  # rows of BF16 in a register: rows of queries are filled up to a multiple


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How many pages are copied and multiplied at a time."""

    pages: int = 8


MLA_DECODE = TuningConfig()


def mla_decode(
    q: Array,
    cache: Array,
    tables: Array,
    lengths: Array,
    schedule: Any = None,
    *,
    scale: float,
    value_dim: int,
    config: TuningConfig = MLA_DECODE,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """Return outputs [B, S, N, value_dim] and FP32 log-sum-exp [B, S, N]; the schedule is not used."""
    batch, num_queries, heads, width = q.shape
    num_pages, page, _ = cache.shape
    rows = num_queries * heads
    padded = rows + -rows % ROW_TILE
    q = jnp.pad(q.reshape(batch, rows, width), ((0, 0), (0, padded - rows), (0, 0)))
    pages = min(config.pages, tables.shape[1])

    def block_of(dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, padded, dim), lambda b, *_: (b, 0, 0))

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(batch,),
        in_specs=[block_of(width), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=[block_of(value_dim), block_of(1)],
        scratch_shapes=[
            pltpu.VMEM((2, pages * page, width), cache.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((padded, 1), jnp.float32),
            pltpu.VMEM((padded, 1), jnp.float32),
            pltpu.VMEM((padded, value_dim), jnp.float32),
        ],
    )
    kernel = functools.partial(_kernel, pages=pages, page=page, scale=scale, heads=heads, num_queries=num_queries)
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((batch, padded, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, padded, 1), jnp.float32),
        ],
        # a step starts copies for the next one
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(jnp.clip(tables, 0, num_pages - 1), lengths, *_order(lengths, pages * page), q, cache)
    shape = batch, num_queries, heads
    return out[:, :rows].reshape(*shape, value_dim), lse[:, :rows, 0].reshape(shape)


def _order(lengths: Array, block: int) -> tuple[Array, Array]:
    """Return the number of blocks before each sequence, and the next sequence that has tokens, or B."""
    blocks = -(-lengths // block)
    number = jnp.where(lengths > 0, jnp.arange(len(lengths)), len(lengths))
    following = lax.cummin(number, reverse=True)
    return jnp.cumsum(blocks) - blocks, jnp.append(following[1:], len(lengths)).astype(jnp.int32)


def _kernel(
    tables, lengths, first, following, q, cache, out, lse, buffers, arrived, largest, total, acc,
    *, pages: int, page: int, scale: float, heads: int, num_queries: int,
):  # fmt: skip
    b = pl.program_id(0)
    length, tokens = lengths[b], pages * page
    num_blocks = _cdiv(length, tokens)

    def each_copy(sequence, i, act):
        """Start the copies of block i of a sequence, or wait for them."""
        slot = lax.rem(first[sequence] + i, 2)

        @pl.loop(0, jnp.minimum(pages, _cdiv(lengths[sequence], page) - i * pages))
        def _(j):
            target = buffers.at[slot, pl.ds(pl.multiple_of(j * page, page), page)]
            act(pltpu.make_async_copy(cache.at[tables[sequence, i * pages + j]], target, arrived.at[slot]))

    largest[...] = jnp.full_like(largest, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

    @pl.when((first[b] == 0) & (num_blocks > 0))
    def _nobody_started():
        each_copy(b, 0, lambda copy: copy.start())

    @pl.loop(0, num_blocks)
    def _(i):
        is_last = i == num_blocks - 1
        slot = lax.rem(first[b] + i, 2)

        @pl.when(~is_last)
        def _next_block():
            each_copy(b, i + 1, lambda copy: copy.start())

        @pl.when(is_last & (following[b] < pl.num_programs(0)))
        def _next_sequence():
            each_copy(following[b], 0, lambda copy: copy.start())

        each_copy(b, i, lambda copy: copy.wait())
        entries = buffers.at[slot]

        @pl.when(is_last)
        def _zero_the_rest():
            written = i * tokens + lax.broadcasted_iota(jnp.int32, entries.shape, 0) < length
            entries[...] = jnp.where(written, entries[...], jnp.zeros((), entries.dtype))

        scores = scale * lax.dot_general(q[...], entries[...], TRANSPOSED, preferred_element_type=jnp.float32)
        position = i * tokens + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        query = lax.div(lax.broadcasted_iota(jnp.int32, scores.shape, 0), heads)
        seen = jnp.minimum(length - num_queries + 1 + query, length)  # rows that fill up are queries, too
        scores = jnp.where(position < seen, scores, -jnp.inf)
        new = jnp.maximum(largest[...], scores.max(axis=1, keepdims=True))
        finite = jnp.where(new == -jnp.inf, 0.0, new)  # of a row that has seen nothing yet
        fading, weights = jnp.exp(largest[...] - finite), jnp.exp(scores - finite)
        largest[...] = new
        total[...] = fading * total[...] + weights.sum(axis=1, keepdims=True)
        values = entries[:, pl.ds(0, acc.shape[1])]
        acc[...] = fading * acc[...] + jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    divisor = jnp.where(total[...] == 0, 1.0, total[...])
    out[...] = (acc[...] / divisor).astype(out.dtype)  # 0 of a row that sees nothing
    lse[...] = jnp.where(total[...] == 0, -jnp.inf, jnp.log(divisor) + largest[...])


def _cdiv(x: Array, y: int) -> Array:
    """Return ceil(x / y) of numbers of tokens; `pl.cdiv` asks for signs, which takes more instructions."""
    return lax.div(x + y - 1, y)
