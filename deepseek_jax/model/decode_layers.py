"""The layers of a decoding step for few rows: each norm is made where the residual stream is summed.

`model.layer` norms at the start of a layer and adds at its end, four kernels for what one kernel does: add what the
last product gave, norm with the gain of whatever follows. So here a layer takes the stream and its norm, and returns
both for the next. Its attention is that of `model.absorbed`, in the kernels of `pallas_kernels.decode_projections`.

With more rows than their products take (drafts of 128 rows are 256), the products are XLA's, and the kernels between
them, which have a block for each row, stay.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.adapters import has_adapters
from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import LayerPages, Places, UpProjection, over_pages
from deepseek_jax.model.attention import Attention, Beside, Table
from deepseek_jax.model.layer import STACKS, DenseLayer, Layer, MoELayer, Tree, cached_execution, merge_cached
from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.moe import Observer, unobserved
from deepseek_jax.model.mtp import MtpLayer
from deepseek_jax.model.precision import ATTENTION_OUTPUT, DISPATCH, HIDDEN, compute_dtype, transposed
from deepseek_jax.model.rope import rotate
from deepseek_jax.parameters import Fp8Weight, TurnedFp8Weight, Weights
from pallas_kernels import dispatch
from pallas_kernels.decode_projections import (
    MOST_BLOCKS,
    MOST_ROWS,
    absorb,
    add_norm,
    kernel_fault,
    latents,
    project,
)
from pallas_kernels.hopper.marks import MARKS
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.quantized import Quantized, Scale

NORM_UNIT, COLUMNS = 512, 64  # of widths that the kernels norm, and of those that products make
MOST_ROWS_IN_FP8 = 32  # each block of a product quantises all rows: at 128 that costs more than separate kernels


def has_kernels(model: Model, execution: Execution, weights: Weights, valid_BS: jax.Array, pages: jax.Array) -> bool:
    """Whether a step runs through `run_decode_layers`.

    On Hopper, without adapters, at most 512 rows on a device, in FP8 at most 32.
    """
    few = cached_execution(execution, valid_BS).experts == "few"
    if not dispatch.on_hopper() or has_adapters(weights.params):
        return False
    if not few or compute_dtype(execution) != jnp.bfloat16 or pages.dtype != jnp.bfloat16:
        return False
    if execution.precision == "fp8" and valid_BS.size > MOST_ROWS_IN_FP8:
        return False
    layers = [layer for name, _ in STACKS for layer in weights.params.get(name, [])]
    if not model.query_latent or not isinstance(layers[0]["attention"]["q_a_DA"], Beside):
        return False
    normed = model.width, model.query_latent, model.kv_latent
    columns = model.num_heads * model.query_dim, sum(normed[1:]) + model.rotary_dim, model.value_dim
    if any(size % NORM_UNIT for size in normed) or any(size % COLUMNS for size in columns) or model.rotary_dim != 64:
        return False
    sizes = *normed, model.num_heads * model.value_dim, model.content_dim
    return not kernel_fault(valid_BS.size, pages.dtype, *sizes, most_rows=MOST_BLOCKS)


def run_decode_layers(
    model: Model,
    execution: Execution,
    weights: Weights,
    x_BSD: jax.Array,
    table: Table,
    places: Places,
    valid_BS: jax.Array,
    pages: jax.Array,
    observe: Observer,
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Run new tokens through all layers.

    Args:
        model: shape of the layers.
        execution: resolved.
        weights: as `inference.weights.decode_weights` returns them.
        x_BSD: embeddings.
        table: cos and sin of the tokens.
        places: of the tokens (`model.absorbed`).
        valid_BS: False where there is no token.
        pages: the cache [L, pages, 64, C + R] of all these layers in order.
        observe: what to report of each router (`model.moe`).

    Returns:
        the hidden states after the final norm, the pages, and what `observe` reports of each layer with a router.
    """
    execution, width = cached_execution(execution, valid_BS), x_BSD.shape[-1]
    step = _Step(model, execution, _flat(table), places, valid_BS, observe)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(kind, next_scale, params, bias, x_TD, h_TD, cache, next_gain_D):
        return step.run(merge_cached(kind, model, params, bias), x_TD, h_TD, cache, next_gain_D, next_scale)

    layers = _in_order(weights)
    heads = [params["attention"] for _, params, _ in layers]
    x_TD, observations = x_BSD.reshape(-1, width), []
    h_TD = _first_norm(model, x_TD, heads[0])
    for number, ((kind, params, bias), following) in enumerate(zip(layers, [*heads[1:], None], strict=True)):
        cache, scale = LayerPages(pages, jnp.int32(number)), _scale_in_front(following)
        gain_D = weights.params["final_norm_D"] if following is None else following["norm_D"]
        x_TD, h_TD, pages, observed = run(kind, scale, params, bias, x_TD, h_TD, cache, gain_D)
        observations += [observed] if observed is not None else []
    assert isinstance(h_TD, jax.Array), "no layer asks for tiles behind the last"
    return h_TD.reshape(x_BSD.shape), pages, observations


