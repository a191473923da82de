"""Time the router of a decoding step on one Hopper GPU: `python -m pallas_kernels.bench.routing [--json=results.json]`.

A row is a shape and a number of tokens. Before every launch 256 MiB are read, so that the router comes from memory. The
times are those of kernels, by CUPTI: of `routing`, and of what XLA makes of the reference and of the plan of
`experts_decode`. The floor is the bytes of the router over the card's read rate, measured in the same run; a launch,
which no kernel goes without, is not in it.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench import records
from pallas_kernels.bench.__main__ import take_gpu
from pallas_kernels.bench.decode import FLUSH_WORDS, READ_WORDS, microseconds
from pallas_kernels.experts_decode import plan
from pallas_kernels.routing import PARTS, Rule, route


class Shape(NamedTuple):
    """The router of a layer."""

    name: str
    width: int
    num_routed: int

    @property
    def bytes(self) -> int:
        """Of the router's parts."""
        return 2 * PARTS * self.width * self.num_routed


SHAPES = Shape("v3_5b", 2048, 64), Shape("v3", 7168, 256)
RULE = Rule(8, num_groups=8, num_kept_groups=4, scale=2.5)
TOKENS = 16, 32, 128


def operands(shape: Shape, num_tokens: int) -> tuple[jax.Array, ...]:
    """Return random h, router, bias and valid."""
    keys = jax.random.split(jax.random.key(num_tokens), 3)
    h = jax.random.normal(keys[0], (num_tokens, shape.width), jnp.bfloat16)
    router = jax.random.normal(keys[1], (PARTS * shape.width, shape.num_routed)) / math.sqrt(shape.width)
    sizes = jnp.repeat(2.0 ** (-8 * jnp.arange(PARTS)), shape.width)[:, None]  # of the parts
    bias = 0.1 * jax.random.normal(keys[2], (shape.num_routed,))
    return h, (router * sizes).astype(jnp.bfloat16), bias, jnp.ones((num_tokens,), bool)


def call(implementation: str, flush: jax.Array, *arrays: jax.Array) -> Any:
    """Return the routing, with its plan up to 32 tokens, after `flush` has been read."""
    read, arrays = lax.optimization_barrier((flush.max(), arrays))
    num_experts = arrays[1].shape[1] + 1
    found = route(*arrays, rule=RULE, num_experts=num_experts, implementation=implementation)
    if found.dense is None and len(found.experts) <= plan.MOST_DENSE:
        rows = plan.round_up(len(found.experts))
        found = found._replace(dense=plan.make_dense(found.experts, found.gates, num_experts, rows))
    return read, found


def measure(shape: Shape, num_tokens: int, flush: jax.Array, read: float) -> list[dict[str, Any]]:
    """Return the records of a row, and print it."""
    arrays = operands(shape, num_tokens)
    programs = {face: jax.jit(call, static_argnums=0).lower(face, flush, *arrays).compile() for face in FACES}
    same = [found.experts for _, found in (program(flush, *arrays) for program in programs.values())]
    equal = float((same[0] == same[1]).all(1).mean())
    emptying = microseconds(jax.jit(lambda x: x.max()), (flush,))
    kernel, others = (microseconds(program, (flush, *arrays)) - emptying for program in programs.values())
    floor = 1e6 * shape.bytes / read
    print(f"{shape.name:6} {num_tokens:4d} {kernel:8.2f} {others:8.2f} {floor:6.2f} {equal:6.3f}", flush=True)
    base = {"op": "routing", "precision": "bf16", "shape": {"tokens": num_tokens, **shape._asdict()}}
    return [
        base | {"mode": "kernels", "value": kernel, "unit": "us", "yardstick": others},
        base | {"mode": "floor", "value": floor, "unit": "us", "yardstick": None},
        base | {"mode": "rows that choose the same", "value": equal, "unit": "", "yardstick": None},
    ]


FACES = "hopper", "reference"
HEAD = "shape     T  routing      XLA  floor  equal"


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.routing", description="Time the router.")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    arguments = parser.parse_args()
    device = take_gpu()
    common = records.provenance("pallas_kernels.bench.routing", f"1 x {device.device_kind}")
    words = jax.random.bits(jax.random.key(0), (READ_WORDS,), jnp.uint32)
    read = 1e6 * 4 * READ_WORDS / microseconds(jax.jit(lambda x: x.max()), (words,))
    flush = words[:FLUSH_WORDS]
    print(f"1 x {device.device_kind}: reads {1e-9 * read:,.0f} GB/s\n{HEAD}")
    found = [record for shape in SHAPES for tokens in TOKENS for record in measure(shape, tokens, flush, read)]
    if arguments.json:
        records.write(arguments.json, [record | common for record in found])


if __name__ == "__main__":
    main()
