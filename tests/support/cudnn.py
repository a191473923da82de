"""A stand-in for cuDNN's attention on machines without a GPU."""

import jax
import jax.numpy as jnp


def causal_attention(q, k, v, *, scale, mask_type, return_residual):
    """What cuDNN returns for these options: outputs [B, S, N, H], and the log-sum-exp [B, N, S]."""
    assert mask_type.name == "CAUSAL" and return_residual
    scores = jnp.einsum("bsnq,bmnq->bnsm", q, k) * scale
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("bnsm,bmnh->bsnh", jnp.exp(scores - lse[..., None]), v), lse
