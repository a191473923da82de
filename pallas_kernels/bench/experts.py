"""Time the experts of a decoding step on a Hopper GPU: `python -m pallas_kernels.bench.experts [--json=results.json]`.

A row is a shape, a precision, a number of tokens and a routing: "spread" (every token chooses at random), "skewed"
(half of all choices fall on an eighth of the experts) or "one" (all tokens choose the same). One assignment in 32 is
no expert.

`call` is the whole call from BF16 rows to their sums, with all kernels and what lies between them: a loop of `CALLS`
calls, one on the result of the other, each with other experts than the last, so that weights come from memory; the
median of `REPEATS` loops by the host's clock. `floor` is the bytes of the touched experts' weights over the card's read
rate, measured in the same run.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench import records
from pallas_kernels.bench.__main__ import take_gpu
from pallas_kernels.bench.decode import READ_WORDS, microseconds
from pallas_kernels.bench.operation import relative_error
from pallas_kernels.experts_decode import experts_decode, reference
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.quantized import Quantized


class Shape(NamedTuple):
    """The experts of a layer."""

    name: str
    num_experts: int
    k: int
    width: int
    hidden: int

    def expert_bytes(self, in_fp8: bool) -> int:
        """Of one expert's weights, without scales."""
        return 3 * self.width * self.hidden * (1 if in_fp8 else 2)


SHAPES = {shape.name: shape for shape in (Shape("v3_5b", 64, 8, 2048, 1024), Shape("v3", 256, 8, 7168, 2048))}
NO_EXPERT = 1 / 32  # of all assignments
CALLS, ROUTINGS, REPEATS = 64, 8, 9
STEP = jnp.bfloat16(0.01)  # of a result that is added to the rows


