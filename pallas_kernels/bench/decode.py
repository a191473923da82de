"""Time MLA decode on one Hopper GPU: `python -m pallas_kernels.bench.decode [--json=results.json]`.

A row is a number of heads and queries, a batch and a context. Before every launch 256 MiB are read, so that pages
come from memory and not from the L2 cache, as in a model whose layers have caches of their own. (Written, they would
leave the L2 cache while the kernel reads, and cost it 11 us.) The time is that
of the attention kernel and the combine, by CUPTI, the median of 15; the schedule is made once a step and not timed.

Beside it stand the card's own limits, measured in the same run: reading 4 GiB, and a BF16 product of 8192^3. `floor` is
the larger of the bytes over the one and of the operations over the other. `x FlashMLA` compares with FlashMLA's time on
an H200, scaled by what binds it: above 1 is faster.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import mla_decode
from pallas_kernels.bench import records
from pallas_kernels.bench.__main__ import take_gpu
from pallas_kernels.bench.operation import relative_error
from pallas_kernels.mla_decode.schedule import PAGE

KEY, VALUE = mla_decode.LATENT + mla_decode.ROTARY, mla_decode.LATENT
FLUSH_WORDS = 2**26  # of 4 bytes, more than four times the L2 cache
READ_WORDS, PRODUCT = 2**30, 8192
REFERENCE_TOKENS = 2**17  # of a batch, up to which the reference is computed
TABLE_PAGES = 768  # of every row, so that a batch has one program for all contexts
RIDGE_ROWS = 97  # from here on the products bind
ROUNDS, LAUNCHES = 3, 5
SCALE = 192**-0.5  # of DeepSeek-V3's heads, without YaRN
# microseconds of a whole call of FlashMLA on an H200 that reads 4,502 GB/s and multiplies 780 TFLOP/s in BF16, by heads
# and queries: batch 128, 16 and 1, contexts of 1K, 4K and 32K
FLASH_MLA_READ, FLASH_MLA_PRODUCT = 4502e9, 780e12
CONTEXTS = 1024, 4096, 32768
FLASH_MLA = {
    (128, 1): {128: (72, 234, 1754), 16: (25, 48, 232), 1: (14, 21, 44)},
    (128, 2): {128: (132, 439, 3381), 16: (35, 70, 417), 1: (16, 22, 61)},
    (64, 1): {128: (49, 154, 1194), 16: (24, 40, 168), 1: (15, 27, 52)},
    (16, 1): {128: (48, 151, 1118), 16: (19, 34, 154), 1: (12, 24, 48)},
    (16, 2): {128: (48, 151, 1161), 16: (20, 34, 157), 1: (13, 25, 50)},
}
RAGGED = (4641, 45118, 1730, 1696)  # ThunderMLA's, with 4 queries of 16 heads


class Shape(NamedTuple):
    """One call: queries of some heads, and the lengths of its sequences."""

    heads: int
    queries: int
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of queries of a sequence."""
        return self.heads * self.queries

    @property
    def flops(self) -> int:
        """Of both products over all tokens."""
        return 2 * self.rows * (KEY + VALUE) * sum(self.lengths)

    @property
    def bytes(self) -> int:
        """Of cache entries, queries and outputs."""
        return 2 * KEY * sum(self.lengths) + 2 * len(self.lengths) * self.rows * (KEY + VALUE)

    def describe(self) -> dict[str, Any]:
        """Return the shape for a record."""
        equal = len(set(self.lengths)) == 1
        context = self.lengths[0] if equal else list(self.lengths)
        return {"heads": self.heads, "queries": self.queries, "batch": len(self.lengths), "context": context}


