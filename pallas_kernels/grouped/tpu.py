"""Block-scaled FP8 products of groups on TPUs; speed on TPU is unmeasured.

A grid can't depend on where groups end, so its steps are visits (`visits.py`): one group's rows within one tile. The
scalar core holds the visits in SMEM before the kernel starts, and the index maps of the operands read there which tile
of `a` and which group's `b` to copy.

    grouped_matmul               a visit computes its whole tile with its group's matrix, and keeps its rows. A tile
                                 that two groups share is computed twice: the price of not padding groups in HBM.
    grouped_matmul_accumulate    tiles lie along K, the dim summed over. A visit adds those of its 128-wide segments
                                 that are its group's; the output changes when the group does. c and the result share
                                 memory: a group without visits keeps its c.
    masked_matmul                tiles never cross experts: no visits, only a test of the tile's first row against the
                                 valid rows.

Where there is nothing to compute (rows of no group, visits that fill up, tiles without valid rows) the index maps stay
at one block, so nothing is copied either. Such rows are never multiplied into others, and `where` chooses between
results, so a NaN in them can't leak.

How one step along k multiplies, and in which dtype, is in `pallas_kernels/matmul/tpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP
from pallas_kernels.grouped.visits import make_visits
from pallas_kernels.matmul.tpu import SEGMENTS, TuningConfig, add_segment, add_step, fit, spread_scales
from pallas_kernels.quantized import Quantized
from pallas_kernels.tpu_tiles import Interpret

GROUPED_MATMUL = TuningConfig(tile_m=256, tile_n=512)
MASKED_MATMUL = TuningConfig(tile_m=128, tile_n=512)
GROUPED_MATMUL_ACCUMULATE = TuningConfig(tile_m=512, tile_n=512)


def grouped_matmul(
    a: Quantized,
    b: Quantized,
    group_sizes: Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: TuningConfig = GROUPED_MATMUL,
    interpret: Interpret = False,
) -> Array:
    """Return a_g b_g^T [rows, n] for the rows of each group g, the others zero.

    `a` is tile [rows, k], `b` block [G, n, k].
    """
    (rows, k), (num_groups, n, _) = a.shape, b.shape
    tile_m, tile_n = fit(config.tile_m, rows), fit(config.tile_n, n)
    num_segments = k // GROUP
    segments = min(SEGMENTS, num_segments)
    visits = make_visits(group_sizes, rows, tile_m)

    def step_of(v, step, visits):
        return jnp.where(visits.group[v] < num_groups, step, 0)

    def group_of(v, visits):
        return jnp.minimum(visits.group[v], num_groups - 1)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, tile_n), len(visits.group), pl.cdiv(num_segments, segments)),
        in_specs=[
            pl.BlockSpec((tile_m, segments * GROUP), lambda j, v, step, s: (s.tile[v], step_of(v, step, s))),
            pl.BlockSpec(
                (None, tile_n, segments * GROUP), lambda j, v, step, s: (group_of(v, s), j, step_of(v, step, s))
            ),
            pl.BlockSpec((segments, tile_m), lambda j, v, step, s: (step_of(v, step, s), s.tile[v])),
            pl.BlockSpec((None, segments, tile_n), lambda j, v, step, s: (group_of(v, s), step_of(v, step, s), j)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda j, v, step, s: (s.tile[v], j)),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_grouped_kernel, num_groups=num_groups, num_segments=num_segments),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((rows, n), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(visits, a.values, b.values, a.scales, spread_scales(b))


def _grouped_kernel(visits, a, b, a_scales, b_scales, out, total, *, num_groups: int, num_segments: int):
    v, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    @pl.when(visits.group[v] < num_groups)
    def _add():
        add_step(a, b, a_scales, b_scales, total, step, num_segments)

    @pl.when(step == pl.num_programs(2) - 1)
    def _store():
        keep_rows(visits, v, total[...], out)


def keep_rows(visits, v: Array, total: Array, out) -> None:
    """Write the rows of `total` [tile, n] that are visit `v`'s to `out`; the others stay as they are."""
    group = visits.group[v]
    rows = visits.tile[v] * total.shape[0] + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
    own = (rows >= visits.offsets[group]) & (rows < visits.offsets[group + 1])
    out[...] = jnp.where(own, total.astype(out.dtype), out[...])


