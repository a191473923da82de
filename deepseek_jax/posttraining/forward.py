"""A forward pass without gradients over the rows of a mesh, of which a stage takes what it needs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.stored import stored_specs
from deepseek_jax.parallel.weights import gather, with_fp8
from deepseek_jax.parameters import ROWS, P, Weights
from deepseek_jax.training.objective import Batch
from pallas_kernels.lowering import manual_axes


def over_rows(
    model: Model,
    execution: Execution,
    forward: Callable[[Weights, Batch, Callable], Any],
    weights: Weights,
    batch: Batch,
) -> Any:
    """Return what `forward` returns on each device: arrays whose first dim is the rows, which they are split over.

    Args:
        model: of the weights.
        execution: resolved for the mesh.
        forward: gets a device's weights and rows, and what gathers a part of the weights.
        weights: whole.
        batch: whole.
    """

    def local(weights, batch):
        load = functools.partial(gather, dtype=compute_dtype(execution), num_experts=model.num_experts)
        weights = weights._replace(params=with_fp8(model, execution, weights.params))
        return jax.tree.map(_whole, forward(weights, batch, load))

    in_specs = stored_specs(weights), {name: P(ROWS) for name in batch}
    return jax.shard_map(local, in_specs=in_specs, out_specs=P(ROWS))(weights, batch)


def _whole(x: Array) -> Array:
    """Return it as it is on axes of size 1 (`scoring.refuse_mesh`)."""
    others = tuple(sorted(manual_axes.varies_over(x) - set(ROWS)))
    return lax.psum(x, others) if others else x
