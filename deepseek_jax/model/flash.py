"""The attention core: softmax(q k^T scale) v, causal within segments, never an S x S array in FP32.

Three implementations of one function, chosen by `execution.attention` (`parallel.program.resolve` turns "auto" into one
of them and logs why):

    xla      chunks of queries against the keys they can see, in plain XLA; the backward pass remakes the weights from
             the saved logsumexp, so nothing of size S x S outlives its chunk. Runs everywhere.
    cudnn    NVIDIA's flash attention. `jax.nn.dot_product_attention` refuses value heads narrower than key heads; the
             call beneath it takes 192/128 directly, which we measured 1.25x faster than padding the values. BF16 only,
             one segment per row.
    splash   the Pallas TPU kernel that ships with JAX, with segment ids. Speed on TPU is unmeasured.

For the backward pass a core keeps queries, keys, values, one statistic per token and head, and its output, which it
reads in one place: delta = sum over channels of dout out. In FP8 the output is kept in E5M6 and handed on in that form,
too, for the projection that follows (`model.precision`).

The two kernels do not declare varying axes, so inside the step's shard_map they run behind `_opaque`: forward and
backward are closed boxes, and their results are declared to vary as their inputs do. This is right because both passes
are local to a device.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Execution
from deepseek_jax.model.precision import Packed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel.mesh import vary
from pallas_kernels.lowering import manual_axes

MOST_UNROLLED_CHUNKS = 8  # more chunks are scanned, so that the program does not grow with the sequence


def attend(
    execution: Execution,
    q_BSNQ: jax.Array,
    k_BSNQ: jax.Array,
    v_BSNH: jax.Array,
    segment_ids_BS: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, Packed | None]:
    """Return out_BSNH; position s sees positions up to s, only of its own segment if there are segment ids.

    In FP8 also return what is kept of it: the same in E5M6, a row per token; otherwise None.

    Raises:
        ValueError: the implementation cannot do this (dtype, segments, sequence length), or is still "auto".
    """
    implementation, packs = execution.attention, execution.precision == "fp8"
    if implementation == "xla":
        return _xla(q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, scale, execution.attention_chunk, packs)
    if implementation == "cudnn":
        if q_BSNQ.dtype != jnp.bfloat16 or segment_ids_BS is not None:
            raise ValueError(
                "execution.attention = 'cudnn' takes BF16 and one segment per row; use precision 'bf16' or 'fp8' and no"
                " segment ids, or attention = 'xla'"
            )
        return _opaque(
            functools.partial(_cudnn, scale), _Layout(heads_first=False) if packs else None, q_BSNQ, k_BSNQ, v_BSNH
        )
    if implementation == "splash":
        return _splash(scale, q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, packs)
    raise ValueError(f"execution.attention = {implementation!r} is not resolved; call parallel.program.resolve first")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _xla(q_BSNQ, k_BMNQ, v_BMNH, segments_BS, scale, chunk, packs):
    return _xla_forward(q_BSNQ, k_BMNQ, v_BMNH, segments_BS, scale, chunk, packs)[0]


def _xla_forward(q_BSNQ, k_BMNQ, v_BMNH, segments_BS, scale, chunk, packs):
    def block(_, start, end, q, segments):
        scores = _scores(start, q, segments, k_BMNQ[:, :end], _until(segments_BS, end), scale)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        out = jnp.einsum(
            "bnsm,bmnh->bsnh", weights.astype(v_BMNH.dtype), v_BMNH[:, :end], preferred_element_type=jnp.float32
        )
        out = out / total.swapaxes(1, 2)[..., None]
        return None, (out.astype(v_BMNH.dtype), (top + jnp.log(total)).swapaxes(1, 2))

    _, (out_BSNH, lse_BSN) = _over_chunks(block, None, (q_BSNQ, segments_BS), chunk)
    kept = keep(Packed.of(out_BSNH, 2) if packs else out_BSNH, "attention_out")
    residuals = q_BSNQ, k_BMNQ, v_BMNH, segments_BS, kept, keep(lse_BSN, "attention_out")
    return ((out_BSNH, kept) if packs else (kept, None)), residuals


def _xla_backward(scale, chunk, packs, residuals, cotangents):
    q_BSNQ, k_BMNQ, v_BMNH, segments_BS, kept, lse_BSN = residuals
    g_BSNH = cotangents[0]
    out_BSNH = kept.unpack(g_BSNH.shape) if packs else kept
    delta_BSN = jnp.einsum("bsnh,bsnh->bsn", g_BSNH, out_BSNH, preferred_element_type=jnp.float32)

    def block(sums, start, end, q, segments, g, delta, lse):
        dk, dv = sums
        keys, values = k_BMNQ[:, :end], v_BMNH[:, :end]
        weights = jnp.exp(
            _scores(start, q, segments, keys, _until(segments_BS, end), scale) - lse.swapaxes(1, 2)[..., None]
        )
        dv = _add_in_front(
            dv, jnp.einsum("bnsm,bsnh->bmnh", weights.astype(g.dtype), g, preferred_element_type=jnp.float32)
        )
        dweights = jnp.einsum("bsnh,bmnh->bnsm", g, values, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta.swapaxes(1, 2)[..., None]) * scale).astype(q.dtype)
        dk = _add_in_front(dk, jnp.einsum("bnsm,bsnq->bmnq", dscores, q, preferred_element_type=jnp.float32))
        return (dk, dv), jnp.einsum("bnsm,bmnq->bsnq", dscores, keys)

    zeros = vary(jnp.zeros(k_BMNQ.shape), k_BMNQ), vary(jnp.zeros(v_BMNH.shape), v_BMNH)
    (dk, dv), dq = _over_chunks(block, zeros, (q_BSNQ, segments_BS, g_BSNH, delta_BSN, lse_BSN), chunk)
    return dq, dk.astype(k_BMNQ.dtype), dv.astype(v_BMNH.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def _until(segments_BS, end):
    return None if segments_BS is None else segments_BS[:, :end]


def _add_in_front(total, part):
    """Add `part` to the first keys of `total`.

    `total.at[:, :end].add` crashes XLA:CPU on more than one device when `end` is the whole length (jax 0.11.2).
    """
    return lax.dynamic_update_slice_in_dim(total, total[:, : part.shape[1]] + part, 0, axis=1)


def _scores(start, q_BSNQ, segments_BS, k_BMNQ, key_segments_BM, scale):
    """Masked FP32 scores [B, N, S, M] of a chunk of queries that begins at position `start`."""
    scores = jnp.einsum("bsnq,bmnq->bnsm", q_BSNQ, k_BMNQ, preferred_element_type=jnp.float32) * scale
    seen = start + jnp.arange(q_BSNQ.shape[1])[:, None] >= jnp.arange(k_BMNQ.shape[1])
    if segments_BS is not None:
        seen = (seen & (segments_BS[:, :, None] == key_segments_BM[:, None, :]))[:, None]
    return jnp.where(seen, scores, -1e30)


def _over_chunks(block, carry, arrays, chunk):
    """Fold `block(carry, start, end, *chunks) -> carry, outputs` over chunks of queries, which see keys before `end`.

    A few chunks are unrolled and skip the keys to their right; many are scanned, each against all keys. A barrier makes
    unrolled chunks wait for each other. Without it XLA computes the scores of all chunks first, which took four times
    the memory (measured, 8 chunks of 512).
    """
    length = arrays[0].shape[1]
    num = -(-length // chunk)
    if num <= MOST_UNROLLED_CHUNKS:
        outputs = []
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            chunks = jax.tree.map(lambda x, rows=slice(start, end): x[:, rows], arrays)
            if outputs:
                chunks, carry, outputs[-1] = lax.optimization_barrier((chunks, carry, outputs[-1]))
            carry, out = block(carry, start, end, *chunks)
            outputs.append(out)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *outputs)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, num * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], num, chunk, *x.shape[2:]), 1, 0)

    def body(carry, inputs):
        start, chunks = inputs
        return block(carry, start, length, *chunks)

    carry, outputs = lax.scan(body, carry, (jnp.arange(num) * chunk, jax.tree.map(split, arrays)))
    return carry, jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num * chunk, *x.shape[3:])[:, :length], outputs
    )


class _Layout(NamedTuple):
    """How a kernel's output becomes rows of tokens, which are packed, and back."""

    heads_first: bool  # [B, N, S, H], or [B, S, N, H]

    def pack(self, out: jax.Array) -> Packed:
        return Packed.of(out.swapaxes(1, 2) if self.heads_first else out, 2)

    def unpack(self, packed: Packed, like: jax.Array) -> jax.Array:
        if not self.heads_first:
            return packed.unpack(like.shape)
        batch, heads, length, dim = like.shape
        return packed.unpack((batch, length, heads, dim)).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _opaque(
    kernel: Callable[..., jax.Array], layout: _Layout | None, *args: jax.Array
) -> tuple[jax.Array, Packed | None]:
    """Run a kernel that declares no varying axes inside a shard_map that checks them.

    The kernel's float arguments come first and have gradients. Its output is kept in E5M6, and returned in that form,
    too, if its layout is given.
    """
    with manual_axes.unchecked():
        out = kernel(*manual_axes.invariant(args))
    out = vary(out, args[0])
    return out, layout and layout.pack(out)


