"""From logits to the next token: greedy, or temperature, then top-k, then top-p, then one draw.

Each restriction returns logits with -inf for the tokens that it rules out, so restrictions compose. The draw is
`jax.random.categorical`: it adds Gumbel noise and takes the maximum. The distribution is that of the released script,
which divides probabilities by exponential noise.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

# Below this temperature the quotient leaves FP32 (1e-45 is even 0 in it), and a draw is the maximum anyway.
COLDEST = 1e-30
NO_TOKEN = -1  # in place of an id where the logits are not numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Hashable, so a compiled decoding step contains only what its settings need.

    Attributes:
        temperature: divides the logits; 0 is greedy, and so is anything below `COLDEST`.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability; 1 keeps all.
    """

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self):
        """Refuse values outside their range, NaN included."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be finite and at least 0; 0 decodes greedily")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be at least 0; 0 keeps every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p} is a probability in (0, 1]; 1 keeps every token")


def sample(sampling: Sampling, logits_BV: Array, keys_B: Array) -> Array:
    """Return one token id [B] int32 per row of FP32 logits; `NO_TOKEN` where the largest is NaN or infinite.

    Each row draws with its own key, so its text does not depend on its neighbours.
    """
    sound_B = jnp.isfinite(logits_BV.max(axis=-1))  # a maximum is NaN if anything is
    if sampling.temperature < COLDEST:
        chosen_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = keep_top_p(keep_top_k(logits_BV / sampling.temperature, sampling.top_k), sampling.top_p)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    return jnp.where(sound_B, chosen_B, NO_TOKEN).astype(jnp.int32)


def keep_top_k(logits_BV: Array, top_k: int) -> Array:
    """Keep exactly `top_k` tokens per row, the lowest ids of equal logits; 0 keeps all."""
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    values_BK, ids_BK = jax.lax.top_k(logits_BV, top_k)
    return _scatter(values_BK, ids_BK, logits_BV)


def keep_top_p(logits_BV: Array, top_p: float) -> Array:
    """Keep per row the fewest most probable tokens that sum to a probability of `top_p` or more, at least one."""
    if top_p == 1.0:
        return logits_BV
    ids_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, ids_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    return _scatter(jnp.where(before_BV < top_p, sorted_BV, -jnp.inf), ids_BV, logits_BV)


def _scatter(values_BK: Array, ids_BK: Array, like_BV: Array) -> Array:
    """Put `values_BK` at `ids_BK` into rows of -inf."""
    return jnp.put_along_axis(jnp.full_like(like_BV, -jnp.inf), ids_BK, values_BK, axis=-1, inplace=False)
