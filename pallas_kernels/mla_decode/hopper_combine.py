"""The results of a sequence's fragments, added up on Hopper: sum of w_f o_f with w_f = exp(lse_f - lse).

A thread block per sequence and some of its rows. It leaves sequences of one fragment alone, whose results are in place,
and gives an empty sequence its zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowering import layout_inference
from pallas_kernels.mla_decode.hopper_fragments import LOWEST
from pallas_kernels.mla_decode.schedule import Schedule

MOST_AHEAD = 16  # fragments that are read together
MANY_ROWS, MOST_ROWS = 1024, 8  # blocks do not start for free: with more rows, a block takes up to eight


def combine(schedule: Schedule, partial_out: Array, partial_lse: Array, out: Array, lse: Array) -> tuple[Array, Array]:
    """Return `out` BF16 [B, rows, dims] and `lse` FP32 [B, rows], complete.

    Args:
        schedule: of the fragments.
        partial_out: FP32 [fragments, rows, dims].
        partial_lse: FP32 [fragments, rows].
        out: results of sequences with one fragment, in the place of which the complete ones are written.
        lse: likewise.
    """
    batch, num_rows, dims = out.shape
    ahead = min(MOST_AHEAD, 2 ** max(1, (len(schedule.parts) // batch).bit_length() - 1))
    rows = 1
    while rows < MOST_ROWS and batch * num_rows > MANY_ROWS * rows and num_rows % (2 * rows) == 0:
        rows *= 2
    layout = plgpu.Layout.WG_STRIDED((dims,), vec_size=dims // 128)

    def kernel(sequences_ref, partial_ref, partial_lse_ref, out_ref, lse_ref):
        row, sequence = lax.axis_index("row") * rows, lax.axis_index("sequence")
        first, count = sequences_ref[sequence, 0], sequences_ref[sequence, 1]

        def add(row, numbers, valid, largest, total, values):
            logs = [
                jnp.where(ok, partial_lse_ref[number, row], -jnp.inf) for number, ok in zip(numbers, valid, strict=True)
            ]
            read = [plgpu.load(partial_ref.at[number, row], layout=layout) for number in numbers]
            new = functools.reduce(jnp.maximum, logs, largest)
            faded = jnp.exp(largest - new)
            total, values = total * faded, values * faded
            for log, value in zip(logs, read, strict=True):
                weight = jnp.exp(log - new)
                total, values = total + weight, values + weight * value
            return new, total, values

        @pl.when(count != 1)
        def _():
            def some(i, carry):
                numbers = [first + jnp.minimum(i * ahead + k, count - 1) for k in range(ahead)]
                valid = [i * ahead + k < count for k in range(ahead)]
                return tuple(add(row + r, numbers, valid, *sums) for r, sums in enumerate(carry))

            zeros = plgpu.layout_cast(jnp.zeros((dims,), jnp.float32), layout)
            start = jnp.float32(LOWEST), jnp.float32(0), zeros
            sums = lax.fori_loop(0, pl.cdiv(count, ahead), some, (start,) * rows)
            for r, (largest, total, values) in enumerate(sums):
                empty = total == 0
                inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
                out_ref[sequence, row + r, :] = (values * inverse).astype(jnp.bfloat16)
                logarithm = largest + jnp.log(jnp.where(empty, 1.0, total))
                lse_ref[sequence, row + r] = jnp.where(empty, -jnp.inf, logarithm)

    layout_inference.install()
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        kernel,
        kernel_name="mla_decode_combine",
        out_type=(),
        grid=(num_rows // rows, batch),
        grid_names=("row", "sequence"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(schedule.sequences, partial_out, partial_lse, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)
