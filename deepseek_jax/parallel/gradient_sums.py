"""Sums of gradients over micro-batches, to which the experts' products add on their way out.

A step of M micro-batches makes the gradient of each weight M times. Written by a product and then added to the sum by
another operation, a number moves four times: the gradient is written and read, the sum is read and written, and that
is 16 bytes a parameter and micro-batch. A product that adds to the sum itself moves it twice, 8 bytes. Experts are
nearly all parameters and get few rows each, so there the difference is the most (experiments/log.md).

    apart       dw = x^T dy          sum = sum + dw
    lent        sum = sum + x^T dy

A derivative can express it: what is differentiated of a weight is its carrier, whose numbers no product reads. So the
sum is lent as the carrier, and its cotangent is the new sum. `GradientSum` marks both, so that nobody takes one for the
other, and `added` puts the new sum in place of the old one:

    params = lend(params, numbers, sums)                      carriers of experts -> GradientSum(sum so far)
    grads = jax.grad(loss)(params)                            arrays, and GradientSum(sum so far + gradient)
    sums = jax.tree.map(added, sums, grads)                   sum + gradient, or the new sum

Four conditions. A layer must be an array of its own, in a list (`apart`): adding to a slice of a stack takes a copy out
of it and one back, 16 bytes. The gradient must lie as the product makes it: weights are gathered once a step, or a
reduce-scatter came between. A weight must be used once between `lend` and `added`, or the sum of two cotangents would
have the old sum twice. And a weight must have a carrier: in FP32 it has none. `lends` and `takes_sum` say so for steps
and for plans (`plan.sums`).

The result is one FP32 addition of the sum and the finished product, as if it were done apart, but for subnormal
numbers, which a GPU's copy engine takes for zero. Without kernels (`model.experts_blocks`) the blocks of an expert are
added to the sum one after the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Execution
from deepseek_jax.parallel.stages import STACKS
from deepseek_jax.parameters import PARAMETERS, leaf_name

LAYERS = (*STACKS, "mtp_layers")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSum:
    """A sum of gradients in place of a weight's carrier; its cotangent is the sum with this gradient in it.

    Attributes:
        total: FP32, of the weight's shape.
    """

    total: jax.Array


def lends(execution: Execution, begins: bool, adapters: bool = False) -> bool:
    """Return whether a step lends its sums to products: to those that `takes_sum`, in layers that lie apart.

    Args:
        execution: of the step.
        begins: whether there is a sum before a gradient is made: several micro-batches, or a pipeline.
        adapters: whether they are what is trained.
    """
    once = execution.gather == "step" and execution.interleave == 1
    return begins and once and not adapters and execution.precision != "fp32"


def takes_sum(path: Any) -> bool:
    """Return whether the gradient of the parameter at a path of a tree is made by products that add to a sum."""
    return PARAMETERS[leaf_name(path)].per_expert


def unrolled(params: Any, most: int) -> dict[str, int]:
    """Return how many layers the stacks with at most `most` of them have: without a pipeline these lie apart."""
    counts = {name: len(jax.tree.leaves(params[name])[0]) for name in LAYERS if name in params}
    return {name: count for name, count in counts.items() if count <= most}


def apart(tree: Any, counts: dict[str, int]) -> Any:
    """Return stacks [layers, ...] of so many layers as lists of layers, the others as they are."""
    return {
        name: [jax.tree.map(lambda a, i=i: a[i], part) for i in range(counts[name])] if name in counts else part
        for name, part in tree.items()
    }


def together(tree: Any) -> Any:
    """Undo `apart`."""
    return {
        name: jax.tree.map(lambda *layers: jnp.stack(layers), *part) if isinstance(part, list) else part
        for name, part in tree.items()
    }


def lend(params: Any, numbers: Any, sums: Any) -> Any:
    """Return what is differentiated, with the sums so far as the carriers of routed experts.

    Args:
        params, numbers: as `parallel.weights.detach` returns them, of weights that are gathered once a step. Layers in
            stacks get no sums.
        sums: of gradients so far, a tree as `params`.
    """

    def lend_leaf(path, w, number, total):
        is_apart = any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
        has_carrier = number is not None
        return GradientSum(total) if is_apart and has_carrier and takes_sum(path) else w

    return jax.tree_util.tree_map_with_path(lend_leaf, params, numbers, sums)


def added(total: jax.Array, gradient: jax.Array | GradientSum) -> jax.Array:
    """Return the sum after a gradient, which may be in the new sum already."""
    return gradient.total if isinstance(gradient, GradientSum) else total + gradient