def operands(shape: Shape, pool: jax.Array, seed: int) -> tuple:
    """Return q, cache, tables, lengths and schedule; pages are drawn from the pool without order."""
    pages = [-(-length // PAGE) for length in shape.lengths]
    order = np.random.default_rng(seed).permutation(len(pool))[: sum(pages)].astype(np.int32)
    tables = np.zeros((len(pages), TABLE_PAGES), np.int32)
    for row, own in zip(tables, np.split(order, np.cumsum(pages)[:-1]), strict=True):
        row[: len(own)] = own
    q = jax.random.normal(jax.random.key(seed), (len(pages), shape.queries, shape.heads, KEY), jnp.bfloat16)
    lengths = jnp.asarray(shape.lengths, jnp.int32)
    return q, pool, jnp.asarray(tables), lengths, jax.jit(mla_decode.plan, static_argnums=1)(lengths, shape.rows)


def attend(*arrays: Any, implementation: str = "hopper") -> Any:
    """Return the public function's result on `operands`."""
    return mla_decode.mla_decode(*arrays, scale=SCALE, implementation=implementation)


def reference(q: jax.Array, cache: jax.Array, tables: jax.Array, *rest: Any) -> Any:
    """Return the result of plain XLA, which reads whole rows of tables."""
    tables = tables[:, : -(-int(rest[0].max()) // PAGE)]
    return jax.jit(functools.partial(attend, implementation="reference"))(q, cache, tables, *rest)


@jax.jit
def cold(flush: jax.Array, *arrays: Any) -> Any:
    """Return the largest of `flush`, read through the L2 cache, and the result."""
    return flush.max(), attend(*arrays)


def microseconds(function: Callable, arrays: tuple, only: str = "") -> float:
    """Return the median time of the kernels whose names contain `only`."""
    times = []
    for _ in range(ROUNDS):
        measured: Any = profiler.measure(function, aggregate=False, iterations=LAUNCHES)(*arrays)
        times += [sum(time for name, time in launch if only in name) for launch in measured[1]]
    return 1e3 * statistics.median(times)


def limits() -> tuple[float, float]:
    """Return the bytes per second that this card reads, and its BF16 operations per second."""
    words = jax.random.bits(jax.random.key(0), (READ_WORDS,), jnp.uint32)
    read = 1e6 * 4 * READ_WORDS / microseconds(jax.jit(lambda x: x.max()), (words,))
    a, b = (jax.random.normal(jax.random.key(i), (PRODUCT, PRODUCT), jnp.bfloat16) for i in range(2))
    return read, 1e6 * 2 * PRODUCT**3 / microseconds(jax.jit(lambda a, b: a @ b.T), (a, b))


def shapes(rows: Iterable[tuple[int, int]], batches: Iterable[int], contexts: Iterable[int]) -> list[Shape]:
    """Return the shapes to time, the ragged one and its equal beside it."""
    grid = [Shape(*row, (context,) * batch) for row in rows for batch in batches for context in contexts]
    mean = sum(RAGGED) // len(RAGGED)
    return [*grid, *(Shape(16, queries, lengths) for queries in (1, 4) for lengths in (RAGGED, (mean,) * 4))]


def flash_mla(shape: Shape, read: float, product: float) -> float | None:
    """Return FlashMLA's microseconds, as if it had been measured on a card of these limits; None if it was not."""
    times = FLASH_MLA.get((shape.heads, shape.queries), {}).get(len(shape.lengths))
    if times is None or shape.lengths[0] not in CONTEXTS:
        return None
    scale = FLASH_MLA_READ / read if shape.rows < RIDGE_ROWS else FLASH_MLA_PRODUCT / product
    return times[CONTEXTS.index(shape.lengths[0])] * scale


def measure(shape: Shape, pool: jax.Array, flush: jax.Array, read: float, product: float) -> list[dict[str, Any]]:
    """Return the records of a shape, and print its row."""
    arrays = operands(shape, pool, seed=len(shape.lengths))
    _, result = jax.block_until_ready(cold(flush, *arrays))
    error = None
    if sum(shape.lengths) <= REFERENCE_TOKENS:
        error = relative_error(result, reference(*arrays))
    time = microseconds(cold, (flush, *arrays), only="mla_decode")
    floor = 1e6 * max(shape.bytes / read, shape.flops / product)
    target = flash_mla(shape, read, product)
    base = {"op": "mla_decode", "precision": "bf16", "shape": shape.describe()}
    beside = target and {"name": "FlashMLA, scaled to this card", "version": "9241ae3", "value": target}
    found = [
        base | {"mode": "median", "value": time, "unit": "us", "yardstick": beside},
        base | {"mode": "floor", "value": floor, "unit": "us", "yardstick": None},
    ]
    if error is not None:
        found.append(base | {"mode": "relative L2 error", "value": error, "unit": "", "yardstick": None})
    ratio = f"{target / time:6.2f}" if target else ""
    context = shape.describe()["context"]
    print(
        f"{shape.heads:5d} {shape.queries:7d} {len(shape.lengths):5d} {context!s:>26} {time:9.1f} {floor:8.1f}"
        f" {floor / time:7.2f} {1e-3 * shape.bytes / time:8,.0f} {1e-6 * shape.flops / time:7,.0f}"
        f" {'' if error is None else f'{error:.1e}':>8} {ratio}",
        flush=True,
    )
    return found


HEAD = "heads queries batch                    context        us    floor  of it     GB/s TFLOP/s    error x FlashMLA"


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.decode", description="Time MLA decode.")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--rows", default="16,1 16,2 64,1 128,1 128,2", help="heads,queries of the rows")
    parser.add_argument("--batches", default="1 16 128")
    parser.add_argument("--contexts", default="1024 4096 32768")
    arguments = parser.parse_args()
    device = take_gpu()
    common = records.provenance("pallas_kernels.bench.decode", f"1 x {device.device_kind}")
    read, product = limits()
    print(f"1 x {device.device_kind}: reads {1e-9 * read:,.0f} GB/s, multiplies {1e-12 * product:,.0f} TFLOP/s\n{HEAD}")
    limit = {"op": "mla_decode", "precision": "bf16", "shape": {}, "yardstick": None}
    found = [
        limit | {"mode": "read rate", "value": 1e-9 * read, "unit": "GB/s"} | common,
        limit | {"mode": "product rate", "value": 1e-12 * product, "unit": "TFLOP/s"} | common,
    ]
    rows = [(int(heads), int(queries)) for heads, queries in (row.split(",") for row in arguments.rows.split())]
    todo = shapes(rows, [int(x) for x in arguments.batches.split()], [int(x) for x in arguments.contexts.split()])
    most = max(sum(-(-length // PAGE) for length in shape.lengths) for shape in todo)
    pool = jax.jit(lambda key: jax.random.normal(key, (most + 1, PAGE, KEY), jnp.bfloat16))(jax.random.key(1))
    flush = jnp.arange(FLUSH_WORDS, dtype=jnp.uint32)
    for shape in todo:
        found += [record | common for record in measure(shape, pool, flush, read, product)]
        if arguments.json:
            records.write(arguments.json, found)  # after each row: an interrupted run keeps what it has


if __name__ == "__main__":
    main()
