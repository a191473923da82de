"""The absorbed form of attention over a paged latent cache: what decoding runs (`model.attention` has the equations).

The entries of all layers are one array [L, pages, 64, C + R], a token's latent and its rotary key in one row. A table
says which pages a sequence has, in order; it is the same for all layers. Token `pos` of sequence b lies in row
pos % 64 of page tables[b, pos // 64]:

    tables = [[4, 0], [2, 9]]     token 70 of sequence 0: page 0, row 6; token 3 of sequence 1: page 2, row 3; page 9
                                  is not read before sequence 1 has 65 tokens

The array passes the layers whole. A layer reads and writes it as [L * pages, 64, C + R] with its own page numbers,
`layer * pages` behind those of the table. So no layer is cut out of it or put back, which would copy the cache at
every step.

A token that is not valid is written nowhere: its row is beyond the array, and the scatter drops it. So a page that
others share is never touched, and a row of the batch without a sequence needs no page.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Model
from deepseek_jax.model.attention import Attend, Attention, Entry
from deepseek_jax.model.rope import rotary_table, softmax_scale
from pallas_kernels.mla_decode import mla_decode, plan
from pallas_kernels.mla_decode.schedule import PAGE, Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpProjection:
    """The weight `kv_b_CNX` in two, with heads in front, as the absorbed form multiplies with it.

    Attributes:
        key_NPC: from a query's content channels into latent space.
        value_NCH: from the averaged latent to a head's output.
    """

    key_NPC: jax.Array
    value_NCH: jax.Array

    @classmethod
    def of(cls, model: Model, kv_b_CNX: jax.Array) -> "UpProjection":
        """Take the weight of one layer apart."""
        key_CNP, value_CNH = lax.split(kv_b_CNX, (model.content_dim, model.value_dim), axis=2)
        return cls(key_CNP.transpose(1, 2, 0), value_CNH.transpose(1, 0, 2))


class LayerPages(NamedTuple):
    """The pages of all layers as one layer sees them.

    Attributes:
        pages: [L, pages, 64, C + R].
        layer: number of this one.
    """

    pages: jax.Array
    layer: int | jax.Array


class Places(NamedTuple):
    """Where the tokens of a step lie, for all its layers.

    Attributes:
        tables_BJ: int32, numbers of each sequence's pages in order.
        page_BS: int32, the page of each new token; -1 of a token that is written nowhere.
        row_BS: int32, its row there.
        length_B: int32, tokens of each sequence that the last of its queries sees; 0: nobody reads its output.
        schedule: of the kernel that reads the pages; None in prefill (`model.prefill`).
    """

    tables_BJ: jax.Array
    page_BS: jax.Array
    row_BS: jax.Array
    length_B: jax.Array
    schedule: Schedule | None


def places_of(model: Model, tables_BJ: jax.Array, positions_BS: jax.Array, valid_BS: jax.Array) -> Places:
    """Return where new tokens lie; a position behind a sequence's table lies nowhere.

    The kernel takes the queries of a row for its last positions, so tokens that are not valid count in its length.
    """
    column_BS = positions_BS // PAGE
    inside_BS = valid_BS & (column_BS < tables_BJ.shape[1])
    page_BS = jnp.take_along_axis(tables_BJ, column_BS, axis=1, mode="clip")
    length_B = jnp.where(valid_BS[:, 0], positions_BS[:, -1] + 1, 0).astype(jnp.int32)
    num_queries = positions_BS.shape[1]
    schedule = plan(length_B, model.num_heads * num_queries)
    return Places(tables_BJ, jnp.where(inside_BS, page_BS, -1), positions_BS % PAGE, length_B, schedule)


def absorbed(model: Model, tables_BJ: jax.Array, positions_BS: jax.Array, valid_BS: jax.Array) -> Attend:
    """Write each new token into the cache, and attend to all tokens of its sequence up to that one.

    Args:
        model: shape.
        tables_BJ: int32, numbers of each sequence's pages in order; those behind its last page may be anything.
        positions_BS: int32, of the new tokens, one behind the other; at most four.
        valid_BS: False where there is no token. A row has its first ones or none. The table needs a column for the
            positions of the others too, with the number of any page.
    """
    table, places = rotary_table(model, positions_BS), places_of(model, tables_BJ, positions_BS, valid_BS)

    @jax.named_scope("attention")
    def attend(attention: Attention, x_BSD: jax.Array, cache: LayerPages) -> tuple[jax.Array, LayerPages]:
        q_BSNQ, entry = attention.project(x_BSD, table)
        up = attention.kv_b_CNX.get_value()
        content_BSNP, q_BSNR = lax.split(q_BSNQ, (model.content_dim, model.rotary_dim), axis=3)
        q_BSNC = jnp.einsum("bsnp,npc->bsnc", content_BSNP, up.key_NPC)
        q_BSNK = jnp.concatenate([q_BSNC, q_BSNR], axis=3)
        cache = write(cache, entry, places)
        with jax.named_scope("attention_core"):
            mean_BSNC = over_pages(model, q_BSNK, cache, places)
        return attention.output(jnp.einsum("bsnc,nch->bsnh", mean_BSNC, up.value_NCH)), cache

    return attend


def write(cache: LayerPages, entry: Entry, places: Places) -> LayerPages:
    """Return the cache with the entries of new tokens in their places."""
    pages = cache.pages
    num_layers, num_pages, _, width = pages.shape
    rows_BSK = jnp.concatenate(entry, axis=2).astype(pages.dtype)
    owned_BS = (places.page_BS >= 0) & (places.page_BS < num_pages)
    nowhere = num_layers * num_pages + jnp.arange(owned_BS.size, dtype=jnp.int32).reshape(owned_BS.shape)
    page_BS = jnp.where(owned_BS, cache.layer * num_pages + places.page_BS, nowhere)
    flat = pages.reshape(num_layers * num_pages, PAGE, width)
    # Told that no two places are the same, a GPU writes without atomic operations: 16 bits would be a loop each.
    flat = flat.at[page_BS, places.row_BS].set(rows_BSK, mode="drop", unique_indices=True)
    flat = lax.optimization_barrier(flat)  # fused with the reads that follow, the write would need a copy of all pages
    return cache._replace(pages=flat.reshape(pages.shape))


def over_pages(model: Model, q_BSNK: jax.Array, cache: LayerPages, places: Places) -> jax.Array:
    """Return the heads' averaged latents [B, S, N, C]: each query attends to the pages of its sequence."""
    num_layers, num_pages, _, width = cache.pages.shape
    flat = cache.pages.reshape(num_layers * num_pages, PAGE, width)
    tables_BJ = cache.layer * num_pages + places.tables_BJ
    scale, value_dim = softmax_scale(model), model.kv_latent
    return mla_decode(q_BSNK, flat, tables_BJ, places.length_B, places.schedule, scale=scale, value_dim=value_dim)[0]
