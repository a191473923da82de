"""MLA decode on Hopper: which kernel takes how many rows of queries, the schedule, and the combine.

    rows (heads x queries)   kernel
    1 to 32                  `hopper_few.py`: operands swapped, queries are the columns of the products
    more                     `hopper_many.py`: blocks of 64 rows, two warpgroups share one output

Memory binds up to about 97 rows, the products beyond. A kernel runs one thread block per multiprocessor; blocks of the
same pages but other rows run side by side and meet in the L2 cache.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.mla_decode import hopper_combine, hopper_few, hopper_many
from pallas_kernels.mla_decode.hopper_fragments import Task
from pallas_kernels.mla_decode.schedule import Schedule, make_schedule

FEW = hopper_few.TuningConfig()
MANY = hopper_many.TuningConfig()


def plan(lengths: Array, num_rows: int, few=FEW, many=MANY) -> Schedule:
    """Return the schedule for `lengths` int32 [B] and `num_rows` = heads x queries of a sequence."""
    config = few if num_rows <= hopper_few.MOST_ROWS else many
    num_parts = max(1, num_multiprocessors() // config.num_blocks(num_rows))
    return make_schedule(lengths, num_parts, unit=config.unit, overhead=config.overhead)


def mla_decode(
    q: Array,
    cache: Array,
    tables: Array,
    lengths: Array,
    schedule: Schedule | None = None,
    *,
    scale: float,
    value_dim: int,
    few: hopper_few.TuningConfig = FEW,
    many: hopper_many.TuningConfig = MANY,
) -> tuple[Array, Array]:
    """Return outputs BF16 [B, S, N, value_dim] and FP32 log-sum-exp [B, S, N]."""
    batch, num_queries, num_heads, key_dim = q.shape
    num_rows = num_queries * num_heads
    if schedule is None:
        schedule = plan(lengths, num_rows, few, many)
    kernel, config = (hopper_few, few) if num_rows <= hopper_few.MOST_ROWS else (hopper_many, many)
    padded = config.padded_rows(num_rows)
    rows = q.reshape(batch, num_rows, key_dim)
    if padded > num_rows:
        rows = jnp.pad(rows, ((0, 0), (0, padded - num_rows), (0, 0)))
    task = Task(num_queries, num_heads, scale)
    out, lse, partial_out, partial_lse = kernel.attend(task, rows, cache, tables, schedule, config)
    out, lse = hopper_combine.combine(schedule, partial_out, partial_lse, out, lse)
    out, lse = (x[:, :num_rows] if padded > num_rows else x for x in (out, lse))
    return out.reshape(batch, num_queries, num_heads, value_dim), lse.reshape(batch, num_queries, num_heads)
