"""Multi-token prediction (DeepSeek-V3 section 2.2): depth k predicts the token k positions further ahead.

Depth k continues from the state of depth k - 1, so every depth keeps the whole causal chain.

    h'_i = M_k [norm(Emb(t_{i+k})) ; norm(h_i^{k-1})]        i = 1 .. T - k, h^0 = the main model's final hidden state,
                                                             after its final norm
    h^k  = Block_k(h')                                       a full MoE layer with its own weights
    P    = softmax(Head(norm_k(h_i^k)))                      predicts t_{i+k+1}; embedding and head are the main model's

Worked example, five positions, t6 = target of position 5, depth 1:

    position i          1    2    3    4    5
    combines h_i with   t2   t3   t4   t5   -
    predicts            t3   t4   t5   t6   -             divided by T = 5, not by the 4 terms

The report writes [h; emb]. The released checkpoint, and every server that loads it, concatenates [emb; hnorm(h)] and
has a final norm of its own before the shared head, as here. Positions are those of h_i. Rows keep their length S: the
last k positions are computed and carry no loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.layer import Gather, MoELayer, Part, Streams, Tree, merge, run_layer
from deepseek_jax.model.layers import gain, matrix, rms_norm
from deepseek_jax.model.linear import linear
from deepseek_jax.model.moe import Observer
from deepseek_jax.parameters import CastWeight


class MtpLayer(nnx.Module):
    """One depth: `block` is an MoE layer of its own."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
        width = model.width
        self.model = model
        self.embed_norm_D = gain(width)
        self.hidden_norm_D = gain(width)
        self.merge_2DD = matrix(rngs, "merge_2DD", (2, width, width), model.init_std)
        self.block = MoELayer(model, rngs)
        self.final_norm_D = gain(width)

    def merge(self, embedded_BSD: jax.Array, hidden_BSD: jax.Array) -> jax.Array:
        """Return the input of the block, M_k [norm(Emb); norm(h)]."""
        eps = self.model.norm_eps
        embedded_BSD = rms_norm(embedded_BSD, self.embed_norm_D[...], eps)
        hidden_BSD = rms_norm(hidden_BSD, self.hidden_norm_D[...], eps)
        # One product: the sum of two would be rounded to BF16 twice.
        both_BS2D, weight = jnp.stack((embedded_BSD, hidden_BSD), axis=-2), self.merge_2DD.get_value()
        if isinstance(weight, CastWeight):
            return linear(both_BS2D, weight, input_dims=2)
        # The same product, whose sums XLA orders differently: runs in FP32 keep their bits.
        return jnp.einsum("bsnd,nde->bse", both_BS2D, weight)

    def final(self, hidden_BSD: jax.Array) -> jax.Array:
        """Apply the norm before the shared head; the next depth continues from its output too."""
        return rms_norm(hidden_BSD, self.final_norm_D[...], self.model.norm_eps)


def run_depth(
    model: Model,
    execution: Execution,
    parts: list[Part],
    gather: Gather,
    observe: Observer,
    layer: tuple[Tree, Tree],
    embedded: Streams,
    states: Streams,
) -> tuple[Streams, Any]:
    """Run one depth of multi-token prediction; return its states after its final norm, and what was observed."""
    params, bias = layer
    mtp = merge(MtpLayer, model, gather(params), bias)
    streams = tuple(mtp.merge(*both) for both in zip(embedded, states, strict=True))
    streams, _, observed = run_layer(mtp.block, execution, streams, parts, None, observe)
    return tuple(mtp.final(x_BSD) for x_BSD in streams), observed
