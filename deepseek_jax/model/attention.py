"""Multi-head latent attention (DeepSeek-V3 section 2.1.1, eq. 1-11), in its two equal forms.

Keys and values of all heads are linear in one latent c_KV of C channels per token; position enters by R rotary
channels, one key for all heads.

    c_Q = norm(x W_DQ)       q_h = [c_Q W_UQ,h ; rope(c_Q W_QR,h)]                 P + R channels
    c_KV = norm(x W_DKV)     k_h = [c_KV W_UK,h ; rope(x W_KR)]                    P + R
                             v_h = c_KV W_UV,h                                     H
    out = concat_h softmax(q_h k_h^T scale) v_h  W_O

Expanded (training, prefill): make k_h and v_h and call a flash attention of N heads with 192 / 128 dims. Arithmetic per
pair of tokens: N (P + R + H).

Absorbed (decoding): q_h . (c_KV W_UK,h) = (q_h W_UK,h^T) . c_KV, so the queries move into latent space and all heads
attend to the C + R cached values themselves, like one key-value head of width 576; W_UV,h is applied to the averaged
latent. Arithmetic per pair: N (2C + R), 3.4 times more, but the memory read per token is 576 values instead of N (P + R
+ H) = 40,960, and decoding is bound by memory.

The latent is normalised before it is cached and the rotary key rotated, so the cache holds what both forms use.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.model import flash
from deepseek_jax.model.layers import gain, matrix, rms_norm
from deepseek_jax.model.linear import linear
from deepseek_jax.model.norm_linear import norm_linear
from deepseek_jax.model.precision import ATTENTION_OUTPUT
from deepseek_jax.model.recompute import keep
from deepseek_jax.model.rope import rotate, softmax_scale

Table = tuple[jax.Array, jax.Array]  # cos and sin [B, S, R / 2]


class Attention(nnx.Module):
    """MLA with its norms. Head dims stay dims of the weights: `q_b_ANQ` holds content then rotary channels, `kv_b_CNX`
    keys then values.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, std = config.model, config.model.init_std
        self.config = config
        self.norm_D = gain(model.width)
        if model.query_latent:
            self.q_a_DA = matrix(rngs, "q_a_DA", (model.width, model.query_latent), std)
            self.q_norm_A = gain(model.query_latent)
            self.q_b_ANQ = matrix(rngs, "q_b_ANQ", (model.query_latent, model.num_heads, model.query_dim), std)
        else:
            self.q_DNQ = matrix(rngs, "q_DNQ", (model.width, model.num_heads, model.query_dim), std)
        self.kv_a_DC = matrix(rngs, "kv_a_DC", (model.width, model.kv_latent + model.rotary_dim), std)
        self.kv_norm_C = gain(model.kv_latent)
        self.kv_b_CNX = matrix(
            rngs, "kv_b_CNX", (model.kv_latent, model.num_heads, model.content_dim + model.value_dim), std
        )
        self.o_NHD = matrix(rngs, "o_NHD", (model.num_heads, model.value_dim, model.width), model.residual_std)

    @jax.named_scope("attention")
    def __call__(self, x_BSD: jax.Array, table: Table, segment_ids_BS: jax.Array) -> jax.Array:
        """Expanded form, causal within each segment. Maps [B, S, D] to [B, S, D]; the caller adds the residual."""
        model = self.config.model
        q_BSNQ, latent_BSC, rotary_BSR = self._project(x_BSD, table)
        kv_BSNX = linear(latent_BSC, self.kv_b_CNX.get_value())
        content_BSNP, v_BSNH = lax.split(kv_BSNX, (model.content_dim, model.value_dim), axis=3)
        rotary_BSNR = jnp.broadcast_to(rotary_BSR[:, :, None], (*q_BSNQ.shape[:3], model.rotary_dim))
        k_BSNQ = jnp.concatenate([content_BSNP, rotary_BSNR], axis=-1)
        with jax.named_scope("attention_core"):
            out_BSNH = flash.attend(self.config, q_BSNQ, k_BSNQ, v_BSNH, segment_ids_BS, softmax_scale(model))
        return linear(out_BSNH, self.o_NHD.get_value(), input_dims=2, recipe=ATTENTION_OUTPUT)

    def absorbed(
        self, x_BSD: jax.Array, table: Table, cache: dict[str, jax.Array], positions_BS: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Absorbed form over the latent cache.

        Args:
            x_BSD: residual stream of the new tokens.
            table: rotary table of `positions_BS`.
            cache: `latent` [B, M, C] and `rotary` [B, M, R]; slots not yet written get weight zero; they must be
                finite.
            positions_BS: cache slots of the new tokens, at which they are written; they attend to slots up to their
                own.

        Returns:
            The layer's output [B, S, D] and the cache with the new tokens in it.
        """
        model = self.config.model
        q_BSNQ, latent_BSC, rotary_BSR = self._project(x_BSD, table)
        rows = jnp.arange(x_BSD.shape[0])[:, None]
        latent_BMC = cache["latent"].at[rows, positions_BS].set(latent_BSC.astype(cache["latent"].dtype))
        rotary_BMR = cache["rotary"].at[rows, positions_BS].set(rotary_BSR.astype(cache["rotary"].dtype))

        key_CNP, value_CNH = lax.split(self.kv_b_CNX[...], (model.content_dim, model.value_dim), axis=2)
        q_BSNC = jnp.einsum("bsnp,cnp->bsnc", q_BSNQ[..., : model.content_dim], key_CNP)
        scores = jnp.einsum("bsnc,bmc->bnsm", q_BSNC, latent_BMC, preferred_element_type=jnp.float32)
        scores += jnp.einsum(
            "bsnr,bmr->bnsm", q_BSNQ[..., model.content_dim :], rotary_BMR, preferred_element_type=jnp.float32
        )
        seen = jnp.arange(latent_BMC.shape[1]) <= positions_BS[:, None, :, None]
        weights = jax.nn.softmax(jnp.where(seen, scores * softmax_scale(model), -jnp.inf), axis=-1).astype(x_BSD.dtype)
        mean_BSNC = jnp.einsum("bnsm,bmc->bsnc", weights, latent_BMC)
        out_BSNH = jnp.einsum("bsnc,cnh->bsnh", mean_BSNC, value_CNH)
        return linear(out_BSNH, self.o_NHD.get_value(), input_dims=2, recipe=ATTENTION_OUTPUT), {
            "latent": latent_BMC,
            "rotary": rotary_BMR,
        }

    def _project(self, x_BSD: jax.Array, table: Table) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return q_BSNQ, content then rotated channels, and what a cache holds: normalised latent [B, S, C] and rotated
        key [B, S, R].
        """
        model, eps = self.config.model, self.config.model.norm_eps
        queries = self.q_a_DA if model.query_latent else self.q_DNQ
        q, kv_BSC = norm_linear(x_BSD, self.norm_D[...], eps, queries.get_value(), self.kv_a_DC.get_value())
        if model.query_latent:
            (q,) = norm_linear(keep(q, "query_latent"), self.q_norm_A[...], eps, self.q_b_ANQ.get_value())
        latent_BSC, rotary_BSR = lax.split(keep(kv_BSC, "kv_latent"), (model.kv_latent, model.rotary_dim), axis=2)
        return rotate(q, table), rms_norm(latent_BSC, self.kv_norm_C[...], eps), rotate(rotary_BSR, table)
