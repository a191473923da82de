"""What the MLA kernels on Hopper share: the rows of a task, the walk over a part's fragments, the end of a softmax."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

LOG2E = math.log2(math.e)
LOWEST = -1e30  # a maximum before there is one: finite, so that differences are


@dataclasses.dataclass(frozen=True)
class Task:
    """What a kernel must know of its rows: row r is head r % num_heads of query r // num_heads."""

    num_queries: int
    num_heads: int
    scale: float

    @property
    def scale_log2(self) -> float:
        """What scores are multiplied with, for powers of two."""
        return self.scale * LOG2E

    def seen(self, row: Array, length: Array) -> Array:
        """Return how many tokens of a sequence each of these rows sees."""
        query = sum((row >= i * self.num_heads).astype(jnp.int32) for i in range(1, self.num_queries))
        return query + (length - self.num_queries + 1)

    def results(self, batch: int, num_fragments: int, num_rows: int, dims: int) -> list[jax.ShapeDtypeStruct]:
        """Return the types of a kernel's results, outputs and log-sum-exp: of whole sequences, then of fragments."""
        return [
            jax.ShapeDtypeStruct((batch, num_rows, dims), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, num_rows), jnp.float32),
            jax.ShapeDtypeStruct((num_fragments, num_rows, dims), jnp.float32),
            jax.ShapeDtypeStruct((num_fragments, num_rows), jnp.float32),
        ]


class Fragment(NamedTuple):
    """A row of `Schedule.fragments`, with its number."""

    number: Array
    sequence: Array
    start: Array
    end: Array
    split: Array
    length: Array


def over_fragments(parts_ref: Any, fragments_ref: Any, part: Array, body: Callable, carry: Any) -> Any:
    """Fold `body(fragment, carry)` over the fragments of a part."""
    first, count, *fields = (parts_ref[part, i] for i in range(7))

    def one(i, carry):
        fields, carry = carry
        carry = body(Fragment(first + i, *fields), carry)
        following = jnp.minimum(first + i + 1, fragments_ref.shape[0] - 1)
        return tuple(fragments_ref[following, field] for field in range(5)), carry

    return lax.fori_loop(0, count, one, (tuple(fields), carry))[1]


def finish(sums: Array, largest: Array) -> tuple[Array, Array]:
    """Return what outputs are multiplied with, and the natural log-sum-exp; 0 and -inf where nothing was seen.

    Args:
        sums: of weights.
        largest: the maxima that were taken off the scores, for powers of two.
    """
    empty = sums == 0
    sums = jnp.where(empty, 1.0, sums)
    return jnp.where(empty, 0.0, 1 / sums), jnp.where(empty, -jnp.inf, (largest + jnp.log2(sums)) * (1 / LOG2E))
