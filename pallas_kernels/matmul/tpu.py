"""Block-scaled FP8 products on TPUs; speed on TPU is unmeasured.

A TPU adds in full FP32, so promotion has nothing to cure there. The scales still change every 128 along k, and the loop
is the same: multiply one segment, scale the partial product, add it to an FP32 tile in VMEM. It leaves half of a
256-deep matrix unit (v6e, tpu7x) idle. The alternative, scaling the operands first and multiplying all of k at once,
would round every element to BF16 a second time.

What the two operands are in, where:

    HBM, and the copies to VMEM    E4M3 everywhere: half the bytes of BF16
    matrix unit                    E4M3 on tpu7x, which multiplies it; BF16 on v5p and v6e, converted tile by tile:
                                   exact, as E4M3 has three bits of mantissa and BF16 seven

The scales of blocks are spread over their columns before the kernel, [ceil(n / 128), k / 128] to [k / 128, n]: then
both forms of the right operand are one kernel. A column's 128 values of one byte get a scale of four: 1/32 of the
operand, written once, and read as often as the values are. Reading blocks' scales in the kernel would take SMEM, too
small for 256 experts, or a block of VMEM narrower than the hardware's (8, 128).

A step along k is 8 segments, the 8 rows of scales that VMEM holds in one register: k = 1536 takes a step of 8 and a
step of 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, Quantized
from pallas_kernels.tpu_tiles import Interpret

SEGMENTS = 8  # of a step along k: FP32 registers are (8, 128)
TRANSPOSED = (((1,), (1,)), ((), ()))  # a b^T, as dot_general says it


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut: output tiles of tile_m x tile_n, multiples of 128."""

    tile_m: int = 512
    tile_n: int = 512


MATMUL = TuningConfig()


def matmul(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: TuningConfig = MATMUL,
    interpret: Interpret = False,
) -> Array:
    """Return a b^T [m, n]; `a` tile [m, k], `b` block [n, k]."""
    return _product(a, b.values, spread_scales(b), None, out_dtype, config, interpret)


def matmul_accumulate(
    a: Quantized, b: Quantized, c: Array | None = None, *, config: TuningConfig = MATMUL, interpret: Interpret = False
) -> Array:
    """Return c + a b^T, FP32 [m, n], for tiles [m, k] and [n, k], or a b^T without a `c`.

    The result takes the place of c where the caller donates it.
    """
    return _product(a, b.values, b.scales, c, jnp.float32, config, interpret)


def _product(
    a: Quantized,
    b: Array,
    b_scales: Array,
    c: Array | None,
    out_dtype: jax.typing.DTypeLike,
    config: TuningConfig,
    interpret: Interpret,
) -> Array:
    (m, k), n = a.shape, b.shape[0]
    tile_m, tile_n = fit(config.tile_m, m), fit(config.tile_n, n)
    num_segments = k // GROUP
    segments = min(SEGMENTS, num_segments)
    tile = pl.BlockSpec((tile_m, tile_n), lambda i, j, step: (i, j))
    return pl.pallas_call(
        functools.partial(_kernel, num_segments=num_segments),
        grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), pl.cdiv(num_segments, segments)),
        in_specs=[
            pl.BlockSpec((tile_m, segments * GROUP), lambda i, j, step: (i, step)),
            pl.BlockSpec((tile_n, segments * GROUP), lambda i, j, step: (j, step)),
            pl.BlockSpec((segments, tile_m), lambda i, j, step: (step, i)),
            pl.BlockSpec((segments, tile_n), lambda i, j, step: (step, j)),
            None if c is None else tile,
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        input_output_aliases={} if c is None else {4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(a.values, b, a.scales, b_scales, c)


def _kernel(a, b, a_scales, b_scales, c, out, total, *, num_segments: int):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    add_step(a, b, a_scales, b_scales, total, step, num_segments)

    @pl.when(step == pl.num_programs(2) - 1)
    def _store():
        result = total[...] if c is None else c[...] + total[...]
        out[...] = result.astype(out.dtype)


def add_step(a, b, a_scales, b_scales, total, step: Array, num_segments: int) -> None:
    """Add one step along k, as many segments as `a_scales` has rows, to `total`.

    The last step has what is left of `num_segments`.
    """
    segments = a_scales.shape[0]
    last, left = divmod(num_segments - 1, segments)

    def add(count: int) -> None:
        row_scales = a_scales[...].T
        for segment in range(count):
            add_segment(a, b, row_scales, b_scales, total, segment)

    if left + 1 == segments:
        add(segments)
    else:
        pl.when(step < last)(lambda: add(segments))
        pl.when(step == last)(lambda: add(left + 1))


def add_segment(a, b, row_scales: Array, b_scales, total, segment: int) -> None:
    """Add the scaled partial product of one segment to `total` [m, n].

    Args:
        a, b: E4M3 [m, k], [n, k] in VMEM.
        row_scales: [m, segments], the scales of `a` transposed: a column broadcasts over the columns of `total`.
        b_scales: [segments, n] in VMEM.
        total: FP32 [m, n] in VMEM.
        segment: which 128 columns.
    """
    columns = pl.ds(segment * GROUP, GROUP)
    dtype = matrix_unit_dtype()
    left, right = a[:, columns].astype(dtype), b[:, columns].astype(dtype)
    partial = jax.lax.dot_general(left, right, TRANSPOSED, preferred_element_type=jnp.float32)
    total[...] += partial * (row_scales[:, segment : segment + 1] * b_scales[segment : segment + 1, :])


def matrix_unit_dtype() -> jnp.dtype:
    """Return what E4M3 tiles are multiplied in: themselves where this TPU can, else BF16.

    BF16 holds each of their values.
    """
    native = pltpu.is_tpu_device() and pltpu.get_tpu_info().is_matmul_supported(E4M3, E4M3)
    return jnp.dtype(E4M3 if native else jnp.bfloat16)


def spread_scales(b: Quantized) -> Array:
    """Return the scales of `b` block [..., n, k], one for each of its rows: [..., k / 128, n]."""
    n = b.shape[-2]
    return jnp.repeat(b.scales.swapaxes(-1, -2), GROUP, axis=-1)[..., :n]


def fit(tile: int, size: int) -> int:
    """Return `tile`, or less where `size` is smaller: a multiple of 128."""
    return min(tile, pl.cdiv(size, GROUP) * GROUP)
