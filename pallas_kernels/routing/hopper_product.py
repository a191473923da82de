"""The router's product on Hopper, cut along its sum: logits [T, E] = h W, in as many parts as there are cuts.

W has three BF16 parts of 2 D E bytes: 0.8 MB in configs/v3_5b.py, 11 MB in V3. One multiprocessor reads some 40 GB/s,
so that a single one would take 20 us and more. A block takes 64 experts and a cut of D, one step of 64 or a few, with
all three parts of the weights. It asks for all its bytes at once, waits once, and multiplies. Weights are the left
operand, with 64 experts as wgmma's rows, and tokens its columns: nothing is padded to 64.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.ring import tiled

UNTYPED: Any = plgpu  # the type checker does not see all that it exports
PARTS, TILE = 3, 64  # of the weights; experts of a block and numbers along D of a step, 128 bytes
MOST_CUTS = 32  # which the choice adds up
MOST_ROWS = 128  # of a block: what its shared memory holds


def steps_of_cut(width: int, num_routed: int) -> int:
    """Return the fewest steps of a cut, so that the blocks run at once and the cuts are not too many."""
    steps = width // TILE
    most = min(MOST_CUTS, max(1, num_multiprocessors() // (num_routed // TILE)))
    return next(each for each in range(1, steps + 1) if steps % each == 0 and steps // each <= most)


@dataclasses.dataclass(frozen=True)
class Product:
    """The static facts of the product, whose blocks are numbered by rows, then by cuts.

    Attributes:
        n: rows, a multiple of 8; more than 128 are a multiple of 128, and each 128 have blocks of their own.
        width: D, a multiple of 64.
        num_routed: E, a multiple of 64.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    n: int
    width: int
    num_routed: int
    interpreted: bool

    @property
    def steps(self) -> int:
        """Steps of a cut."""
        return steps_of_cut(self.width, self.num_routed)

    @property
    def cuts(self) -> int:
        """How many there are."""
        return self.width // (TILE * self.steps)

    @property
    def tiles(self) -> int:
        """Tiles of experts."""
        return self.num_routed // TILE

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return min(self.n, MOST_ROWS)

    @property
    def parts(self) -> int:
        """Blocks that have the same rows."""
        return self.cuts * self.tiles

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.n // self.rows * self.parts

    def first_mark(self, row: Array) -> Array:
        """Return the first of the blocks that have a row; theirs are `parts`."""
        return lax.div(row, jnp.int32(self.rows)) * self.parts

    def scratch(self) -> list:
        """Return the slots of a block and their barrier."""
        return [
            tiled((self.steps, self.rows, TILE), jnp.bfloat16),
            tiled((self.steps, PARTS, TILE, TILE), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=(PARTS + 1) * self.steps),
        ]

    def leave_part(self, block: Array, h_ref, router_ref, out_ref, h_slots, slots, full) -> None:
        """Write a block's part of the logits to FP32 [cuts, N, .]."""
        part = lax.rem(block, jnp.int32(self.parts))
        cut, column = lax.div(part, jnp.int32(self.tiles)), lax.rem(part, jnp.int32(self.tiles)) * TILE
        rows = pl.ds(lax.div(block, jnp.int32(self.parts)) * self.rows, self.rows)
        for step in range(self.steps):
            k = (cut * self.steps + step) * TILE
            for i in range(PARTS):
                weights = router_ref.at[pl.ds(i * self.width + k, TILE), pl.ds(column, TILE)]
                plgpu.copy_gmem_to_smem(weights, slots.at[step, i], full)
            plgpu.copy_gmem_to_smem(h_ref.at[rows, pl.ds(k, TILE)], h_slots.at[step], full)
        plgpu.barrier_wait(full)
        logits = dots(h_slots, slots) if self.interpreted else products(h_slots, slots)
        target = out_ref.at[cut, rows, pl.ds(column, TILE)].transpose((1, 0))
        target[...] = plgpu.layout_cast(logits, plgpu.Layout.WGMMA_TRANSPOSED)


def products(h_slots, slots) -> Array:
    """Return FP32 [64, N], the sum over all slots."""

    def run(sums):
        for step in range(slots.shape[0]):
            for part in range(PARTS):
                plgpu.wgmma(sums, slots.at[step, part].transpose((1, 0)), h_slots.at[step].transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(run, UNTYPED.ACC((TILE, h_slots.shape[1]), jnp.float32))


def dots(h_slots, slots) -> Array:
    """Return the same where wgmma is not known."""
    made = [
        jnp.dot(slots[step, part].astype(jnp.float32).T, h_slots[step].astype(jnp.float32).T)
        for step in range(slots.shape[0])
        for part in range(PARTS)
    ]
    return sum(made[1:], made[0])
