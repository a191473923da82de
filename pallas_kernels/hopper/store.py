"""How the sums of a warpgroup leave a product on Hopper: rounded, through shared memory, some pieces at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.ring import SWIZZLE_BYTES, WARPGROUPS, swizzled
from pallas_kernels.hopper.wgmma import ROWS


def staging(out_slots: int, dtype: Any) -> plgpu.SMEM:
    """Where pieces wait for their way out."""
    return swizzled((WARPGROUPS, out_slots, ROWS, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize), dtype)


def store_sums(
    totals: Mapping[tuple[int, int], Array],
    out_slots: Any,
    columns_left: Any,
    send: Callable[[Any, int, int], None],
    batch: int = 1,
) -> None:
    """Send the sums of a warpgroup out through shared memory, some pieces at a time.

    Args:
        totals: by their first row and column within what the warpgroup computes, FP32 [64, columns].
        out_slots: ref [slots, 64, width].
        columns_left: number of columns from the warpgroup's first one to the end; pieces beyond are dropped.
        send: ref [64, width], its first row and column -> starts copies, uncommitted.
        batch: number of pieces that are sent together.
    """
    num_slots, _, width = out_slots.shape
    cut = []
    for (down, right), total in totals.items():
        # Rounded here and now: sums that live on through branches cost the assembler the pipeline of products, and it
        # spills.
        rounded = [
            lax.optimization_barrier(total[:, x : x + width].astype(out_slots.dtype))
            for x in range(0, total.shape[1], width)
        ]
        cut += [(down, right + j * width, piece) for j, piece in enumerate(rounded)]
    for first in range(0, len(cut), batch):
        sent = cut[first : first + batch]

        @pl.when(sent[0][1] < columns_left)
        def _(first=first, sent=sent):
            # A total's first pieces wait for all: how many of the one before were dropped, only the run knows.
            plgpu.wait_smem_to_gmem(num_slots // batch - 1 if first % len(rounded) else 0, wait_read_only=True)
            refs = [out_slots.at[(first + j) % num_slots] for j in range(len(sent))]
            for ref, (*_, piece) in zip(refs, sent, strict=True):
                ref[...] = piece
            plgpu.commit_smem()
            for ref, (down, right, _) in zip(refs, sent, strict=True):
                send(ref, down, right)
            plgpu.commit_smem_to_gmem_group()


def store_rows(ref: Any, out: Any, first: Array, start: Array, end: Array, columns: Any) -> None:
    """Copy the rows of `ref` [64, n] that lie from `start` to `end` to the columns of `out`.

    Row 0 of `ref` is row `first` of `out`.
    """
    skip = jnp.clip(start - first, 0, ROWS)
    count = jnp.clip(end - first, 0, ROWS) - skip
    size = ROWS
    while size:  # a rectangle of each size that the binary form of the count has
        part = (count & size) != 0

        @pl.when(part)
        def _(skip=skip, size=size):
            plgpu.copy_smem_to_gmem(
                ref.at[pl.ds(skip, size)], out.at[pl.ds(first + skip, size), columns], commit_group=False
            )

        skip += jnp.where(part, size, 0)
        size //= 2


def padded_columns(n: int, dtype: Any) -> int:
    """Return n rounded up to whole swizzled lines, of which the copy engine wants a multiple."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return n if n < columns else -(-n // columns) * columns
