"""Rotary positions on interleaved channel pairs, with YaRN.

Channels 2i and 2i + 1 form a pair that is rotated by position * theta_i. (Hugging Face permutes the channels and
rotates halves. Scores are equal only if the checkpoint is permuted too; loading it unpermuted is silently wrong.)
YaRN (arXiv 2309.00071) slows the low frequencies down by `factor` and corrects twice: the frequencies here, and the
temperature of the softmax in `softmax_scale`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Model, Yarn


def frequencies(model: Model) -> np.ndarray:
    """Return theta_i of the R / 2 channel pairs in radians per position, FP64 on the host (with YaRN if enabled)."""
    dim = model.rotary_dim
    theta = model.rope_base ** (-np.arange(0, dim, 2) / dim)
    if not model.yarn.enabled:
        return theta
    low, high = _correction_range(model.yarn, dim, model.rope_base)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return theta * (1.0 - ramp) + theta / model.yarn.factor * ramp


def _correction_range(yarn: Yarn, dim: int, base: float) -> tuple[int, int]:
    """Return the ramp's first and last pair: they turn `beta_fast` and `beta_slow` times in the original length."""

    def pair(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), dim - 1)


def _mscale(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(model: Model) -> float:
    """Return (P + R)^-0.5, times mscale(mscale_all_dim)^2 if YaRN is enabled: 0.1352338 for the released V3."""
    scale = model.query_dim**-0.5
    return scale * _mscale(model.yarn.factor, model.yarn.mscale_all_dim) ** 2 if model.yarn.enabled else scale


def rotary_table(model: Model, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin [B, S, R / 2] in FP32; YaRN multiplies them by a ratio of two mscales, which is 1 for V3."""
    angles = positions_BS[..., None].astype(jnp.float32) * jnp.asarray(frequencies(model), jnp.float32)
    yarn = model.yarn
    ratio = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim) if yarn.enabled else 1.0
    return jnp.cos(angles) * ratio, jnp.sin(angles) * ratio


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the last R channels of x [B, S, ...] or [B, S, N, ...] as interleaved pairs; FP32 inside, cast back.

    The channels before them turn by the angle 0: one pass over all channels is cheaper than to take the rotary ones out
    and put them back.
    """
    cos, sin = (t if x.ndim == 3 else t[:, :, None] for t in table)
    still = ((0, 0),) * (x.ndim - 1) + ((x.shape[-1] // 2 - cos.shape[-1], 0),)
    cos, sin = jnp.pad(cos, still, constant_values=1.0)[..., None], jnp.pad(sin, still)[..., None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    quarter_turn = jnp.flip(pairs, -1) * jnp.array([-1.0, 1.0])  # (even, odd) -> (-odd, even)
    return (pairs * cos + quarter_turn * sin).reshape(x.shape).astype(x.dtype)
