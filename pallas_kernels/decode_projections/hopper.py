"""Products of few rows on Hopper, cut along k too: all of a weight is under way at once, on all multiprocessors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.hopper.ring import tiled
from pallas_kernels.lowering import layout_inference

COLUMNS = 64  # of a block: wgmma's left operand has so many rows
SHARED_BYTES = 208 * 1024  # of a block, for its part of the weight and of the rows
L = plgpu.Layout
UNTYPED: Any = plgpu  # the type checker does not see all that it exports
PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernels run.

    Attributes:
        depth: numbers along k in a chunk, which is waited for at once.
        early: whether the next kernel starts while this one runs, and asks for its weights before this one ends.
        interpreted: whether products are `jnp.dot`, as the interpreter wants them.
    """

    depth: int = 128
    early: bool = False
    interpreted: bool = False


def choose_splits(batch: int, k: int, columns: int, rows: int, depth: int) -> int:
    """Return into how many parts k is cut: as many as give every multiprocessor a block, or what memory asks for."""
    chunks, tiles = k // depth, batch * columns // COLUMNS
    possible = [s for s in range(1, chunks + 1) if chunks % s == 0]
    fitting = [s for s in possible if k // s * (COLUMNS + rows) * 2 <= SHARED_BYTES]
    return max([s for s in fitting if s * tiles <= num_multiprocessors()] or fitting[:1])


def begin(config: TuningConfig) -> None:
    """Let the next kernel of the stream start: until it waits, it reads nothing that this one writes."""
    if config.early:
        UNTYPED.griddepcontrol_launch_dependents()


def wait(config: TuningConfig) -> None:
    """Wait until the kernel before has written."""
    if config.early:
        UNTYPED.griddepcontrol_wait()


def multiply(config: TuningConfig, weights: Any, rows: Any, full: Any) -> Array:
    """Return FP32 [64, N], the sum over the chunks weights [., depth, 64] and rows [., N, depth], as they arrive."""
    chunks, n = weights.shape[0], rows.shape[1]
    if config.interpreted:
        total = jnp.zeros((COLUMNS, n), jnp.float32)
        for chunk in range(chunks):
            plgpu.barrier_wait(full.at[chunk])
            left, right = weights[chunk].astype(jnp.float32), rows[chunk].astype(jnp.float32)
            total += jnp.dot(left.T, right.T, preferred_element_type=jnp.float32)
        return total

    def run(accumulator):
        for chunk in range(chunks):
            plgpu.barrier_wait(full.at[chunk])
            plgpu.wgmma(accumulator, weights.at[chunk].transpose((1, 0)), rows.at[chunk].transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(run, UNTYPED.ACC((COLUMNS, n), jnp.float32))


def turned(x: Array, dtype: Any) -> Array:
    """Return FP32 [64, N] in `dtype`, neighbours along the 64 in one register."""
    return plgpu.layout_cast(x.astype(dtype), L.WGMMA_TRANSPOSED)


def launch(body: Callable, name: str, out_type: Any, blocks: int, scratch: list) -> Callable:
    """Return the kernel of `body(*refs)`: blocks of one warpgroup."""
    layout_inference.install()
    return plgpu.kernel(
        body,
        kernel_name=name,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        compiler_params=PARAMS,
    )


def project(x: Array, weight: Array, *, splits: int, config: TuningConfig) -> Array:
    """Return partial sums of x [N, B * K] times weight [B, K, C], FP32 [splits, N, B * C]; of one part BF16."""
    n = len(x)
    batch, k, columns = weight.shape
    tiles, part = columns // COLUMNS, k // splits
    depth = min(config.depth, part)
    chunks = part // depth
    dtype = jnp.float32 if splits > 1 else jnp.bfloat16

    def kernel(x_ref, weight_ref, out_ref, weights, rows, full):
        begin(config)
        block = lax.axis_index("block")
        split, tile = lax.div(block, jnp.int32(batch * tiles)), lax.rem(block, jnp.int32(batch * tiles))
        number, column = lax.div(tile, jnp.int32(tiles)), lax.rem(tile, jnp.int32(tiles)) * COLUMNS
        for chunk in range(chunks):
            ks = pl.ds(split * part + chunk * depth, depth)
            source = weight_ref.at[number, ks, pl.ds(column, COLUMNS)]
            plgpu.copy_gmem_to_smem(source, weights.at[chunk], full.at[chunk])
        wait(config)
        for chunk in range(chunks):
            ks = pl.ds(number * k + split * part + chunk * depth, depth)
            plgpu.copy_gmem_to_smem(x_ref.at[:, ks], rows.at[chunk], full.at[chunk])
        total = multiply(config, weights, rows, full)
        target = out_ref.at[split, :, pl.ds(tile * COLUMNS, COLUMNS)]
        target.transpose((1, 0))[...] = turned(total, dtype)

    return launch(
        kernel,
        "decode_project",
        jax.ShapeDtypeStruct((splits, n, batch * columns), dtype),
        splits * batch * tiles,
        [
            tiled((chunks, depth, COLUMNS), jnp.bfloat16),
            tiled((chunks, n, depth), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=2, num_barriers=chunks),
        ],
    )(x, weight)
