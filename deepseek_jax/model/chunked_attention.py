"""Attention in plain XLA: chunks of queries against the keys that they can see.

The backward pass remakes the weights from the saved logsumexp, so nothing of size S x M outlives its chunk. It is what
`model.flash` runs where there is no kernel, and the specification of those.

Where devices share a sequence (`parallel.context`), a chunk is computed against all keys: which of them it sees differs
from device to device, and they run one program. That is twice the arithmetic of causal attention.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.precision import Packed
from deepseek_jax.model.recompute import keep
from deepseek_jax.parallel import context
from deepseek_jax.parallel.mesh import vary

MOST_UNROLLED_CHUNKS = 8  # more chunks are scanned, so that the program does not grow with the sequence


class Masks(NamedTuple):
    """Which keys a query sees; None: not of this kind."""

    places_1S: jax.Array | None  # of the queries among the keys; None: they are the keys' own
    segments_BS: jax.Array | None  # of the queries
    segments_BM: jax.Array | None  # of the keys


def masks_of(length: int, segment_ids_BM: jax.Array | None) -> Masks:
    """Return the masks of this device's queries of rows of `length`."""
    places = context.places(length)[None] if context.size() > 1 else None
    return Masks(places, None if segment_ids_BM is None else context.local(segment_ids_BM), segment_ids_BM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def chunked(
    q_BSNQ: jax.Array, k_BMNQ: jax.Array, v_BMNH: jax.Array, masks: Masks, scale: float, chunk: int, packs: bool
) -> tuple[jax.Array, Packed | None]:
    """Attend with `chunk` queries at a time; return as `model.flash.attend`."""
    return _forward(q_BSNQ, k_BMNQ, v_BMNH, masks, scale, chunk, packs)[0]


def _forward(q_BSNQ, k_BMNQ, v_BMNH, masks, scale, chunk, packs):
    def block(_, start, end, q, places, segments):
        scores = _scores(q, places, start, segments, k_BMNQ[:, :end], _until(masks.segments_BM, end), scale)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        out = jnp.einsum(
            "bnsm,bmnh->bsnh", weights.astype(v_BMNH.dtype), v_BMNH[:, :end], preferred_element_type=jnp.float32
        )
        out = out / total.swapaxes(1, 2)[..., None]
        return None, (out.astype(v_BMNH.dtype), (top + jnp.log(total)).swapaxes(1, 2))

    arrays = q_BSNQ, masks.places_1S, masks.segments_BS
    _, (out_BSNH, lse_BSN) = _over_chunks(block, None, arrays, chunk, _keys_for_all(masks, k_BMNQ))
    kept = keep(Packed.of(out_BSNH, 2) if packs else out_BSNH, "attention_out")
    residuals = q_BSNQ, k_BMNQ, v_BMNH, masks, kept, keep(lse_BSN, "attention_out")
    return ((out_BSNH, kept) if packs else (kept, None)), residuals


def _backward(scale, chunk, packs, residuals, cotangents):
    q_BSNQ, k_BMNQ, v_BMNH, masks, kept, lse_BSN = residuals
    g_BSNH = cotangents[0]
    out_BSNH = kept.unpack(g_BSNH.shape) if packs else kept
    delta_BSN = jnp.einsum("bsnh,bsnh->bsn", g_BSNH, out_BSNH, preferred_element_type=jnp.float32)

    def block(sums, start, end, q, places, segments, g, delta, lse):
        dk, dv = sums
        keys, values = k_BMNQ[:, :end], v_BMNH[:, :end]
        weights = jnp.exp(
            _scores(q, places, start, segments, keys, _until(masks.segments_BM, end), scale)
            - lse.swapaxes(1, 2)[..., None]
        )
        dv = _add_in_front(
            dv, jnp.einsum("bnsm,bsnh->bmnh", weights.astype(g.dtype), g, preferred_element_type=jnp.float32)
        )
        dweights = jnp.einsum("bsnh,bmnh->bnsm", g, values, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta.swapaxes(1, 2)[..., None]) * scale).astype(q.dtype)
        dk = _add_in_front(dk, jnp.einsum("bnsm,bsnq->bmnq", dscores, q, preferred_element_type=jnp.float32))
        return (dk, dv), jnp.einsum("bnsm,bmnq->bsnq", dscores, keys)

    zeros = vary(jnp.zeros(k_BMNQ.shape), k_BMNQ), vary(jnp.zeros(v_BMNH.shape), v_BMNH)
    arrays = q_BSNQ, masks.places_1S, masks.segments_BS, g_BSNH, delta_BSN, lse_BSN
    (dk, dv), dq = _over_chunks(block, zeros, arrays, chunk, _keys_for_all(masks, k_BMNQ))
    return dq, dk.astype(k_BMNQ.dtype), dv.astype(v_BMNH.dtype), None


chunked.defvjp(_forward, _backward)


def _until(segments_BM, end):
    return None if segments_BM is None else segments_BM[:, :end]


def _keys_for_all(masks, k_BMNQ):
    """Return how many keys every chunk of queries may see; None: those up to its own end."""
    return None if masks.places_1S is None else k_BMNQ.shape[1]


def _add_in_front(total, part):
    """Add `part` to the first keys of `total`.

    `total.at[:, :end].add` crashes XLA:CPU on more than one device when `end` is the whole length (jax 0.11.2).
    """
    return lax.dynamic_update_slice_in_dim(total, total[:, : part.shape[1]] + part, 0, axis=1)


def _scores(q_BSNQ, places_1S, start, segments_BS, k_BMNQ, key_segments_BM, scale):
    """Masked FP32 scores [B, N, S, M] of a chunk of queries at `places_1S`, or else from place `start` on."""
    scores = jnp.einsum("bsnq,bmnq->bnsm", q_BSNQ, k_BMNQ, preferred_element_type=jnp.float32) * scale
    places_S = start + jnp.arange(q_BSNQ.shape[1]) if places_1S is None else places_1S[0]
    seen = places_S[:, None] >= jnp.arange(k_BMNQ.shape[1])
    if segments_BS is not None:
        seen = (seen & (segments_BS[:, :, None] == key_segments_BM[:, None, :]))[:, None]
    return jnp.where(seen, scores, -1e30)


def _over_chunks(block, carry, arrays, chunk, num_keys):
    """Fold `block(carry, start, end, *chunks) -> carry, outputs` over chunks of queries, which see keys before `end`.

    `end` is `num_keys`, or where that is None the end of the chunk. A few chunks are unrolled and skip the keys to
    their right; many are scanned, each against all keys. A barrier makes unrolled chunks wait for each other. Without
    it XLA computes the scores of all chunks first, which took four times the memory (measured, 8 chunks of 512).
    """
    length = arrays[0].shape[1]
    num = -(-length // chunk)
    if num <= MOST_UNROLLED_CHUNKS:
        outputs = []
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            chunks = jax.tree.map(lambda x, rows=slice(start, end): x[:, rows], arrays)
            end = num_keys or end
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
        return block(carry, start, num_keys or length, *chunks)

    carry, outputs = lax.scan(body, carry, (jnp.arange(num) * chunk, jax.tree.map(split, arrays)))
    return carry, jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num * chunk, *x.shape[3:])[:, :length], outputs
    )
