"""The arithmetic of a training step, counted from the config: products, attention, and bytes that kernels move.

A `Work` is what one token costs in one place of the model. `seconds` turns it into time on a chip by the shares of
`rates.py`. Counted per token:

    products    2 FLOPs per weight that it meets, forward, for the gradient of the input, and for that of the weight
    attention   6 FLOPs per head, visible position and channel; half of the square is visible
    bytes       quantisation, SwiGLU, RoPE, packing of rows, and the residual stream, forward and backward

Weights are read from memory as well: at thousands of tokens a device that hides behind the products. What is computed
twice, `execution.remat` says: "selective" the up-projections of attention, "full" the whole forward pass of a layer.
"""

import dataclasses
import functools
from typing import NamedTuple

from deepseek_jax.config import Config, Model
from deepseek_jax.model.recompute import REPEATING
from deepseek_jax.plan import rates
from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.rates import FORWARD, INPUTS, PASSES, WEIGHTS


class Product(NamedTuple):
    """A weight that a token is multiplied by."""

    inputs: int  # the contraction of the forward pass
    outputs: int
    rows: float = 1.0  # products of one token with weights of this shape
    sharing: float = 1.0  # weights of this shape among which all rows are divided: experts of a device
    precision: str = ""  # other than the config's
    recomputed: bool = False  # by remat "selective"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one token costs in one place of the model.

    Attributes:
        products: weights that it meets.
        attention: model FLOPs of attention, forward and backward.
        moved: bytes in the forward pass, and in the backward pass.
    """

    products: tuple[Product, ...] = ()
    attention: float = 0.0
    moved: tuple[float, float] = (0.0, 0.0)


def attention(model: Model, length: int, precision: str, context: int = 1) -> Work:
    """Return the attention of one layer, its norm and the residual stream included.

    Each of `context` devices that share a sequence makes keys and values of all of it.
    """
    queries, values = model.num_heads * model.query_dim, model.num_heads * model.value_dim
    content = model.num_heads * (model.content_dim + model.value_dim)
    latent = model.kv_latent + model.rotary_dim
    if model.query_latent:
        down = (Product(model.width, model.query_latent + latent),)
        up = (Product(model.query_latent, queries, recomputed=True),)
    else:
        down, up = (Product(model.width, queries + latent),), ()
    up += (Product(model.kv_latent, content, rows=context, recomputed=True),)
    flops = 6 * model.num_heads * (length / 2) * (model.query_dim + model.value_dim)
    rotate = 4 * (2 * queries + values)  # queries and keys are rotated and laid side by side: BF16, read and written
    out = 6.5 if precision == "fp8" else 0.0  # E5M6 and E4M3 of the attention's output
    gradients = 4.0 if precision == "fp8" else 0.0  # both groupings of a gradient: BF16 read, twice E4M3 written
    backward = rotate + (out + gradients) * values + gradients * (2 * queries + values)
    other = rates.OTHER_WIDTHS * model.width / 2  # half of a layer: the other half is the FFN's
    return Work(
        (*down, *up, Product(values, model.width)), flops, (rotate + out * values + other / 3, backward + 2 * other / 3)
    )


def ffn(model: Model, hidden: int, rows: float, sharing: float, precision: str, packed: bool) -> Work:
    """Return a SwiGLU FFN, or the routed experts of a token: `rows` of them, `sharing` on a device.

    `packed` rows are brought to their experts and back.
    """
    wide, narrow = Product(model.width, 2 * hidden, rows, sharing), Product(hidden, model.width, rows, sharing)
    element = 1 if precision == "fp8" else 2
    # SwiGLU: gate and up in BF16, its result; backward: both again, three gradients (5 and 11.2 bytes a value in FP8)
    forward, backward = (4 + element) * hidden * rows, (10.2 + element) * hidden * rows
    if packed:  # rows in, sums out; backward: gradients of sums in, their forms, rows once more, gradients of rows out
        forward += (2 * element + 2) * model.width * rows
        backward += (4 + 4 * element + 2) * model.width * rows
    return Work((wide, narrow), moved=(forward, backward))


def dense_layer(model: Model, length: int, precision: str, context: int = 1) -> list[Work]:
    """Return a layer with a dense FFN."""
    wide = ffn(model, model.dense_hidden, 1, 1, precision, False)
    return [attention(model, length, precision, context), wide, _rest(model)]


def moe_layer(model: Model, length: int, precision: str, experts: float, context: int = 1) -> list[Work]:
    """Return a layer of which `experts` routed experts lie on a device."""
    shared = [ffn(model, model.num_shared_experts * model.expert_hidden, 1, 1, precision, False)]
    route = rates.ROUTE_WIDTHS * model.width
    return [
        attention(model, length, precision, context),
        *(shared if model.num_shared_experts else []),
        ffn(model, model.expert_hidden, model.experts_per_token, experts, precision, True),
        _rest(model),
        Work(moved=(route / 3, 2 * route / 3)),
    ]


def head(model: Model) -> Work:
    """Return the head and the cross entropy: BF16 products, and some passes over FP32 logits of a chunk."""
    return Work((Product(model.width, model.vocab_size, precision="bf16"),), moved=(16.0 * model.vocab_size, 0.0))


def _rest(model: Model) -> Work:
    other = rates.OTHER_WIDTHS * model.width / 2
    return Work(moved=(other / 3, 2 * other / 3))


def layers_of(config: Config, experts: float, context: int = 1) -> tuple[list[Work], list[Work]]:
    """Return the work of all layers, and that of the heads, which no remat repeats.

    Args:
        config: whose layers, MTP included.
        experts: routed experts of one layer on a device.
        context: devices that share a sequence.
    """
    model, length, precision = config.model, config.data.sequence_length, config.execution.precision
    moe = model.num_layers - model.num_dense_layers + model.num_mtp_layers
    layers = model.num_dense_layers * dense_layer(model, length, precision, context)
    layers += moe * moe_layer(model, length, precision, experts, context)
    layers += model.num_mtp_layers * [Work((Product(2 * model.width, model.width),))]
    return layers, (1 + model.num_mtp_layers) * [head(model)]


@functools.lru_cache(maxsize=4096)
def seconds(chip: Chip, config: Config, work: Work, tokens: float, remat: str) -> tuple[float, float, float]:
    """Return the seconds of one token's work: forward, backward for inputs with what is recomputed, for weights.

    Args:
        chip: that computes.
        config: its precision.
        work: of one token.
        tokens: of a device at a time; the contraction of a weight's gradient.
        remat: as `execution.remat`; what "offload" sends to the host is taken to be hidden.
    """
    times = dict.fromkeys(PASSES, 0.0)
    for product in work.products:
        precision = product.precision or config.execution.precision
        flops = 2 * product.inputs * product.outputs * product.rows
        rows = tokens * product.rows / product.sharing  # that are multiplied by one of these weights
        tiles = 1 + rates.TILE / rows if product.sharing > 1 else 1.0
        length = {FORWARD: product.inputs, INPUTS: product.outputs, WEIGHTS: rows}
        for which in PASSES:
            whole = flops / rates.product_rate(chip, precision, which, length[which])
            times[which] += whole * (1.0 if which == WEIGHTS else tiles)
        if remat in REPEATING or (remat == "selective" and product.recomputed):
            times[INPUTS] += tiles * flops / rates.product_rate(chip, precision, FORWARD, product.inputs)
    attending = work.attention / rates.attention_rate(chip)
    forward, backward = (size / rates.memory_rate(chip) for size in work.moved)
    attending_forward = rates.ATTENTION_FORWARD * attending
    times[FORWARD] += attending_forward + forward
    times[INPUTS] += attending - attending_forward + backward
    if remat in REPEATING:
        times[INPUTS] += attending_forward + forward
    forward, inputs, weights = (rates.WHOLE * times[which] for which in PASSES)
    return forward, inputs, weights