def masked_matmul(
    a: Quantized,
    b: Quantized,
    valid_rows: Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: TuningConfig = MASKED_MATMUL,
    interpret: Interpret = False,
) -> Array:
    """Return a_e b_e^T [E, r, n], computed for the first `valid_rows[e]` rows.

    `a` is tile [E, r, k], `b` block [E, n, k].
    """
    (num_experts, rows, k), n = a.shape, b.shape[1]
    tile_m, tile_n = fit(config.tile_m, rows), fit(config.tile_n, n)
    num_segments = k // GROUP
    segments = min(SEGMENTS, num_segments)

    def step_of(e, i, step, valid_rows):
        return jnp.where(i * tile_m < valid_rows[e], step, 0)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_experts, pl.cdiv(rows, tile_m), pl.cdiv(n, tile_n), pl.cdiv(num_segments, segments)),
        in_specs=[
            pl.BlockSpec(
                (None, tile_m, segments * GROUP), lambda e, i, j, step, valid: (e, i, step_of(e, i, step, valid))
            ),
            pl.BlockSpec(
                (None, tile_n, segments * GROUP), lambda e, i, j, step, valid: (e, j, step_of(e, i, step, valid))
            ),
            pl.BlockSpec((None, segments, tile_m), lambda e, i, j, step, valid: (e, step_of(e, i, step, valid), i)),
            pl.BlockSpec((None, segments, tile_n), lambda e, i, j, step, valid: (e, step_of(e, i, step, valid), j)),
        ],
        out_specs=pl.BlockSpec((None, tile_m, tile_n), lambda e, i, j, step, valid: (e, i, j)),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_masked_kernel, num_segments=num_segments),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((num_experts, rows, n), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(valid_rows, a.values, b.values, a.scales, spread_scales(b))


def _masked_kernel(valid_rows, a, b, a_scales, b_scales, out, total, *, num_segments: int):
    expert, tile, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)

    @pl.when(tile * out.shape[0] < valid_rows[expert])
    def _compute():
        @pl.when(step == 0)
        def _start():
            total[...] = jnp.zeros_like(total)

        add_step(a, b, a_scales, b_scales, total, step, num_segments)

        @pl.when(step == pl.num_programs(3) - 1)
        def _store():
            out[...] = total[...].astype(out.dtype)


def grouped_matmul_accumulate(
    a: Quantized,
    b: Quantized,
    group_sizes: Array,
    c: Array | None = None,
    *,
    config: TuningConfig = GROUPED_MATMUL_ACCUMULATE,
    interpret: Interpret = False,
) -> Array:
    """Return c[g] + a_g b_g^T, FP32 [G, m, n], over the columns of group g of `a` and `b`.

    `a` is tile [m, K] and `b` tile [n, K]; group g has `group_sizes[g]` columns.

    Without a `c` it is made of zeros: a group without visits has no other.
    """
    (m, k), n, num_groups = a.shape, b.shape[0], group_sizes.shape[0]
    c = jnp.zeros((num_groups, m, n), jnp.float32) if c is None else c
    tile_m, tile_n = fit(config.tile_m, m), fit(config.tile_n, n)
    segments = min(SEGMENTS, k // GROUP)
    visits = make_visits(group_sizes, k, segments * GROUP)

    def tile_of(v, visits):
        return jnp.where(visits.group[v] < num_groups, visits.tile[v], 0)

    tile = pl.BlockSpec((None, tile_m, tile_n), lambda i, j, v, s: (group_of_output(s, v, num_groups), i, j))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), len(visits.group)),
        in_specs=[
            pl.BlockSpec((tile_m, segments * GROUP), lambda i, j, v, s: (i, tile_of(v, s))),
            pl.BlockSpec((tile_n, segments * GROUP), lambda i, j, v, s: (j, tile_of(v, s))),
            pl.BlockSpec((segments, tile_m), lambda i, j, v, s: (tile_of(v, s), i)),
            pl.BlockSpec((segments, tile_n), lambda i, j, v, s: (tile_of(v, s), j)),
            tile,
        ],
        out_specs=tile,
    )
    return pl.pallas_call(
        functools.partial(_accumulate_kernel, num_groups=num_groups),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(c.shape, jnp.float32),
        input_output_aliases={len(visits) + 4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(visits, a.values, b.values, a.scales, b.scales, c)


def _accumulate_kernel(visits, a, b, a_scales, b_scales, c, out, *, num_groups: int):
    v = pl.program_id(2)
    group = visits.group[v]
    start_output(visits, v, num_groups, c, out)

    @pl.when(group < num_groups)
    def _add():
        segments = a_scales.shape[0]
        row_scales = a_scales[...].T
        for segment in range(segments):
            column = (visits.tile[v] * segments + segment) * GROUP
            own = (column >= visits.offsets[group]) & (column < visits.offsets[group + 1])
            pl.when(own)(functools.partial(add_segment, a, b, row_scales, b_scales, out, segment))


def group_of_output(visits, v: Array, num_groups: int) -> Array:
    """Return whose output visit `v` holds: its group's.

    After the last group it is that of G - 1, which the visit leaves as it is.
    """
    return jnp.minimum(visits.group[v], num_groups - 1)


def start_output(visits, v: Array, num_groups: int, c, out) -> None:
    """Copy `c` to `out` where visit `v` is the first that holds this output."""
    before = group_of_output(visits, jnp.maximum(v - 1, 0), num_groups)

    @pl.when((v == 0) | (before != group_of_output(visits, v, num_groups)))
    def _start():
        out[...] = c[...]
