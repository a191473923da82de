"""Products of few rows on Hopper, cut along k too: all of a weight is under way at once, on all multiprocessors.

The problem. A decoding step multiplies 1 to 128 rows with matrices of 2 to 9 MB, which come from memory in 0.5 to 2 us
if every multiprocessor asks for its part at once. For 16 rows XLA's kernels took 23 us for attention's five products of
a layer of configs/v3_5b.py, whose 30.7 MB are 6.7 us of one H200; partial sums, casts and slices were kernels of their
own.

The choice. A block has 64 columns of the weight (the rows of wgmma's left operand, so nothing is padded to 64) and a
part of k, so many parts that the blocks are at most as many as the multiprocessors. Its part of the weight, 32 to 128
KB, has room in shared memory: there is no ring, and no second warpgroup. All copies are started first, then chunk after
chunk is multiplied as it arrives. What leaves are FP32 sums over a part of k, which whatever reads the product adds
up: a block for each row (`hopper_rows`), or the next product of heads (`hopper_absorb`), whose rows are short.

    2112 columns, k = 2048, 132 multiprocessors    33 blocks of columns x 4 parts of 512: 64 KB of weight each
    3072 columns, k = 1536                         48 x 2 parts of 768: 96 KB
    16 heads of 128 columns, k = 512               32 x 1: read as it is by the product that follows

What lost on paper. k folded into wgmma's 64 rows (four parts of 16 columns, of which a diagonal counts) leaves whole
sums, but copies of 16 columns are 32 bytes wide, and every block reads all rows. Rows as the left operand need 64 of
them in shared memory.

Predicted before the first run, one H200, 16 rows, us: 3.8 for 8.6 MB, 4.0 for 9.4 MB, 2.6 for 2 MB; in FP8 3.0 and 3.1.
`early` (programmatic dependent launch) asks for weights while the kernel before runs; whether XLA's graphs let it is to
be measured.
"""

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
FEW_ROWS = 32  # for which all that a block reads into registers fits there at once
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
