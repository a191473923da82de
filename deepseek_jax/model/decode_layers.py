"""The layers of a decoding step for few rows: each norm is made where the residual stream is summed.

`model.layer` norms at the start of a layer and adds at its end, four kernels for what one kernel does: add what the
last product gave, norm with the gain of whatever follows. So here a layer takes the stream and its norm, and returns
both for the next. Its attention is that of `model.absorbed`, in the kernels of `pallas_kernels.decode_projections`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import Execution, Model
from deepseek_jax.model.absorbed import LayerPages, Places, UpProjection, over_pages
from deepseek_jax.model.attention import Attention, Beside, Table
from deepseek_jax.model.layer import STACKS, DenseLayer, Layer, MoELayer, Tree, cached_execution, merge_cached
from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.moe import Observer
from deepseek_jax.model.precision import ATTENTION_OUTPUT, DISPATCH, compute_dtype, transposed
from deepseek_jax.parameters import Fp8Weight, Weights
from pallas_kernels import dispatch
from pallas_kernels.decode_projections import absorb, add_norm, kernel_fault, latents, project
from pallas_kernels.hopper.marks import MARKS
from pallas_kernels.quantized import Quantized, Scale

NORM_UNIT, COLUMNS = 512, 64  # of widths that the kernels norm, and of those that products make
MOST_ROWS_IN_FP8 = 32  # each block of a product quantises all rows: at 128 that costs more than separate kernels


def has_kernels(model: Model, execution: Execution, weights: Weights, valid_BS: jax.Array, pages: jax.Array) -> bool:
    """Whether a step runs through `run_decode_layers`: on Hopper, at most 128 rows on a device, in FP8 at most 32."""
    few = cached_execution(execution, valid_BS).experts == "few"
    if not dispatch.on_hopper() or not few or compute_dtype(execution) != jnp.bfloat16 or pages.dtype != jnp.bfloat16:
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
    return not kernel_fault(valid_BS.size, pages.dtype, *normed, model.num_heads * model.value_dim, model.content_dim)


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
    execution = cached_execution(execution, valid_BS)
    batch, num_queries, width = x_BSD.shape
    cos, sin = (t.reshape(batch * num_queries, -1) for t in table)

    @functools.partial(jax.jit, static_argnums=0)
    def run(kind, params, bias, x_TD, h_TD, cache, next_gain_D):
        layer = merge_cached(kind, model, params, bias)
        parts, cache = attend(model, layer.attention, h_TD, (cos, sin), places, cache)
        x_TD, h_TD, rows, zeros = add_norm(
            x_TD, parts, _feed_gain(layer), eps=model.norm_eps, scale=_scale_of_rows(layer), zeros=_num_marks(layer)
        )
        h_BSD = h_TD.reshape(x_BSD.shape)
        if isinstance(layer, MoELayer) and not layer.moe.model.num_shared_experts:
            parts, observed = layer.moe.few(h_BSD, valid_BS, observe, rows, zeros)
        else:
            y_BSD, observed = layer.feed_normed(execution, h_BSD, valid_BS, observe)
            parts = y_BSD.reshape(1, -1, width)
        x_TD, h_TD, *_ = add_norm(x_TD, parts, next_gain_D, eps=model.norm_eps)
        return x_TD, h_TD, cache.pages, observed

    layers = _in_order(weights)
    gains = [params["attention"]["norm_D"] for _, params, _ in layers[1:]] + [weights.params["final_norm_D"]]
    x_TD, observations = x_BSD.reshape(-1, width), []
    h_TD = rms_norm(x_TD, layers[0][1]["attention"]["norm_D"], model.norm_eps)
    for number, ((kind, params, bias), gain_D) in enumerate(zip(layers, gains, strict=True)):
        cache = LayerPages(pages, jnp.int32(number))
        x_TD, h_TD, pages, observed = run(kind, params, bias, x_TD, h_TD, cache, gain_D)
        observations += [observed] if observed is not None else []
    return h_TD.reshape(x_BSD.shape), pages, observations


def _feed_gain(layer: MoELayer | DenseLayer) -> jax.Array:
    """Return the gain of the norm in front of a layer's feed-forward."""
    return layer.moe.norm_D[...] if isinstance(layer, MoELayer) else layer.ffn.norm_D[...]


def _scale_of_rows(layer: Layer) -> Scale | None:
    """Return the scale of the tiles that the layer's experts read, or None."""
    return DISPATCH if isinstance(layer, MoELayer) and isinstance(layer.moe.down_EFD.get_value(), Fp8Weight) else None


def _num_marks(layer: Layer) -> int:
    """Return the zeros that the layer's router needs for its marks."""
    return MARKS if isinstance(layer, MoELayer) else 0


def _in_order(weights: Weights) -> list[tuple[type[Layer], Tree, Tree]]:
    layers = []
    for name, kind in STACKS:
        biases = weights.router_bias.get(name)
        layers += [(kind, params, biases[i] if biases else {}) for i, params in enumerate(weights.params.get(name, []))]
    return layers


@jax.named_scope("attention")
def attend(
    model: Model, attention: Attention, h_TD: jax.Array, table: Table, places: Places, cache: LayerPages
) -> tuple[jax.Array, LayerPages]:
    """Return the output of attention as FP32 parts [splits, T, D] whose sum it is, and the cache with the new entries.

    Args:
        model: shape.
        attention: weights as decoding reads them.
        h_TD: after the norm.
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
    both = project(h_TD, _matrix(attention.kv_a_DC))
    q_TA, flat = latents(both, gains, table, flat, own, eps=model.norm_eps)
    q_TX = absorb(project(q_TA, _matrix(attention.q_b_ANQ)), up.key_NPC, table)
    cache = cache._replace(pages=flat.reshape(cache.pages.shape))
    with jax.named_scope("attention_core"):
        q_BSNK = q_TX.reshape(*places.page_BS.shape, model.num_heads, entry)
        mean_BSNC = over_pages(model, q_BSNK, cache, places)
    out_TX = project(mean_BSNC.reshape(len(h_TD), -1), up.value_NCH, whole=True)[0]
    return project(out_TX, _matrix(attention.o_NHD, 2), scale=ATTENTION_OUTPUT.scale), cache


def _matrix(weight: nnx.Param, input_dims: int = 1) -> jax.Array | Quantized:
    """Return a weight as one matrix in the form that `project` takes."""
    value = weight.get_value()
    if isinstance(value, Fp8Weight):
        matrix = value.as_matrix(input_dims)
        return transposed(matrix.values, matrix.scales)
    return value.reshape(1, math.prod(value.shape[:input_dims]), -1)