def run_mtp_layer(
    model: Model,
    execution: Execution,
    weights: Weights,
    embedded_BSD: jax.Array,
    hidden_BSD: jax.Array,
    table: Table,
    places: Places,
    valid_BS: jax.Array,
    pages: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Run the MTP layer over few tokens (`model.drafter`); return its states [B, S, D] and the pages.

    Args:
        model, execution, weights, table, places, valid_BS: as of `run_decode_layers`; the weights have an MTP layer.
        embedded_BSD: of the token behind each position.
        hidden_BSD: the states that it is merged with.
        pages: of all layers, the MTP layer's the last.
    """
    params, bias = weights.params["mtp_layers"][0], weights.router_bias["mtp_layers"][0]
    step = _Step(model, cached_execution(execution, valid_BS), _flat(table), places, valid_BS, unobserved)

    @jax.jit
    def run(params, bias, embedded_BSD, hidden_BSD, cache):
        mtp = merge_cached(MtpLayer, model, params, bias)
        x_TD = mtp.merge(embedded_BSD, hidden_BSD).reshape(-1, model.width)
        h_TD = _first_norm(model, x_TD, params["block"]["attention"])
        _, h_TD, pages, _ = step.run(mtp.block, x_TD, h_TD, cache, mtp.final_norm_D[...], None)
        return h_TD.reshape(hidden_BSD.shape), pages

    return run(params, bias, embedded_BSD, hidden_BSD, LayerPages(pages, jnp.int32(model.num_layers)))


class _Step(NamedTuple):
    """What all layers of a step share."""

    model: Model
    execution: Execution
    table: Table  # [T, R / 2]
    places: Places
    valid_BS: jax.Array
    observe: Observer

    def run(
        self, layer: Any, x_TD: jax.Array, h_TD: Any, cache: LayerPages, next_gain_D: jax.Array, next_scale: Any
    ) -> tuple[jax.Array, Any, jax.Array, Any]:
        """Run a layer; return the residual stream, its norm for what follows, the pages and what was observed."""
        eps, shape = self.model.norm_eps, (*self.valid_BS.shape, -1)
        parts, cache = attend(self.model, layer.attention, h_TD, self.table, self.places, cache)
        x_TD, h_TD, rows, zeros = add_norm(x_TD, parts, _feed_gain(layer), eps=eps, **_feed_options(layer))
        h_BSD = h_TD.reshape(shape)
        if isinstance(layer, MoELayer) and not layer.moe.model.num_shared_experts:
            parts, observed = layer.moe.few(h_BSD, self.valid_BS, self.observe, rows, zeros)
        else:
            y_BSD, observed = layer.feed_normed(self.execution, h_BSD, self.valid_BS, self.observe)
            parts = y_BSD.reshape(1, *x_TD.shape)
        x_TD, h_TD, tiles, _ = add_norm(x_TD, parts, next_gain_D, eps=eps, scale=next_scale)
        return x_TD, h_TD if tiles is None else tiles, cache.pages, observed


def _flat(table: Table) -> Table:
    """Return cos and sin of the tokens in one line."""
    cos, sin = (t.reshape(t.shape[0] * t.shape[1], -1) for t in table)
    return cos, sin


def _first_norm(model: Model, x_TD: jax.Array, attention: Tree) -> jax.Array | Quantized:
    """Return the norm in front of a layer's attention, in tiles where its products read these."""
    h_TD = rms_norm(x_TD, attention["norm_D"], model.norm_eps)
    return quantize_tiles(h_TD, scale=HIDDEN.scale) if _scale_in_front(attention) else h_TD


def _feed_gain(layer: MoELayer | DenseLayer) -> jax.Array:
    """Return the gain of the norm in front of a layer's feed-forward."""
    return layer.moe.norm_D[...] if isinstance(layer, MoELayer) else layer.ffn.norm_D[...]


def _scale_in_front(attention: Tree | None) -> Scale | None:
    """Return the scale of the tiles that a layer's attention reads; None: BF16, or there is no layer."""
    return HIDDEN.scale if attention and isinstance(attention["kv_a_DC"], TurnedFp8Weight) else None


def _feed_options(layer: Layer) -> dict[str, Any]:
    """Return what the norm in front of experts also makes: tiles, and zeros for marks."""
    if not isinstance(layer, MoELayer):
        return {}
    in_fp8 = isinstance(layer.moe.down_EFD.get_value(), Fp8Weight)
    return {"scale": DISPATCH if in_fp8 else None, "zeros": MARKS}


def _in_order(weights: Weights) -> list[tuple[type[Layer], Tree, Tree]]:
    layers = []
    for name, kind in STACKS:
        biases = weights.router_bias.get(name)
        layers += [(kind, params, biases[i] if biases else {}) for i, params in enumerate(weights.params.get(name, []))]
    return layers


@jax.named_scope("attention")
def attend(
    model: Model, attention: Attention, h_TD: jax.Array | Quantized, table: Table, places: Places, cache: LayerPages
) -> tuple[jax.Array, LayerPages]:
    """Return the output of attention as FP32 parts [splits, T, D] whose sum it is, and the cache with the new entries.

    Args:
        model: shape.
        attention: weights as decoding reads them.
        h_TD: after the norm; in tiles for weights in FP8.
        table: cos and sin [T, R / 2].
        places: of the tokens.
        cache: of this layer.
    """
    up: UpProjection = attention.kv_b_CNX.get_value()
    num_layers, num_pages, length, entry = cache.pages.shape
    flat = cache.pages.reshape(num_layers * num_pages, length, entry)
    page_BS = places.page_BS
    owned_BS = (page_BS >= 0) & (page_BS < num_pages)
    page_BS = jnp.where(owned_BS, cache.layer * num_pages + page_BS, -1)
    gains = attention.q_norm_A[...], attention.kv_norm_C[...]
    own = page_BS.reshape(-1), places.row_BS.reshape(-1)
    both = _project(h_TD, _matrix(attention.kv_a_DC))
    query_up = _matrix(attention.q_b_ANQ)
    scale = HIDDEN.scale if isinstance(query_up, Quantized) else None
    q_TA, flat = latents(both, gains, table, flat, own, eps=model.norm_eps, scale=scale)
    q_TX = _absorb(_project(q_TA, query_up), up.key_NPC, table, places.page_BS.shape)
    cache = cache._replace(pages=flat.reshape(cache.pages.shape))
    with jax.named_scope("attention_core"):
        q_BSNK = q_TX.reshape(*places.page_BS.shape, model.num_heads, entry)
        mean_BSNC = over_pages(model, q_BSNK, cache, places)
    out_TX = _project(mean_BSNC.reshape(h_TD.shape[0], -1), up.value_NCH, whole=True)[0]
    return _project(out_TX, _matrix(attention.o_NHD, 2), scale=ATTENTION_OUTPUT.scale), cache


def _project(x: Any, weight: Any, *, whole: bool = False, scale: Scale = "fp32") -> jax.Array:
    """Do as `project`; of more rows than its kernels take by XLA's product, in one part."""
    if x.shape[0] <= MOST_ROWS:
        return project(x, weight, whole=whole, scale=scale)
    if isinstance(x, Quantized) or isinstance(weight, Quantized):  # so `scale` has no meaning below
        raise ValueError(f"{x.shape[0]} rows in FP8: products of more than {MOST_ROWS} take BF16; see MOST_ROWS_IN_FP8")
    batch, k, _ = weight.shape
    if batch == 1:  # as a batched product XLA would turn it
        y_NX = jnp.matmul(x, weight[0], preferred_element_type=jnp.float32)
    else:
        y_NX = jnp.einsum("nbk,bkc->nbc", x.reshape(-1, batch, k), weight).reshape(x.shape[0], -1)
    return y_NX.astype(x.dtype if whole else jnp.float32)[None]


def _absorb(parts: jax.Array, key_NPC: jax.Array, table: Table, shape: tuple[int, ...]) -> jax.Array:
    """Do as `absorb`; of more rows than its kernel takes, tokens [B, S] of `shape`, as `model.absorbed` does."""
    num_rows, (heads, content, _) = parts.shape[1], key_NPC.shape
    if num_rows <= MOST_ROWS:
        return absorb(parts, key_NPC, table)
    cos, sin = (t.reshape(*shape, -1) for t in table)
    q_BSNQ = rotate(parts.sum(0).astype(key_NPC.dtype).reshape(*shape, heads, -1), (cos, sin))
    content_BSNP, q_BSNR = lax.split(q_BSNQ, (content, q_BSNQ.shape[-1] - content), axis=3)
    q_BSNC = jnp.einsum("bsnp,npc->bsnc", content_BSNP, key_NPC)
    return jnp.concatenate([q_BSNC, q_BSNR], axis=3).reshape(num_rows, -1)


def _matrix(weight: nnx.Param, input_dims: int = 1) -> jax.Array | Quantized:
    """Return a weight as one matrix in the form that `project` takes."""
    value = weight.get_value()
    if isinstance(value, Fp8Weight):
        matrix = value.as_matrix(input_dims)
        return transposed(matrix.values, matrix.scales)
    return value.reshape(1, math.prod(value.shape[:input_dims]), -1)
