"""Rows in the order of their experts on Hopper: each assignment finds its place by counting, and takes its row there.

An assignment's rank is how many before it have its expert. A warpgroup holds the experts of all assignments in its
registers, takes a token, reads its row once, and counts for one of its assignments after the other; nothing waits for
anything, and rows that belong to no assignment are not written.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import num_multiprocessors
from pallas_kernels.lowering import layout_inference

LANES = 128  # of a warpgroup
BLOCKS = 4  # of a multiprocessor


def sort_rows(
    rows: Sequence[Array], gates_TK: Array, keys: Array, first_E: Array, n: int, num_rows: int
) -> tuple[tuple[Array, ...], Array, Array]:
    """Return rows and gates in the order of experts, and the row of each assignment.

    Args:
        rows: [T, D], and in FP8 the scales [D / 128, .].
        gates_TK: FP32.
        keys: int32, the expert of each assignment, E where there is none; filled up to a multiple of 128 with E.
        first_E: int32, the first visit of each expert.
        n: rows of a visit.
        num_rows: that there can be.

    Returns:
        rows [num_rows, D] (and scales [D / 128, num_rows]), FP32 gates [num_rows], and int32 [T, K], `num_rows` where
        there is no expert. Rows that no assignment has are not written.
    """
    (num_tokens, k), num_experts, width = gates_TK.shape, len(first_E), rows[0].shape[1]
    count, many = num_tokens * k, len(rows)
    places = plgpu.Layout.WG_STRIDED((len(keys),), vec_size=1)
    size = next(
        size for size in (16, 8, 4, 2, 1) if width % (LANES * size) == 0 and size * rows[0].dtype.itemsize <= 16
    )
    line = plgpu.Layout.WG_STRIDED((width,), vec_size=size)

    def kernel(*refs):
        inputs, (gates_ref, keys_ref, first_ref), refs = refs[:many], refs[many : many + 3], refs[many + 3 :]
        outputs, (out_gates, slots) = refs[:many], refs[many:]
        keys = plgpu.load(keys_ref, layout=places)
        before = plgpu.broadcasted_iota(jnp.int32, (len(keys),), 0, layout=places)
        own, blocks = lax.axis_index("block"), lax.axis_size("block")

        def store(number, row_of_token, scales_of_token):
            expert = keys_ref[number]
            rank = jnp.sum(jnp.where((keys == expert) & (before < number), 1, 0))

            @pl.when(expert < num_experts)
            def _():
                row = first_ref[jnp.minimum(expert, num_experts - 1)] * n + rank
                slots[number] = row
                out_gates[row] = gates_ref[number]
                outputs[0][row, :] = row_of_token
                for scales, out in zip(scales_of_token, outputs[1:], strict=True):
                    for group, scale in enumerate(scales):
                        out[group, row] = scale

            @pl.when(expert >= num_experts)
            def _():
                slots[number] = jnp.int32(num_rows)

        def one(turn, _):
            token = own + turn * blocks
            row = plgpu.load(inputs[0].at[token], layout=line)
            scales = [[ref[group, token] for group in range(ref.shape[0])] for ref in inputs[1:]]
            for i in range(k):
                store(token * k + i, row, scales)

        lax.fori_loop(0, lax.div(num_tokens - own + blocks - 1, jnp.int32(blocks)), one, None)

    layout_inference.install()
    out_type = [jax.ShapeDtypeStruct((num_rows, width), rows[0].dtype)]
    out_type += [jax.ShapeDtypeStruct((scales.shape[0], num_rows), scales.dtype) for scales in rows[1:]]
    *moved, gates, slots = plgpu.kernel(
        kernel,
        kernel_name="experts_decode_sort",
        out_type=[*out_type, jax.ShapeDtypeStruct((num_rows,), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)],
        grid=(min(num_tokens, BLOCKS * num_multiprocessors()),),
        grid_names=("block",),
    )(*rows, gates_TK.reshape(-1), keys, first_E)
    return tuple(moved), gates, slots.reshape(num_tokens, k)
