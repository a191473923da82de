"""The micro-batches of a step: how a batch is cut into them, and how what they give is summed.

The sum begins with zeros. With the first micro-batch outside the loop, as the start of the sum, a program has forward
and backward pass twice: V3's step for 512 chips was 48,420 instructions in place of 31,271, and took twice as long to
compile (experiments/log.md). Zeros cost 16 bytes of memory traffic a parameter and step: 4 to write them, 12 to add; 12
where a product adds to the sum itself.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from deepseek_jax.parallel.gradient_sums import added
from deepseek_jax.parameters import ROWS
from deepseek_jax.training.objective import Batch


def split(batch: Batch, micro_batch_size: int) -> Batch:
    """Cut this device's [rows, S] into [micro-batches, rows, S]. Runs inside the step's `shard_map`.

    Raises:
        ValueError: the rows of all devices are no multiple of `micro_batch_size`.
    """
    devices = lax.psum(1, ROWS)
    rows = batch["tokens_BS"].shape[0]
    count, left = divmod(rows * devices, micro_batch_size)
    if left or not count:
        raise ValueError(
            f"a batch of {rows * devices} sequences is no multiple of training.micro_batch_size = {micro_batch_size};"
            " change training.batch_size or training.micro_batch_size"
        )
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def sum_over(of: Callable[[Batch, Any], Any], micro_batches: Batch) -> Any:
    """Return the sum over the micro-batches of what `of` returns for each: a tree of arrays.

    `of` also takes the sum so far, or None if there is one micro-batch. What it has added to that itself is a
    `GradientSum` (`parallel.gradient_sums`).
    """
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if micro_batches["tokens_BS"].shape[0] == 1:
        return of(first, None)
    shapes = jax.eval_shape(of, first, None)
    zeros = jax.tree.map(lambda like: lax.full_like(like, 0), shapes)  # vary over the same axes
    return lax.scan(lambda total, one: (jax.tree.map(added, total, of(one, total)), None), zeros, micro_batches)[0]
