"""The latent cache: per token and layer C channels of the normalised latent and R of the rotated key, no more.

Pages of 64 tokens hold them (`model.absorbed` says how a page is found). A row of a page that its sequence has not
written gets no attention, so pages need no clearing, and what lies in them may be anything. At the 671B shape a token
takes 61 * 576 BF16 values, 70,272 bytes; keys and values of 128 heads would take 4,997,120 (DeepSeek-V3 section 2.1.1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.precision import compute_dtype
from deepseek_jax.parallel.mesh import axis_size
from deepseek_jax.parameters import ROWS, P
from pallas_kernels.mla_decode.schedule import PAGE


class Cache(NamedTuple):
    """The cache of B sequences. Each device has pages and sequences of its own.

    Attributes:
        pages: [L, pages, 64, C + R], of all layers in order, in the dtype of the activations. Where tokens are drafted,
            a layer more is the MTP layer's (`model.drafter`).
        tables_BJ: int32, the pages of each sequence in order, by their numbers on the sequence's device. Numbers behind
            a sequence's last page may be anything. Two sequences may share a page in which neither writes.
        length_B: tokens that each sequence has written, int32.
    """

    pages: jax.Array
    tables_BJ: jax.Array
    length_B: jax.Array


_PAGES: Any = P(None, ROWS)
_SEQUENCES: Any = P(ROWS)
CACHE_SPECS = Cache(_PAGES, _SEQUENCES, _SEQUENCES)  # layouts in the place of arrays


def make_cache(model: Model, execution: Execution, batch_size: int, num_positions: int, drafts: bool = False) -> Cache:
    """Return an empty cache in which each of `batch_size` sequences has pages for `num_positions` tokens, in a row.

    Sequences, and with them the pages, are split over the devices of the mesh that is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = mesh.are_all_axes_explicit
    devices = axis_size(mesh, ROWS) if explicit else 1
    pages_each = num_pages(num_positions)

    def zeros(*shape: int, dtype: jnp.dtype, split: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=split if explicit else None)

    shape = model.num_layers + drafts, batch_size * pages_each, PAGE, model.kv_latent + model.rotary_dim
    tables_BJ = contiguous_tables(batch_size, pages_each, devices)
    return Cache(
        zeros(*shape, dtype=compute_dtype(execution), split=CACHE_SPECS.pages),
        jax.device_put(tables_BJ, CACHE_SPECS.tables_BJ) if explicit else jnp.asarray(tables_BJ),
        zeros(batch_size, dtype=jnp.int32, split=CACHE_SPECS.length_B),
    )


def copy_pages(pages: jax.Array, copies_U3: jax.Array) -> jax.Array:
    """Copy pages in all layers, in their order: rows of device, source, target; a target of -1 copies nothing."""

    def local(pages, copies_U3):
        device_U, source_U, target_U = copies_U3.T
        here_U = (device_U == lax.axis_index(ROWS)) & (target_U >= 0)

        def copy(i, pages):
            # A copy that is not for this device is of a page to itself.
            source = jnp.where(here_U[i], source_U[i], 0)
            page = lax.dynamic_slice_in_dim(pages, source, 1, axis=1)
            return lax.dynamic_update_slice_in_dim(pages, page, jnp.where(here_U[i], target_U[i], 0), axis=1)

        return lax.fori_loop(0, len(copies_U3), copy, pages)

    return jax.shard_map(local, in_specs=(_PAGES, P()), out_specs=_PAGES)(pages, copies_U3)


def num_pages(num_positions: int) -> int:
    """Return how many pages hold so many tokens of a sequence."""
    return -(-num_positions // PAGE)


def contiguous_tables(batch_size: int, pages_each: int, devices: int) -> np.ndarray:
    """Return the tables [B, J] of sequences whose pages follow each other, from 0 on each of the devices."""
    numbers = np.arange(batch_size // devices * pages_each, dtype=np.int32)
    return np.tile(numbers.reshape(-1, pages_each), (devices, 1))


def cache_bytes_per_token(model: Model, execution: Execution, drafts: bool = False) -> int:
    """Return the bytes one token takes in the caches of all main-model layers, and with `drafts` of the MTP layer."""
    return (model.num_layers + drafts) * (model.kv_latent + model.rotary_dim) * compute_dtype(execution).itemsize