def choose(shape: Shape, num_tokens: int, routing: str) -> tuple[np.ndarray, np.ndarray]:
    """Return experts int32 and gates FP32 [T, K]."""
    rng = np.random.default_rng(num_tokens)
    weights = np.ones(shape.num_experts)
    if routing == "skewed":
        weights[: shape.num_experts // 8] = 7
    weights /= weights.sum()
    rows = [rng.choice(shape.num_experts, shape.k, replace=False, p=weights) for _ in range(num_tokens)]
    experts = np.stack([rows[0]] * num_tokens if routing == "one" else rows).astype(np.int32)
    if num_tokens > 1:
        experts[rng.random(experts.shape) < NO_EXPERT] = shape.num_experts
    return experts, rng.random(experts.shape, np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_weights(shape: Shape, in_fp8: bool, key: jax.Array) -> tuple:
    """Return gate_up and down of all experts, made one expert after the other."""
    sizes = (shape.width, 2 * shape.hidden), (shape.hidden, shape.width)

    def one(key):
        keys = jax.random.split(key)
        drawn = [
            jax.random.normal(key, size, jnp.bfloat16) / math.sqrt(size[0])
            for key, size in zip(keys, sizes, strict=True)
        ]
        return [quantize_blocks(x.T, implementation="reference") if in_fp8 else x for x in drawn]

    return tuple(lax.map(one, jax.random.split(key, shape.num_experts)))


def decode(h: jax.Array, experts: jax.Array, gates: jax.Array, *weights: Any) -> jax.Array:
    """Return the kernels' result for BF16 rows."""
    rows = quantize_tiles(h, scale="pow2") if isinstance(weights[0], Quantized) else h
    return experts_decode(rows, experts, gates, *weights, implementation="hopper")


@jax.jit
def exact(h: jax.Array, experts: jax.Array, gates: jax.Array, gate_up: Any, down: Any) -> jax.Array:
    """Return the result of all tokens through all experts, one after the other."""
    in_fp8 = isinstance(gate_up, Quantized)
    if in_fp8:
        h = reference.dequantize(quantize_tiles(h, scale="pow2", implementation="reference"))

    def one(e, y):
        weights = reference.matrix(gate_up, e), reference.matrix(down, e)
        gates_T = jnp.where(experts == e, gates, 0).sum(1)
        return y + reference.ffn(h, gates_T, *weights, in_fp8)

    num_experts = (gate_up.values if in_fp8 else gate_up).shape[0]
    return lax.fori_loop(0, num_experts, one, jnp.zeros(h.shape, jnp.float32))


def calls(function: Callable, h: jax.Array, experts: jax.Array, gates: jax.Array, *weights: Any) -> jax.Array:
    """Return h after `CALLS` layers, each on the result of the one before; experts [ROUTINGS, T, K] take turns."""

    def layer(i, h):
        chosen = lax.dynamic_index_in_dim(experts, i % ROUTINGS, keepdims=False)
        return h + STEP * function(h, chosen, gates, *weights)

    return lax.fori_loop(0, CALLS, layer, h)


def microseconds_of(function: Callable, operands: tuple) -> float:
    """Return the median time of one of the calls."""
    run = jax.jit(functools.partial(calls, function))
    run(*operands).block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(*operands).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / CALLS


def turns(shape: Shape, experts: np.ndarray) -> jax.Array:
    """Return a routing and the same with all experts moved on, so that calls read weights that the last did not."""
    moved = [(experts + i * shape.num_experts // ROUTINGS) % shape.num_experts for i in range(ROUTINGS)]
    return jnp.asarray(np.where(experts < shape.num_experts, np.stack(moved), experts))


def measure(shape: Shape, in_fp8: bool, num_tokens: int, routing: str, weights: tuple, read: float) -> list[dict]:
    """Return the records of a row, and print it."""
    experts, gates = choose(shape, num_tokens, routing)
    touched = len(set(experts.reshape(-1).tolist()) - {shape.num_experts})
    h = jax.random.normal(jax.random.key(num_tokens), (num_tokens, shape.width), jnp.bfloat16)
    arrays = h, jnp.asarray(experts), jnp.asarray(gates), *weights
    error = relative_error(jax.jit(decode)(*arrays), exact(*arrays))
    call = microseconds_of(decode, (h, turns(shape, experts), *arrays[2:]))
    floor = 1e6 * touched * shape.expert_bytes(in_fp8) / read
    precision = "fp8" if in_fp8 else "bf16"
    print(
        f"{shape.name:6} {precision:4} {num_tokens:4d} {routing:7} {touched:4d} {call:8.1f} {floor:8.1f}"
        f" {floor / call:6.2f} {1e-9 * read * floor / call:8,.0f} {error:.1e}",
        flush=True,
    )
    described = {"tokens": num_tokens, "routing": routing, "touched experts": touched, **shape._asdict()}
    base = {"op": "experts_decode", "precision": precision, "shape": described, "yardstick": None}
    return [
        base | {"mode": "call", "value": call, "unit": "us"},
        base | {"mode": "floor", "value": floor, "unit": "us"},
        base | {"mode": "relative L2 error", "value": error, "unit": ""},
    ]


HEAD = "shape  prec    T routing  exp.     call    floor  of it     GB/s error"


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.experts", description="Time the experts.")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--shapes", default="v3_5b v3")
    parser.add_argument("--precisions", default="bf16 fp8")
    parser.add_argument("--tokens", default="1 4 16 32 128 512")
    parser.add_argument("--routings", default="spread skewed one")
    arguments = parser.parse_args()
    device = take_gpu()
    common = records.provenance("pallas_kernels.bench.experts", f"1 x {device.device_kind}")
    words = jax.random.bits(jax.random.key(0), (READ_WORDS,), jnp.uint32)
    read = 1e6 * 4 * READ_WORDS / microseconds(jax.jit(lambda x: x.max()), (words,))
    del words
    print(f"1 x {device.device_kind}: reads {1e-9 * read:,.0f} GB/s\n{HEAD}")
    limit = {"op": "experts_decode", "precision": "bf16", "shape": {}, "yardstick": None}
    found = [limit | {"mode": "read rate", "value": 1e-9 * read, "unit": "GB/s"} | common]
    for name in arguments.shapes.split():
        for precision in arguments.precisions.split():
            in_fp8 = precision == "fp8"
            weights = make_weights(SHAPES[name], in_fp8, jax.random.key(1))
            for num_tokens in map(int, arguments.tokens.split()):
                for routing in arguments.routings.split():
                    row = measure(SHAPES[name], in_fp8, num_tokens, routing, weights, read)
                    found += [record | common for record in row]
                    if arguments.json:
                        records.write(arguments.json, found)  # after each row: an interrupted run keeps what it has
            del weights


if __name__ == "__main__":
    main()
