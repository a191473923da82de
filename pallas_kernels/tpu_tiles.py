"""Tiles in the TPU kernels that quantise: how a tensor is cut, where its scales lie, how a kernel is called.

A block is 128 rows by 1024 columns, eight groups; a group's 128 elements are the lanes of a register, so that its
largest magnitude is one reduction along lanes. Scales come out as columns and are stored as rows: they are gathered in
the lanes of one matrix of 128 x 128, which is transposed once. Blocks at an edge hold rubbish beyond the tensor, and
what is written there is dropped.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, Quantized, scales_shape

Interpret = bool | pltpu.InterpretParams  # how pallas_call runs a kernel where there is no TPU: tests set it
BLOCK_GROUPS = 8  # scales are stored in pieces of 8 x 128
WIDTH = BLOCK_GROUPS * GROUP
VMEM_BYTES = 48 * 2**20  # of 64 MiB, the least of v5p, v6e and tpu7x


def call(
    body: Callable,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_types: Sequence[jax.ShapeDtypeStruct],
    interpret: Interpret,
    *,
    parallel: bool = False,
) -> Callable:
    """Return the kernel of `body` over `grid`; `parallel` tells the compiler that no block reads what another wrote."""
    semantics = {"dimension_semantics": ("parallel",) * len(grid)} if parallel else {}
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_types,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES, **semantics),
        interpret=interpret,
    )


def grid_of(m: int, columns: int) -> tuple[int, int]:
    """Return the blocks of a tensor [m, columns], along either dim."""
    return pl.cdiv(m, GROUP), pl.cdiv(columns, WIDTH)


def values_spec() -> pl.BlockSpec:
    """Return the blocks of a tensor [m, k]."""
    return pl.BlockSpec((GROUP, WIDTH), lambda i, j: (i, j))


def tile_specs() -> list[pl.BlockSpec]:
    """Return the blocks of tiles [m, k]: values, and scales [k / 128, pad4(m)]."""
    return [values_spec(), pl.BlockSpec((BLOCK_GROUPS, GROUP), lambda i, j: (j, i))]


def tile_types(m: int, k: int) -> list[jax.ShapeDtypeStruct]:
    """Return the types of the values and scales of tiles [m, k]."""
    return [jax.ShapeDtypeStruct((m, k), E4M3), jax.ShapeDtypeStruct(scales_shape((m, k), "tile"), jnp.float32)]


def transposed_specs() -> list[pl.BlockSpec]:
    """Return the blocks of transposed tiles, of which a kernel writes [1024, 128] where it reads [128, 1024]."""
    return [pl.BlockSpec((WIDTH, GROUP), lambda i, j: (j, i)), pl.BlockSpec((1, 1, WIDTH), lambda i, j: (i, 0, j))]


def transposed_types(m: int, k: int) -> list[jax.ShapeDtypeStruct]:
    """Return the types of transposed tiles [k, pad128(m)] and their scales [pad128(m) / 128, 1, k].

    The 1 is there so that a block may be one row of them.
    """
    tall = pl.cdiv(m, GROUP)
    return [jax.ShapeDtypeStruct((k, tall * GROUP), E4M3), jax.ShapeDtypeStruct((tall, 1, k), jnp.float32)]


def transposed(values: Array, scales: Array) -> Quantized:
    """Return the tiles that a kernel wrote as `transposed_types`."""
    return Quantized(values, scales[:, 0], "tile")


def load_group(ref, g: int) -> Array:
    """Return group g of a block, FP32 [128, 128]."""
    return ref[:, pl.ds(g * GROUP, GROUP)].astype(jnp.float32)


def scale_rows(columns: Sequence[Array], m: int) -> Array:
    """Return the scales of groups, a column [128, 1] each, as rows [groups, 128]; 1 beyond m."""
    lanes = lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 1)
    matrix = functools.reduce(
        lambda matrix, g: jnp.where(lanes == g, columns[g], matrix), range(len(columns)), jnp.ones((GROUP, GROUP))
    )
    rows = pl.program_id(0) * GROUP + lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), 0)
    return jnp.where(rows < m, matrix, 1.0).T[: len(columns)]
