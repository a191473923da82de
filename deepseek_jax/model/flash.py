"""The attention core: softmax(q k^T scale) v, causal within segments, never an S x S array in FP32.

Three implementations of one function, chosen by `execution.attention` (`parallel.program.resolve` turns "auto" into one
of them and logs why):

    xla      chunks of queries in plain XLA (`model.chunked_attention`). Runs everywhere.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Execution
from deepseek_jax.model.chunked_attention import chunked, masks_of
from deepseek_jax.model.precision import Packed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel import context
from deepseek_jax.parallel.mesh import vary
from pallas_kernels.lowering import manual_axes


def attend(
    execution: Execution,
    q_BSNQ: jax.Array,
    k_BMNQ: jax.Array,
    v_BMNH: jax.Array,
    segment_ids_BM: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, Packed | None]:
    """Return out_BSNH; position s sees positions up to s, only of its own segment if there are segment ids.

    Where devices share a sequence (`parallel.context`), queries are those of this device's tokens, keys of all.

    In FP8 also return what is kept of it: the same in E5M6, a row per token; otherwise None.

    Raises:
        ValueError: the implementation cannot do this (dtype, segments, sequence length), or is still "auto".
    """
    implementation, packs = execution.attention, execution.precision == "fp8"
    if implementation == "xla":
        masks = masks_of(k_BMNQ.shape[1], segment_ids_BM)
        return chunked(q_BSNQ, k_BMNQ, v_BMNH, masks, scale, execution.attention_chunk, packs)
    if implementation == "cudnn":
        if q_BSNQ.dtype != jnp.bfloat16 or segment_ids_BM is not None or context.size() > 1:
            raise ValueError(
                "execution.attention = 'cudnn' takes BF16 and one segment per row, which no devices share; use"
                " precision 'bf16' or 'fp8', no segment ids and mesh.context = 1, or attention = 'xla'"
            )
        return _opaque(
            functools.partial(_cudnn, scale), _Layout(heads_first=False) if packs else None, q_BSNQ, k_BMNQ, v_BMNH
        )
    if implementation == "splash":
        return _splash(scale, q_BSNQ, k_BMNQ, v_BMNH, segment_ids_BM, packs)
    raise ValueError(f"execution.attention = {implementation!r} is not resolved; call parallel.program.resolve first")


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


def _splash(scale, q_BSNQ, k_BMNQ, v_BMNH, segment_ids_BM, packs):
    # The kernel takes no scale. A scale rounded to BF16 would change all scores by 0.2%, so multiply in FP32.
    q_BSNQ = (q_BSNQ.astype(jnp.float32) * scale).astype(q_BSNQ.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (q_BSNQ, k_BMNQ, v_BMNH))
    segments = () if segment_ids_BM is None else (context.local(segment_ids_BM), segment_ids_BM)
    layout = _Layout(heads_first=True) if packs else None
    kernel = _splash_kernel if context.size() == 1 else _shared_splash_kernel
    place = () if context.size() == 1 else (context.place(),)
    out_BNSH, packed = _opaque(kernel, layout, *heads_first, *place, *segments)
    return out_BNSH.swapaxes(1, 2), packed


def _splash_kernel(q_BNSQ, k_BNMQ, v_BNMH, *segments):
    return _run_splash(_splash_of(q_BNSQ.shape[1], np.arange(q_BNSQ.shape[2]), 1), q_BNSQ, k_BNMQ, v_BNMH, segments)


def _shared_splash_kernel(q_BNSQ, k_BNMQ, v_BNMH, place, *segments):
    """Attend with this device's queries of shared rows: the kernel has lists of blocks for each, of one shape."""
    devices = context.size()
    kernel = _splash_of(q_BNSQ.shape[1], context.order_of_devices(k_BNMQ.shape[2]), devices)

    def own(name, x):
        """Return this device's part of a list, whose dim 1 is blocks of queries, or of the queries' places."""
        dim = 0 if name == "q_sequence" else 1
        size = x.shape[dim] // devices
        return lax.dynamic_slice_in_dim(x, place * size, size, dim)

    lists: Any
    lists, options = kernel.tree_flatten()
    infos: list[Any] = [
        info._replace(**{name: own(name, x) for name, x in info._asdict().items() if isinstance(x, jax.Array)})
        for info in lists
    ]
    return _run_splash(type(kernel)(*infos, **options), q_BNSQ, k_BNMQ, v_BNMH, segments)


def _splash_of(num_heads: int, places_S: np.ndarray, devices: int):
    """Return the kernel for queries at `places_S` of a row, cut over so many devices, and keys of the whole row."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.MultiHeadMask([_causal_mask_of()(places_S)] * num_heads)
    blocks = _splash_blocks(len(places_S) // devices)
    return splash_attention_kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=devices)


@functools.cache
def _causal_mask_of():
    """Return the class of causal masks of queries in another order than their keys.

    The kernel asks of each block of 512 x 512 whether all or any of it is seen. For most blocks their edges tell it; at
    128K, with 65,536 blocks, to compare all of their places takes a minute of a core.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask

    class CausalMaskOf(CausalMask):
        def __init__(self, places_S: np.ndarray):
            super().__init__((len(places_S), len(places_S)))
            self.q_sequence = places_S.astype(np.int32)

        def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
            queries, keys = self.q_sequence[block[0]], block[1]
            if queries.min() >= keys.stop - 1 or queries.max() < keys.start:
                return np.full((1, 1), queries.min() >= keys.stop - 1)
            return super().__getitem__(block)

    return CausalMaskOf


def _run_splash(kernel, q_BNSQ, k_BNMQ, v_BNMH, segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    if not segments:
        return jax.vmap(kernel)(q_BNSQ, k_BNMQ, v_BNMH)
    return jax.vmap(kernel)(q_BNSQ, k_BNMQ, v_BNMH, splash_attention_kernel.SegmentIds(*segments))


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