def _opaque_forward(kernel, layout, *args):
    inner = manual_axes.invariant(args)
    with manual_axes.unchecked():
        out, pull = jax.vjp(functools.partial(_call_with_rest, kernel, inner), *_floats(inner))
    outer = vary(out, args[0])
    kept = keep(layout.pack(outer) if layout else outer, "attention_out")

    def residual(leaf):
        """Return an argument as it came; keep what the kernel made (output, softmax statistics).

        The recomputation policy thus decides about the arguments.
        """
        for known, outer in zip((*inner, out), (*args, kept), strict=True):
            if leaf is known:
                return outer
        return keep(vary(leaf, args[0]), "attention_out")

    return ((outer, kept) if layout else (kept, None)), (jax.tree.map(residual, pull), len(args))


def _opaque_backward(kernel, layout, residuals, cotangents):
    (pull, num_args), (g, _) = residuals, cotangents
    pull = jax.tree.map(
        lambda x: layout.unpack(x, g) if isinstance(x, Packed) else x, pull, is_leaf=lambda x: isinstance(x, Packed)
    )
    with manual_axes.unchecked():
        grads = manual_axes.invariant(pull)(manual_axes.invariant(g))
    return *(vary(grad, g) for grad in grads), *(None,) * (num_args - len(grads))


