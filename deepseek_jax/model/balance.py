"""Auxiliary balance losses of the router, and statistics of its load.

    f_i = E / (K T) * sum over t of 1[expert i is among token t's top K]
    P_i = 1 / T * sum over t of s_ti / sum_j s_tj
    loss = sum over i of f_i P_i

with T the tokens of one sequence (V3 eq. 17-20) or of the whole batch of an optimizer step (section 4.5.3), over all
micro-batches and devices. f carries no gradient. Perfect balance gives exactly 1. A sequence lies on one device, so its
loss is complete here; or devices share it (`parallel.context`), count choices together, and have a part of the loss
each. Of the batch-wise loss a router reports its parts: sums of choices and of shares, which add up over devices and
micro-batches (`batch_balance`).

As the report prints it, f counts the top K of the unbiased scores without the group limit; most code
bases count the actual selection. `loss.balance_frequency` chooses between the two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Loss, Model
from deepseek_jax.model.recompute import CHOICE, keep
from deepseek_jax.parallel import context
from deepseek_jax.parallel.mesh import vary


class RouterStats(NamedTuple):
    """What one layer's router reports, summed over this device's rows. The scan stacks it over layers."""

    counts_E: jax.Array  # int32 assignments, padding excluded
    sequence_balance: jax.Array  # sum over sequences of sum_i f_i P_i
    violation: jax.Array  # sum over sequences of (max load - mean load) / mean load
    # only where the batch-wise loss is on:
    chosen_E: jax.Array | None = None  # int32 choices that its f counts
    share_E: jax.Array | None = None  # sum over tokens of s_i / sum_j s_j


def no_routers(model: Model, like: jax.Array) -> RouterStats:
    """Return the report of a model without experts: no layers. It varies over the mesh axes of `like`."""
    zeros = vary(jnp.zeros((0,)), like)
    return RouterStats(vary(jnp.zeros((0, model.num_experts), jnp.int32), like), zeros, zeros)


def router_stats(
    loss: Loss, model: Model, scores_BSE: jax.Array, experts_BSK: jax.Array, valid_BS: jax.Array
) -> RouterStats:
    """Count assignments and evaluate the balance losses.

    Args:
        loss: which balance losses are on, and which frequency they use.
        model: experts, and experts per token.
        scores_BSE: unbiased gate scores, FP32.
        experts_BSK: the actual selection, int32.
        valid_BS: False on padding, which is not counted.
    """
    counts_BE = _count(experts_BSK, valid_BS, model.num_experts)
    tokens_B, loads_BE = context.total(valid_BS.sum(-1, dtype=jnp.int32)), context.total(counts_BE)
    mean_load_B = jnp.maximum(tokens_B * model.experts_per_token, 1) / model.num_experts
    violation = context.once(jnp.where(tokens_B > 0, loads_BE.max(-1) / mean_load_B - 1.0, 0.0).sum())

    zero = jnp.zeros_like(violation)
    stats = RouterStats(counts_BE.sum(0), zero, violation)
    if not (loss.sequence_balance_weight or loss.batch_balance_weight):
        return stats
    chosen_BE = counts_BE
    if loss.balance_frequency == "unbiased":
        chosen_BE = _count(
            lax.top_k(lax.stop_gradient(scores_BSE), model.experts_per_token)[1], valid_BS, model.num_experts
        )
    chosen_BE = keep(chosen_BE, CHOICE)
    share_BSE = scores_BSE / (scores_BSE.sum(-1, keepdims=True) + 1e-20)
    share_BE = jnp.where(valid_BS[..., None], share_BSE, 0.0).sum(1)
    if loss.sequence_balance_weight:
        balance = _sequence_balance(model, context.total(chosen_BE), share_BE, tokens_B)
        stats = stats._replace(sequence_balance=balance)
    if loss.batch_balance_weight:
        stats = stats._replace(chosen_E=chosen_BE.sum(0), share_E=share_BE.sum(0))
    return stats


def batch_balance(model: Model, chosen_LE: jax.Array, share_LE: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the batch-wise loss sum_i f_i P_i, summed over layers.

    Args:
        model: experts, and experts per token.
        chosen_LE: `RouterStats.chosen_E` of the whole batch.
        share_LE: `RouterStats.share_E` of the whole batch, or of a part of it, which gives its part of the loss.
        tokens: of the whole batch.
    """
    tokens = jnp.maximum(tokens, 1)
    frequency_LE = chosen_LE * (model.num_experts / model.experts_per_token) / tokens
    return (frequency_LE * share_LE).sum(-1).sum() / tokens


def _sequence_balance(model: Model, chosen_BE: jax.Array, share_BE: jax.Array, tokens_B: jax.Array) -> jax.Array:
    tokens_B1 = jnp.maximum(tokens_B, 1)[:, None]
    frequency_BE = chosen_BE * (model.num_experts / model.experts_per_token) / tokens_B1
    return (frequency_BE * share_BE / tokens_B1).sum()


def _count(experts_BSK: jax.Array, valid_BS: jax.Array, num_experts: int) -> jax.Array:
    """Count assignments per sequence and expert, int32 [B, E]: exact, unlike a count in a float."""
    chosen = (experts_BSK[..., None] == jnp.arange(num_experts)) & valid_BS[..., None, None]
    return chosen.sum((1, 2), dtype=jnp.int32)


def max_violation(counts_LE: jax.Array) -> jax.Array:
    """Return MaxVio per layer: (max load - mean load) / mean load; 0 for a layer without assignments."""
    mean_L = counts_LE.mean(-1, dtype=jnp.float32)
    return jnp.where(mean_L > 0, counts_LE.max(-1) / jnp.maximum(mean_L, 1e-9) - 1.0, 0.0)


def update_biases(router_bias: Any, counts_LE: jax.Array, rate: jax.Array) -> Any:
    """Give each stack of biases its rows of the counts (MoE layers first, then MTP layers) and take one step.

    MTP layers that did not run have no rows, and their biases stay.
    """
    leaves, tree = jax.tree.flatten(router_bias)
    starts = [sum(leaf.shape[0] for leaf in leaves[:i]) for i in range(len(leaves))]
    updated = []
    for start, leaf in zip(starts, leaves, strict=True):
        counts = counts_LE[start : start + leaf.shape[0]]
        updated.append(update_bias(leaf, counts, rate) if counts.shape[0] else leaf)
    return jax.tree.unflatten(tree, updated)


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, rate: jax.Array) -> jax.Array:
    """Take one step of auxiliary-loss-free balancing: b_i + rate * sign(mean(n) - n_i) (V3 section 2.1.2).

    `counts_LE` are the exact integer counts of the whole global batch, all micro-batches and devices. The comparison
    stays in integers (E * n_i against the sum), so a load at the mean gives a step of exactly 0.
    """
    surplus = _compare(counts_LE.sum(-1, keepdims=True), counts_LE, counts_LE.shape[-1])
    return bias_LE + rate * surplus.astype(bias_LE.dtype)


def _compare(total: jax.Array, count: jax.Array, num: int) -> jax.Array:
    """Return sign(total / num - count) without overflow: compare the quotient, then the remainder."""
    quotient, remainder = total // num, total % num
    return jnp.where(count == quotient, jnp.sign(remainder), jnp.sign(quotient - count))
