"""The latent cache: per token and layer C channels of the normalised latent and R of the rotated key, no more.

The two parts are separate arrays because absorbed attention reads the latent twice, as key and as value, and the rotary
part once (`model.attention`). A slot that a sequence has not written gets no attention, so slots need no clearing; they
only have to be finite. At the 671B shape a token takes 61 * 576 BF16 values, 70,272 bytes; keys and values of 128 heads
would take 4,997,120 (DeepSeek-V3 section 2.1.1).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.attention import Entry
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parameters import ROWS, P


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContiguousCache:
    """The entries of one layer: M contiguous slots for every sequence. Stacked over layers, [L, B, M, ...]."""

    latent_BMC: jax.Array
    rotary_BMR: jax.Array

    def write(self, entry: Entry, positions_BS: jax.Array) -> "ContiguousCache":
        """Return the cache with the entry of each new token in the slot of its position."""
        rows = jnp.arange(positions_BS.shape[0])[:, None]
        return ContiguousCache(
            self.latent_BMC.at[rows, positions_BS].set(entry.latent_BSC.astype(self.latent_BMC.dtype)),
            self.rotary_BMR.at[rows, positions_BS].set(entry.rotary_BSR.astype(self.rotary_BMR.dtype)),
        )

    def read(self) -> Entry:
        """Return all slots."""
        return Entry(self.latent_BMC, self.rotary_BMR)


class Cache(NamedTuple):
    """The cache of B sequences.

    Attributes:
        layers: one stack of caches per stack of layers, "dense_layers" and "moe_layers".
        length_B: tokens that each sequence has written, int32.
    """

    layers: dict[str, ContiguousCache]
    length_B: jax.Array


def make_cache(model: Model, execution: Execution, batch_size: int, num_slots: int) -> Cache:
    """Return an empty cache of M = `num_slots` positions for `batch_size` sequences, in the dtype of the activations.

    Sequences are split over the devices of the mesh that is set.
    """
    explicit = jax.sharding.get_abstract_mesh().are_all_axes_explicit

    def zeros(*shape: int, dtype: jnp.dtype, split: P) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=split if explicit else None)

    def stack(count: int) -> ContiguousCache:
        widths = model.kv_latent, model.rotary_dim
        arrays = [
            zeros(count, batch_size, num_slots, width, dtype=compute_dtype(execution), split=P(None, ROWS))
            for width in widths
        ]
        return ContiguousCache(*arrays)

    stacks = {"dense_layers": model.num_dense_layers, "moe_layers": model.num_moe_layers}
    layers = {name: stack(count) for name, count in stacks.items() if count}
    return Cache(layers, zeros(batch_size, dtype=jnp.int32, split=P(ROWS)))


def cache_bytes_per_token(model: Model, execution: Execution) -> int:
    """Return the bytes one token takes in the caches of all main-model layers."""
    return model.num_layers * (model.kv_latent + model.rotary_dim) * compute_dtype(execution).itemsize
