"""The attention core: softmax(q k^T scale) v, causal within segments, never an S x S array in FP32.

Three implementations of one function, chosen by `execution.attention` (`config.resolve` turns "auto" into one of them and says why):

    xla      blocks of queries against all keys, recomputed in the backward pass. Runs everywhere; does twice the causal arithmetic.
    cudnn    NVIDIA's flash attention. `jax.nn.dot_product_attention` refuses value heads narrower than key heads; the call beneath it takes
             192/128 directly, which was measured 1.25x faster than padding the values. BF16 only, one segment per row.
    splash   the Pallas TPU kernel that ships with JAX, with segment ids. Speed on TPU is unmeasured.

The two kernels know nothing of varying axes, so inside the step's shard_map they run behind `_opaque`: forward and backward as
closed boxes whose results are declared to vary as their inputs do. That is right because both are local to a device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config as jax_config  # the switch of shard_map's check_vma; there is no public scope for a single call
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import vary


def attend(config: Config, q_BSNQ: jax.Array, k_BSNQ: jax.Array, v_BSNH: jax.Array, segment_ids_BS: jax.Array, scale: float) -> jax.Array:
    """Return out_BSNH; position s sees positions up to s with its own segment id. Segment 0 is padding and sees itself.

    Raises:
        ValueError: the implementation asked for cannot do this (dtype, segments).
    """
    implementation = config.execution.attention
    if implementation == "xla":
        return _xla(q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, scale, config.execution.attention_chunk)
    if implementation == "cudnn":
        if q_BSNQ.dtype != jnp.bfloat16 or config.data.mask_documents:
            raise ValueError("execution.attention = 'cudnn' needs precision 'bf16' and data.mask_documents = False; use 'auto' or 'xla'")
        return _opaque(functools.partial(_cudnn, scale), q_BSNQ, k_BSNQ, v_BSNH)
    if implementation == "splash":
        return _opaque(functools.partial(_splash, scale), q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS)
    raise ValueError(f"execution.attention = {implementation!r} is not resolved; call deepseek_jax.config.resolve first")


def _xla(q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, scale, chunk):
    length = q_BSNQ.shape[1]

    def block(q, segments, start):
        scores = jnp.einsum("bsnq,bmnq->bnsm", q, k_BSNQ, preferred_element_type=jnp.float32) * scale
        causal = start + jnp.arange(q.shape[1])[:, None] >= jnp.arange(length)
        seen = causal & (segments[:, :, None] == segment_ids_BS[:, None, :])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bnsm,bmnh->bsnh", weights.astype(v_BSNH.dtype), v_BSNH)

    if length <= chunk:
        return block(q_BSNQ, segment_ids_BS, 0)
    blocks = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, chunk, *x.shape[2:]), 1, 0)

    def body(_, inputs):
        return None, jax.checkpoint(block, prevent_cse=False)(*inputs)

    _, out = lax.scan(body, None, (split(q_BSNQ), split(segment_ids_BS), jnp.arange(blocks) * chunk))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], blocks * chunk, *out.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _opaque(kernel: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Run a kernel that declares no varying axes inside a shard_map that checks them."""
    with jax_config._check_vma(False):
        out = kernel(*args)
    return vary(out, args[0])


def _opaque_forward(kernel, *args):
    floats, rest = _split_floats(args)
    with jax_config._check_vma(False):
        out, pull = jax.vjp(lambda *f: kernel(*f, *rest), *floats)
        leaves, tree = jax.tree.flatten(pull)
    # Worth keeping: the output and the softmax statistics. Queries and keys are wider and are remade from the latents.
    keep = [leaf.ndim < out.ndim or leaf.shape == out.shape for leaf in leaves]
    leaves = [
        checkpoint_name(vary(leaf, args[0]), "attention_out" if kept else "attention_input")
        for leaf, kept in zip(leaves, keep, strict=True)
    ]
    return checkpoint_name(vary(out, args[0]), "attention_out"), (jax.tree.unflatten(tree, leaves), len(rest))


def _opaque_backward(kernel, residuals, g):
    pull, num_rest = residuals
    with jax_config._check_vma(False):
        grads = pull(g)
    return *(vary(grad, g) for grad in grads), *(None,) * num_rest


_opaque.defvjp(_opaque_forward, _opaque_backward)


def _split_floats(args):
    floats = tuple(arg for arg in args if jnp.issubdtype(arg.dtype, jnp.floating))
    return floats, args[len(floats) :]


def _cudnn(scale, q_BSNQ, k_BSNQ, v_BSNH):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q_BSNQ, k_BSNQ, v_BSNH, scale=scale, mask_type=MaskType.CAUSAL)


def _splash(scale, q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, num_heads = q_BSNQ.shape[1:3]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=_splash_blocks(length))
    segments = splash_attention_kernel.SegmentIds(q=segment_ids_BS, kv=segment_ids_BS)
    heads_first = (x.swapaxes(1, 2) for x in (q_BSNQ * np.float32(scale).astype(q_BSNQ.dtype), k_BSNQ, v_BSNH))
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)


def _splash_blocks(length: int):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

    size = next((block for block in (512, 256, 128) if length % block == 0), None)
    if size is None:
        raise ValueError(f"sequence_length = {length}: splash attention on TPU needs a multiple of 128")
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return BlockSizes(**dict.fromkeys(names, size))
