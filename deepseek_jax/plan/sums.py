"""What a step does with weights beside multiplying them: bytes of memory that each micro-batch reads and writes again.

    gradients   a micro-batch makes FP32 gradients of all weights of a device, which are added to the sum: sum and
                gradient read, sum written. Where products add to the sum themselves they read it, and no more
                (`parallel.gradient_sums`: its predicates are asked here). Those of stacked layers, of the embedding and
                of the head are written over zeros. The sum of several micro-batches, or of a pipeline, begins with
                zeros; sums of layers that lie apart are put into their stacks at the end: read and written
    casts       BF16 copies are made of FP32 weights: once a step with `execution.gather` = "step", else by each pass of
                a micro-batch over a layer. FP8 copies are made once a step (`parallel.weights`)

What the product itself writes is part of the product. With few tokens in a micro-batch this is a large part of a step:
a parameter costs 16 bytes a micro-batch, whatever its tokens, or 4 if its product adds.
"""

from typing import Any, NamedTuple

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel.gradient_sums import LAYERS, lends, takes_sum, unrolled
from deepseek_jax.plan.counts import gradient_parts, micro_batches_of

ZEROS, ADDED, LENT, STACKED = 1, 3, 1, 2  # times that the FP32 bytes of gradients pass through memory


class Gradients(NamedTuple):
    """FP32 bytes of the gradients of a micro-batch on a device, or of a part of them.

    Attributes:
        lent: to whose sums products add.
        apart: of layers that lie apart, but for these.
        filled: the others, which are written over zeros.
    """

    lent: float = 0.0
    apart: float = 0.0
    filled: float = 0.0

    @property
    def each(self) -> float:
        """Return the bytes that each micro-batch moves beside its products."""
        return LENT * self.lent + ADDED * self.apart + (ZEROS + ADDED) * self.filled

    @property
    def once(self) -> float:
        """Return the bytes that a step of several micro-batches, or of a pipeline, moves beside theirs."""
        return ZEROS * sum(self) + STACKED * (self.lent + self.apart)

    def times(self, number: float) -> "Gradients":
        """Return those of so many such parts."""
        return Gradients(*(number * size for size in self))


def gradients_of(config: Config, state: Any, mesh: jax.sharding.AbstractMesh, pipe: bool) -> dict[str, Gradients]:
    """Return by the first name of a parameter the gradients that a device of `mesh`, which has no pipeline, makes.

    Args:
        config: that says where they lie, and what its products add to.
        state: abstract state (`counts.state_of`).
        mesh: of the devices of one place in a pipeline, if there is one.
        pipe: whether there is one: all layers lie apart there. Else those that are not scanned, of sums that are lent.
    """
    lent = lends(config.execution, pipe or micro_batches_of(config) > 1)
    most = config.execution.scan_unroll if lent else 0
    names = {name for name in LAYERS if name in state["params"]} if pipe else unrolled(state["params"], most)
    found: dict[str, Gradients] = {}
    for path, size in gradient_parts(config, state, mesh):
        top = str(path[0].key)
        kind = "filled" if top not in names else "lent" if lent and takes_sum(path) else "apart"
        before = found.get(top, Gradients())
        found[top] = before._replace(**{kind: getattr(before, kind) + size})
    return found


def gradient_traffic(gradients: dict[str, Gradients], micro_batches: int) -> float:
    """Return the bytes of a step without a pipeline, of a device with such gradients."""
    whole = Gradients(*map(sum, zip(*gradients.values(), strict=True)))
    if micro_batches == 1:
        return ZEROS * sum(whole)
    return whole.once + micro_batches * whole.each


def cast_traffic(config: Config, stored: float, passes: int) -> float:
    """Return the bytes that `passes` casts move of weights of which a device stores so many FP32 bytes."""
    element = {"fp8": 1, "bf16": 2}.get(config.execution.precision)
    return 0.0 if element is None else passes * stored * (4 + element) / 4


def casts_once(config: Config) -> bool:
    """Return whether weights are cast once a step, not by each pass over a layer."""
    return config.execution.precision == "fp8" or config.execution.gather == "step"
