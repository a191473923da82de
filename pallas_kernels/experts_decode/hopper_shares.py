"""Equal shares of work on Hopper, where one unit of it may end in another multiprocessor than it began.

A unit is a visit and some columns, over all steps along k. With 9 visits there are 144 of them in BF16, for 132
multiprocessors: twelve would work twice as long as the others. So the steps of all units are cut into equal shares, and
a multiprocessor takes those of one share, in order:

    the tail of a unit that began in an earlier share    its sums go to memory, with a mark that they are there
    whole units                                          as ever
    the head of a unit                                   behind it wait for the marks of its other parts, and add them

Tails come first in their shares and heads last, so that nearly nobody waits. The last share is that of the first block,
because a block should wait only for those that start before it (`pallas_kernels/hopper/marks.py`).

Worked example, 3 units of 4 steps in 2 shares: steps 0 to 5 and 6 to 11. The second share begins with the tail of unit
1, writes its sums and marks them; the first one ends with the head of unit 1 and adds them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.marks import set_mark, wait_for_marks

LEAST_STEPS = 4  # of a share


@dataclasses.dataclass(frozen=True)
class Shares:
    """The share of this block.

    Attributes:
        units: of all blocks.
        steps: of a unit.
        sums: ref FP32 [blocks, tiles, 64, N], of tails.
        marks: ref int32 [.], 1 where the sums of a share are there.
        interpreted: whether blocks run one after the other, without marks.
    """

    units: Any
    steps: int
    sums: Any
    marks: Any
    interpreted: bool

    @property
    def all_steps(self) -> Array:
        """Steps of all units."""
        return self.units * jnp.int32(self.steps)

    @property
    def count(self) -> Array:
        """How many shares there are: no more than blocks, and none too small."""
        most = jnp.maximum(lax.div(self.all_steps, jnp.int32(LEAST_STEPS)), 1)
        return jnp.minimum(most, jnp.int32(lax.axis_size("sm")))

    @property
    def own(self) -> Array:
        """The number of this block's share; there may be no such share."""
        return jnp.int32(lax.axis_size("sm") - 1) - lax.axis_index("sm")

    def start(self, share: Array) -> Array:
        """Return the first step of a share."""
        return lax.div(share * self.all_steps, self.count)

    def over(self, body: Callable[[Array, Array, Array, Any], Any], carry: Any) -> Any:
        """Fold `body(unit, first step, last step + 1, carry)` over the units of this block's share."""
        own, steps = jnp.minimum(self.own, self.count), self.steps
        start, end = self.start(own), self.start(jnp.minimum(own + 1, self.count))

        def one(unit, carry):
            return body(unit, jnp.maximum(start - unit * steps, 0), jnp.minimum(end - unit * steps, steps), carry)

        empty = start == end
        first = jnp.where(empty, 0, lax.div(start, jnp.int32(steps)))
        last = jnp.where(empty, 0, lax.div(end + steps - 1, jnp.int32(steps)))
        return lax.fori_loop(first, last, one, carry)

    def leave(self, sums: list[Array]) -> None:
        """Write the sums of a tail and mark them."""
        for i, value in enumerate(sums):
            self.sums.at[self.own, i][...] = value
        if not self.interpreted:
            set_mark(self.marks.at[pl.ds(self.own, 1)])

    def collect(self, unit: Array, sums: list[Array]) -> list[Array]:
        """Return the sums of a unit's head with those of its other parts, in order."""
        end = (unit + 1) * self.steps
        behind = lax.div(end * self.count + self.all_steps - 1, self.all_steps)  # the first share that begins there

        def add_part(share, sums):
            if not self.interpreted:
                wait_for_marks(self.marks.at[pl.ds(share, 1)])
            layout = plgpu.Layout.WGMMA
            parts = [plgpu.load(self.sums.at[share, i], layout=layout, optimized=False) for i in range(len(sums))]
            return [value + part for value, part in zip(sums, parts, strict=True)]

        return lax.fori_loop(self.own + 1, behind, add_part, sums)