_opaque.defvjp(_opaque_forward, _opaque_backward)


def _floats(args):
    return tuple(arg for arg in args if jnp.issubdtype(arg.dtype, jnp.floating))


def _call_with_rest(kernel, args, *floats):
    return kernel(*floats, *args[len(floats) :])


def _cudnn(scale, q_BSNQ, k_BSNQ, v_BSNH):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q_BSNQ, k_BSNQ, v_BSNH, scale=scale, mask_type=MaskType.CAUSAL)


def _splash(scale, q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, packs):
    # The kernel takes no scale. A scale rounded to BF16 would change all scores by 0.2%, so multiply in FP32.
    q_BSNQ = (q_BSNQ.astype(jnp.float32) * scale).astype(q_BSNQ.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (q_BSNQ, k_BSNQ, v_BSNH))
    segments = () if segment_ids_BS is None else (segment_ids_BS,)
    layout = _Layout(heads_first=True) if packs else None
    out_BNSH, packed = _opaque(_splash_kernel, layout, *heads_first, *segments)
    return out_BNSH.swapaxes(1, 2), packed


def _splash_kernel(q_BNSQ, k_BNSQ, v_BNSH, segment_ids_BS=None):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    num_heads, length = q_BNSQ.shape[1:3]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=_splash_blocks(length))
    if segment_ids_BS is None:
        return jax.vmap(kernel)(q_BNSQ, k_BNSQ, v_BNSH)
    segments = splash_attention_kernel.SegmentIds(q=segment_ids_BS, kv=segment_ids_BS)
    return jax.vmap(kernel)(q_BNSQ, k_BNSQ, v_BNSH, segments)


def _splash_blocks(length: int):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

    size = next((block for block in (512, 256, 128) if length % block == 0), None)
    if size is None:
        raise ValueError(f"sequence_length = {length}: splash attention on TPU needs a multiple of 128")
    names = (
        "block_q",
        "block_kv",
        "block_kv_compute",
        "block_q_dkv",
        "block_kv_dkv",
        "block_kv_dkv_compute",
        "block_q_dq",
        "block_kv_dq",
    )
    return BlockSizes(**dict.fromkeys(names, size))
