"""The router: it scores every expert for each token and chooses K (DeepSeek-V3 section 2.1.2, eq. 13-16).

It is FP32 from its logits on. In BF16, 0.6 + 0.001 == 0.6: the bias steps of auxiliary-loss-free balancing would
vanish. The bias only selects; gates come from the unbiased scores. Experts of groups that are not kept get -inf. With 0
instead, every negative biased score would lose against them.

A product in FP32 is slow, because tensor cores have none. But a BF16 number has 8 significant bits, and an FP32 number
is the sum of three BF16 numbers. So BF16 activations times FP32 weights are three BF16 products, each exact before its
sum in FP32. In FP32 the router's four products took 12.3 of the 489 ms of a step of `v3_5b` on an H200.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Model
from deepseek_jax.model.recompute import CHOICE, keep
from pallas_kernels.routing.reference import rank
from pallas_kernels.routing.rule import Rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """In the place of a selection bias: which experts tokens get, whatever the router would choose today.

    Reinforcement learning replays what the sampler chose, so that rounding flips no route between sampling and training
    (arXiv 2510.11370). Gates come from today's scores, so the router learns.

    Attributes:
        experts: [B, S, K] of a layer, the best first, or [B, S, L, K] of all (`replaying`); below 0 the router chooses.
        watches: whether an observer sees what the router would choose, and not what was replayed.
        bias_E: the selection bias of a layer; None of all.
    """

    experts: jax.Array
    watches: bool = dataclasses.field(default=False, metadata={"static": True})
    bias_E: jax.Array | None = None

    def over(self, own_BSK: jax.Array) -> jax.Array:
        """Return the experts of each token; `own_BSK` are the router's."""
        return jnp.where(self.experts < 0, own_BSK, self.experts.astype(own_BSK.dtype))


def replaying(router_bias: dict[str, Any], replay: Replay | None, num_parts: int) -> dict[str, Any]:
    """Return router biases with each MoE layer's routes: they pass the layers as their bias does.

    Raises:
        ValueError: rows pass the layers in several parts.
    """
    if replay is None or "moe_layers" not in router_bias:
        return router_bias
    if num_parts > 1:
        raise ValueError(
            f"execution.interleave = {num_parts}: routes are replayed for rows that pass the layers together; use 1"
        )
    bias_LE = router_bias["moe_layers"]["moe"]["bias_E"]
    replay_L = Replay(jnp.moveaxis(replay.experts, 2, 0), replay.watches, bias_LE)
    return router_bias | {"moe_layers": {"moe": {"bias_E": replay_L}}}


def router_scores(model: Model, h_BSD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """Return the scores [B, S, E] in FP32: sigmoid or softmax of h W, as exact as a product in FP32 (eq. 15).

    Args:
        model: says whether the gate is a sigmoid or a softmax.
        h_BSD: normalised residual stream, BF16 or FP32.
        router_DE: FP32, or what `in_parts` makes of it.
    """
    h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
    if router_DE.dtype == jnp.bfloat16:
        logits_TE = _matmul(jnp.concatenate([h_TD] * 3, axis=1), router_DE)
    else:
        product = _product_of_parts if h_TD.dtype == jnp.bfloat16 else _product
        logits_TE = product(h_TD, router_DE.astype(jnp.float32))
    logits_BSE = keep(logits_TE.reshape(*h_BSD.shape[:-1], -1), "routing")
    return jax.nn.sigmoid(logits_BSE) if model.gate == "sigmoid" else jax.nn.softmax(logits_BSE, axis=-1)


def in_parts(router_DE: jax.Array) -> jax.Array:
    """Return the BF16 parts of a router's weights one below the other, [3D, E]: decoding makes them once."""
    return jnp.concatenate(_parts(router_DE), axis=0)


def route(model: Model, scores_TE: jax.Array, bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose K experts per token and weigh them.

    Args:
        model: says groups, K, and how gates are normalised.
        scores_TE: sigmoid or softmax scores [..., E], FP32.
        bias_E: selection bias, FP32.

    Returns:
        experts [..., K] int32, best first, ties to the lowest index; gates [..., K] FP32, differentiable in the scores.
    """
    biased = lax.stop_gradient(scores_TE) + bias_E
    if model.num_groups > model.num_kept_groups:
        grouped = biased.reshape(*biased.shape[:-1], model.num_groups, -1)
        top = _sum_of_best_two(grouped) if model.group_score == "top2" else grouped.max(-1)
        keep_group = rank(top) < model.num_kept_groups
        biased = jnp.where(jnp.repeat(keep_group, grouped.shape[-1], axis=-1), biased, -jnp.inf)
    experts = keep(lax.top_k(biased, model.experts_per_token)[1], CHOICE)
    return experts, weigh(model, scores_TE, experts)


def rule_of(model: Model) -> Rule:
    """Return how `pallas_kernels.routing` chooses as `route` does, for the few tokens of a decoding step."""
    return Rule(
        k=model.experts_per_token,
        num_groups=model.num_groups,
        num_kept_groups=model.num_kept_groups,
        group_score=model.group_score,
        gate=model.gate,
        normalize=model.normalize_gates,
        scale=model.routed_scale,
    )


def weigh(model: Model, scores_TE: jax.Array, experts: jax.Array) -> jax.Array:
    """Return the gates [..., K] of chosen experts: their unbiased scores, normalised and scaled as the model says."""
    gates = jnp.take_along_axis(scores_TE, experts, axis=-1)
    if model.normalize_gates:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return gates * model.routed_scale


def _sum_of_best_two(x: jax.Array) -> jax.Array:
    """Sum the two largest of the last dim; for `lax.top_k` a GPU would sort it."""
    best = x.argmax(-1, keepdims=True)
    others = jnp.where(jnp.arange(x.shape[-1]) == best, -jnp.inf, x)
    return x.max(-1) + others.max(-1)


def _product(h_TD: jax.Array, router_DE: jax.Array) -> jax.Array:
    return jnp.matmul(h_TD, router_DE, precision="highest")


@jax.custom_vjp
def _product_of_parts(h_TD, router_DE):
    """Return FP32 logits [T, E] of BF16 activations and FP32 weights."""
    return _sum_of_parts(_matmul(h_TD, _beside(_parts(router_DE))))


def _product_forward(h_TD, router_DE):
    return _product_of_parts(h_TD, router_DE), (h_TD, router_DE)


def _product_backward(residuals, g_TE):
    h_TD, router_DE = residuals
    w, g = _parts(router_DE), _parts(g_TE)
    # The gradient of h is rounded to BF16. So six of the nine products of parts are left out: each is at most about
    # 2^-16 of the largest.
    dh_TD = _matmul(_beside((g[0], g[0], g[1])), _beside((w[0], w[1], w[0])).T).astype(h_TD.dtype)
    return dh_TD, _sum_of_parts(_matmul(h_TD.T, _beside(g)))


_product_of_parts.defvjp(_product_forward, _product_backward)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return three BF16 arrays whose sum is the FP32 array `x`.

    They are not made by casts: XLA may drop a cast together with its inverse, which would leave zeros.
    """
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return tuple(parts)


def _beside(parts):
    return jnp.concatenate(parts, axis=-1)


def _sum_of_parts(x: jax.Array) -> jax.Array:
    """Sum the thirds of the last dim, the smallest first."""
    large, middle, small = jnp.split(x, 3, axis=-1)
    return large + (middle + small)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
