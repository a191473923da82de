"""BF16 products of groups on TPUs; speed on TPU is unmeasured.

The FP8 kernels' schedule (`tpu.py`, `visits.py`) without scales: a step along k is one product of the matrix unit. Two
things differ.

Groups of the weight gradient end at any row, not at a multiple of 128, so the rows of a tile that are another group's
are zeroed before the product, in both operands: a NaN times zero would be NaN.

Any k is allowed. Where it is not a multiple of a step, both operands are padded with zeros in HBM first; the widths of
DeepSeek-V3 never are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped.tpu import group_of_output, keep_rows, start_output
from pallas_kernels.grouped.visits import make_visits
from pallas_kernels.matmul.tpu import TRANSPOSED, fit
from pallas_kernels.tpu_tiles import Interpret

PLAIN = (((1,), (0,)), ((), ()))  # a b, as dot_general says it
ROWS = (((0,), (0,)), ((), ()))  # a^T b


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut: output tiles of tile_m x tile_n and steps of tile_k, multiples of 128."""

    tile_m: int = 256
    tile_n: int = 512
    tile_k: int = 512


GROUPED_MATMUL_BF16 = TuningConfig()
GROUPED_MATMUL_ACCUMULATE_BF16 = TuningConfig(tile_m=512)


def grouped_matmul_bf16(
    a: Array,
    b: Array,
    group_sizes: Array,
    *,
    transpose_b: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: TuningConfig = GROUPED_MATMUL_BF16,
    interpret: Interpret = False,
) -> Array:
    """Return a_g b_g^T [rows, n] for the rows of each group, the others zero.

    `a` is BF16 [rows, k], `b` BF16 [G, n, k], or [G, k, n] with `transpose_b`.
    """
    num_groups, n = b.shape[0], b.shape[2 if transpose_b else 1]
    tile_k = fit(config.tile_k, a.shape[1])
    a, b = _pad(a, 1, tile_k), _pad(b, 1 if transpose_b else 2, tile_k)
    rows, k = a.shape
    tile_m, tile_n = fit(config.tile_m, rows), fit(config.tile_n, n)
    visits = make_visits(group_sizes, rows, tile_m)

    def step_of(v, step, visits):
        return jnp.where(visits.group[v] < num_groups, step, 0)

    def block_of_b(j, v, step, visits):
        group, step = group_of_output(visits, v, num_groups), step_of(v, step, visits)
        return (group, step, j) if transpose_b else (group, j, step)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, tile_n), len(visits.group), k // tile_k),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda j, v, step, s: (s.tile[v], step_of(v, step, s))),
            pl.BlockSpec((None, tile_k, tile_n) if transpose_b else (None, tile_n, tile_k), block_of_b),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda j, v, step, s: (s.tile[v], j)),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_grouped_kernel, num_groups=num_groups, contraction=PLAIN if transpose_b else TRANSPOSED),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(visits, a, b)


def _grouped_kernel(visits, a, b, out, total, *, num_groups: int, contraction):
    v, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    @pl.when(visits.group[v] < num_groups)
    def _add():
        total[...] += jax.lax.dot_general(a[...], b[...], contraction, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _store():
        keep_rows(visits, v, total[...], out)


def grouped_matmul_accumulate_bf16(
    a: Array,
    b: Array,
    group_sizes: Array,
    c: Array | None = None,
    *,
    config: TuningConfig = GROUPED_MATMUL_ACCUMULATE_BF16,
    interpret: Interpret = False,
) -> Array:
    """Return c[g] + a_g^T b_g, FP32 [G, m, n], over the rows of each group of BF16 `a` [K, m] and `b` [K, n].

    Without a `c` it begins at zero.
    """
    num_groups, m, n = group_sizes.shape[0], a.shape[1], b.shape[1]
    c = jnp.zeros((num_groups, m, n), jnp.float32) if c is None else c
    tile_m, tile_n, tile_k = fit(config.tile_m, m), fit(config.tile_n, n), fit(config.tile_k, a.shape[0])
    visits = make_visits(group_sizes, a.shape[0], tile_k)

    def tile_of(v, visits):
        return jnp.where(visits.group[v] < num_groups, visits.tile[v], 0)

    tile = pl.BlockSpec((None, tile_m, tile_n), lambda i, j, v, s: (group_of_output(s, v, num_groups), i, j))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), len(visits.group)),
        in_specs=[
            pl.BlockSpec((tile_k, tile_m), lambda i, j, v, s: (tile_of(v, s), i)),
            pl.BlockSpec((tile_k, tile_n), lambda i, j, v, s: (tile_of(v, s), j)),
            tile,
        ],
        out_specs=tile,
    )
    return pl.pallas_call(
        functools.partial(_accumulate_kernel, num_groups=num_groups),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(c.shape, jnp.float32),
        input_output_aliases={len(visits) + 2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(visits, a, b, c)


def _accumulate_kernel(visits, a, b, c, out, *, num_groups: int):
    v = pl.program_id(2)
    group = visits.group[v]
    start_output(visits, v, num_groups, c, out)

    @pl.when(group < num_groups)
    def _add():
        left, right = _own_rows(visits, v, a), _own_rows(visits, v, b)
        out[...] += jax.lax.dot_general(left, right, ROWS, preferred_element_type=jnp.float32)


def _own_rows(visits, v: Array, x) -> Array:
    """BF16 [tile, columns] with zeros in the rows that are not visit `v`'s."""
    group = visits.group[v]
    rows = visits.tile[v] * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    own = (rows >= visits.offsets[group]) & (rows < visits.offsets[group + 1])
    return jnp.where(own, x[...], 0)


def _pad(x: Array, dim: int, multiple: int) -> Array:
    """`x` with zeros after the end of `dim`, up to a multiple."""
    widths = [(0, -x.shape[dim] % multiple if i == dim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)
