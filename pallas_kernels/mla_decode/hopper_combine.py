"""The results of a sequence's fragments, added up on Hopper: sum of w_f o_f with w_f = exp(lse_f - lse).

A thread block per sequence and some of its rows. It leaves sequences of one fragment alone, whose results are in place,
and gives an empty sequence its zeros.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowering import layout_inference
from pallas_kernels.mla_decode.schedule import Schedule

AHEAD = 4  # fragments that are read together
LOWEST = -1e30


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

    def kernel(sequences_ref, partial_ref, partial_lse_ref, out_ref, lse_ref):
        row, sequence = lax.axis_index("row"), lax.axis_index("sequence")
        first, count = sequences_ref[sequence, 0], sequences_ref[sequence, 1]

        @pl.when(count != 1)
        def _():
            def some(i, carry):
                largest, total, values = carry
                numbers = [first + jnp.minimum(i * AHEAD + k, count - 1) for k in range(AHEAD)]
                logs = [partial_lse_ref[number, row] for number in numbers]
                logs = [jnp.where(i * AHEAD + k < count, x, -jnp.inf) for k, x in enumerate(logs)]
                read = [plgpu.load(partial_ref.at[number, row], layout=L, optimized=True) for number in numbers]
                new = largest
                for x in logs:
                    new = jnp.maximum(new, x)
                faded = jnp.exp(largest - new)
                total, values = total * faded, values * faded
                for x, value in zip(logs, read, strict=True):
                    weight = jnp.exp(x - new)
                    total, values = total + weight, values + weight * value
                return new, total, values

            L = plgpu.Layout.WG_STRIDED((dims,), vec_size=dims // 128)
            zeros = plgpu.layout_cast(jnp.zeros((dims,), jnp.float32), L)
            start = jnp.float32(LOWEST), jnp.float32(0), zeros
            largest, total, values = lax.fori_loop(0, pl.cdiv(count, AHEAD), some, start)
            empty = total == 0
            inverse = jnp.where(empty, 0.0, 1 / jnp.where(empty, 1.0, total))
            out_ref[sequence, row, :] = (values * inverse).astype(jnp.bfloat16)
            lse_ref[sequence, row] = jnp.where(empty, -jnp.inf, largest + jnp.log(jnp.where(empty, 1.0, total)))

    layout_inference.install()
    out, lse = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        kernel,
        kernel_name="mla_decode_combine",
        out_type=(),
        grid=(num_rows, batch),
        grid_names=("row", "sequence"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(schedule.sequences, partial_out, partial_lse, out, lse)
    return jax.freeze(out), jax.freeze(lse)
