"""Multi-head latent attention (DeepSeek-V3 section 2.1.1, eq. 1-11), in its two equal forms.

Keys and values of all heads are linear in one latent c_KV of C channels per token; position enters by R rotary
channels, one key for all heads.

    c_Q = norm(x W_DQ)       q_h = [c_Q W_UQ,h ; rope(c_Q W_QR,h)]                 P + R channels
    c_KV = norm(x W_DKV)     k_h = [c_KV W_UK,h ; rope(x W_KR)]                    P + R
                             v_h = c_KV W_UV,h                                     H
    out = concat_h softmax(q_h k_h^T scale) v_h  W_O

Expanded (training and prefill): make k_h and v_h and call a flash attention of N heads with 192 / 128 dims. Arithmetic
per pair of tokens: N (P + R + H).

Absorbed (decoding, over a cache): q_h . (c_KV W_UK,h) = (q_h W_UK,h^T) . c_KV, so the queries move into latent space
and all heads attend to the C + R cached values themselves, like one key-value head of width 576; W_UV,h is applied to
the averaged latent. Arithmetic per pair: N (2C + R), 3.4 times more. But it reads 576 values per token instead of
N (P + R + H) = 40,960, and decoding is bound by memory.

The latent is normalised before it is cached and the rotary key rotated, so the cache holds what both forms use.

A layer attends in three steps: `project` makes queries and the cache entry of each new token, a form attends, `output`
projects back. A form is a value (`Attend`): `expanded(...)` below makes one, `model.absorbed` and `model.prefill` make
others.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.model import flash
from deepseek_jax.model.layers import gain, matrix, rms_norm
from deepseek_jax.model.linear import linear
from deepseek_jax.model.norm_linear import norm_linear
from deepseek_jax.model.precision import ATTENTION_OUTPUT, Packed
from deepseek_jax.model.recompute import keep
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.parallel import context

Table = tuple[jax.Array, jax.Array]  # cos and sin [B, S, R / 2]


class Entry(NamedTuple):
    """What a cache holds of each token: the normalised latent, and the rotated key that all heads share."""

    latent_BSC: jax.Array
    rotary_BSR: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """In place of a query weight: decoding has its columns in front of those of `kv_a_DC`, and one product of both."""

    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # shape of a token's queries

    def split(self, both: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the queries [..., *out], and the rest of the columns."""
        columns = math.prod(self.out)
        return both[..., :columns].reshape(*both.shape[:-1], *self.out), both[..., columns:]


class Attention(nnx.Module):
    """MLA with its norms.

    Heads stay a dim of the weights. `q_b_ANQ` holds content channels, then rotary ones; `kv_b_CNX` keys, then values.
    """

    def __init__(self, model: Model, rngs: nnx.Rngs):
        std = model.init_std
        self.model = model
        self.norm_D = gain(model.width)
        if model.query_latent:
            self.q_a_DA = matrix(rngs, "q_a_DA", (model.width, model.query_latent), std)
            self.q_norm_A = gain(model.query_latent)
            self.q_b_ANQ = matrix(rngs, "q_b_ANQ", (model.query_latent, model.num_heads, model.query_dim), std)
        else:
            self.q_DNQ = matrix(rngs, "q_DNQ", (model.width, model.num_heads, model.query_dim), std)
        self.kv_a_DC = matrix(rngs, "kv_a_DC", (model.width, model.kv_latent + model.rotary_dim), std)
        self.kv_norm_C = gain(model.kv_latent)
        kv_dims = model.num_heads, model.content_dim + model.value_dim
        self.kv_b_CNX = matrix(rngs, "kv_b_CNX", (model.kv_latent, *kv_dims), std)
        self.o_NHD = matrix(rngs, "o_NHD", (model.num_heads, model.value_dim, model.width), model.residual_std)

    def project(self, x_BSD: jax.Array, table: Table) -> tuple[jax.Array, Entry]:
        """Return q_BSNQ, content channels then rotated ones, and the cache entries of the same tokens."""
        model, eps = self.model, self.model.norm_eps
        queries = (self.q_a_DA if model.query_latent else self.q_DNQ).get_value()
        if isinstance(queries, Beside):
            (both_BSX,) = norm_linear(x_BSD, self.norm_D[...], eps, self.kv_a_DC.get_value())
            q, kv_BSC = queries.split(both_BSX)
        else:
            q, kv_BSC = norm_linear(x_BSD, self.norm_D[...], eps, queries, self.kv_a_DC.get_value())
        if model.query_latent:
            (q,) = norm_linear(keep(q, "query_latent"), self.q_norm_A[...], eps, self.q_b_ANQ.get_value())
        latent_BSC, rotary_BSR = lax.split(keep(kv_BSC, "kv_latent"), (model.kv_latent, model.rotary_dim), axis=2)
        q_BSNQ, latent_BSC = rotate(q, table), rms_norm(latent_BSC, self.kv_norm_C[...], eps)
        return q_BSNQ, Entry(latent_BSC, rotate(rotary_BSR, table))

    def expand(self, entry: Entry) -> tuple[jax.Array, jax.Array]:
        """Return keys [B, S, N, Q] and values [B, S, N, H] of all heads."""
        model = self.model
        kv_BSNX = linear(entry.latent_BSC, self.kv_b_CNX.get_value())
        content_BSNP, v_BSNH = lax.split(kv_BSNX, (model.content_dim, model.value_dim), axis=3)
        rotary_shape = *content_BSNP.shape[:3], model.rotary_dim
        rotary_BSNR = jnp.broadcast_to(entry.rotary_BSR[:, :, None], rotary_shape)
        return jnp.concatenate([content_BSNP, rotary_BSNR], axis=-1), v_BSNH

    def output(self, out_BSNH: jax.Array, packed: Packed | None = None) -> jax.Array:
        """Project the heads' outputs, which the core may have packed, back to [B, S, D]."""
        return linear(out_BSNH, self.o_NHD.get_value(), input_dims=2, recipe=ATTENTION_OUTPUT, packed=packed)


# (attention, x_BSD, the layer's cache) -> (output [B, S, D] without the residual, the cache)
Attend = Callable[[Attention, jax.Array, Any], tuple[jax.Array, Any]]


def expanded(execution: Execution, table: Table, segment_ids_BM: jax.Array | None) -> Attend:
    """Attend over the whole sequence without a cache: causal, and within segments if there are segment ids.

    Where devices share a sequence (`parallel.context`), each makes keys and values of all of it from gathered entries.
    Segment ids are those of the whole sequence there, too.
    """

    @jax.named_scope("attention")
    def attend(attention: Attention, x_BSD: jax.Array, cache: None) -> tuple[jax.Array, None]:
        q_BSNQ, entry = attention.project(x_BSD, table)
        k_BMNQ, v_BMNH = attention.expand(_whole(entry))
        scale = softmax_scale(attention.model)
        with jax.named_scope("attention_core"):
            out_BSNH, packed = flash.attend(execution, q_BSNQ, k_BMNQ, v_BMNH, segment_ids_BM, scale)
        return attention.output(out_BSNH, packed), cache

    return attend


def _whole(entry: Entry) -> Entry:
    """Return the entries of whole sequences, in one collective."""
    if context.size() == 1:
        return entry
    both_BMX = context.gathered(jnp.concatenate(entry, axis=-1))
    return Entry(*lax.split(both_BMX, (entry.latent_BSC.shape[-1], entry.rotary_BSR.shape[-1]), axis=2))
