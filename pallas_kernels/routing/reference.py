"""Routing of few tokens in plain jnp: the specification, and the way on CPUs.

The time of so few tokens is the number of kernels. So nothing is sorted: an expert's rank is how many others come
before it. Comments stand where XLA ends a kernel on a GPU. There is no derivative.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.routing.rule import Routing, Rule


def route(h: Array, router: Array, bias: Array, valid: Array, *, rule: Rule, num_experts: int) -> Routing:
    """Return the routing of BF16 h [T, D] by the router's BF16 parts [3D, E]."""
    logits = jnp.matmul(jnp.concatenate([h] * 3, axis=1), router, preferred_element_type=jnp.float32)
    scores = jax.nn.sigmoid(logits) if rule.gate == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    return Routing(*choose(rule, scores, bias, valid, num_experts), scores, None)


def choose(rule: Rule, scores_TE: Array, bias_E: Array, valid_T: Array, num_experts: int) -> tuple[Array, Array]:
    """Choose K experts of each token, weigh them, and add the experts that every token has.

    Args:
        rule: how.
        scores_TE: sigmoid or softmax scores [..., E], FP32.
        bias_E: selection bias, FP32.
        valid_T: False on padding, whose experts are all `num_experts`: none.
        num_experts: those from E on are everybody's, with gate 1.

    Returns:
        experts int32 [..., K + num_experts - E], gates FP32.
    """
    num_routed, k = scores_TE.shape[-1], rule.k
    biased = scores_TE + bias_E
    if rule.grouped:
        first, second = _best_two(biased.reshape(*biased.shape[:-1], rule.num_groups, -1))
        top = first + second if rule.group_score == "top2" else first
        # the best of groups
        index = jnp.arange(rule.num_groups)
        before = [_before(top[..., i : i + 1], top, i < index) for i in range(rule.num_groups)]
        keep_group = sum(b.astype(jnp.int32) for b in before) < rule.num_kept_groups
        biased = jnp.where(jnp.repeat(keep_group, num_routed // rule.num_groups, axis=-1), biased, -jnp.inf)
    # the scores that take part
    rank_TE = rank(biased)
    # ranks
    gates_TE = jnp.where(rank_TE < k, scores_TE, 0.0)
    if rule.normalize:
        gates_TE = gates_TE / (gates_TE.sum(-1, keepdims=True) + 1e-20)
    # the sum of gates
    more = [(0, 0)] * (scores_TE.ndim - 1) + [(0, num_experts - num_routed)]
    index = jnp.arange(num_experts)
    gates_TE = jnp.where(index < num_routed, jnp.pad(gates_TE * rule.scale, more), 1.0)
    place_TE = jnp.where(index < num_routed, jnp.pad(jnp.where(rank_TE < k, rank_TE, -1), more), k + index - num_routed)
    chosen = (place_TE[..., None, :] == jnp.arange(k + num_experts - num_routed)[:, None]) & valid_T[..., None, None]
    experts = jnp.where(chosen, index, num_experts).min(-1)
    # experts and gates
    return experts.astype(jnp.int32), jnp.where(chosen, gates_TE[..., None, :], 0.0).sum(-1)


def _best_two(x: Array) -> tuple[Array, Array]:
    """Return the two largest of the last dim, elementwise: a reduction would be a kernel of its own."""
    first, second = x[..., 0], jnp.full_like(x[..., 0], -jnp.inf)
    for i in range(1, x.shape[-1]):
        second = jnp.maximum(second, jnp.minimum(first, x[..., i]))
        first = jnp.maximum(first, x[..., i])
    return first, second


def rank(x: Array) -> Array:
    """Return the rank of each element in the last dim: 0 for the largest, ties in order."""
    index = jnp.arange(x.shape[-1])
    each, other = x[..., :, None], x[..., None, :]
    return _before(other, each, index < index[:, None]).sum(-1)


def _before(other: Array, each: Array, is_earlier: Array) -> Array:
    """Return whether the other comes before each: it is larger, or equal and earlier."""
    return (other > each) | ((other == each) & is_earlier)
