"""Dropless expert exchange: one seam, `exchange`, between routing and the experts' arithmetic.

Problem. Each of `parts` devices has T tokens, each token wants K of E experts, and E / parts experts live on each
device. Nothing may be dropped, shapes are static, and memory must not be sized for the worst case, in which every
device sends everything to one (at 64 devices 64 times the balanced load).

Choice. Rounds of one program. A round carries `capacity = slack * T * K / parts` rows for each destination. An
assignment whose position among its sender's assignments to that destination is p travels in round p // capacity.
Balanced routing needs one round; all tokens to one expert need parts / slack rounds of the same size. The number of
rounds is the maximum over devices, so every device runs the same collectives. A loop with a traced bound has no
derivative, so the loop has its own: the first round keeps its residuals, later rounds (rare) are recomputed.

Worked example, one sender, parts = 2, capacity = 2, five assignments (T = 5, K = 1), one expert per device:

    expert of token       0  0  1  0  1
    destination           0  0  1  0  1        = expert // experts per device
    position within it    0  1  0  2  1
    round                 0  0  0  1  0        = position // capacity
    slot in its round     0  1  2  0  3        = destination * capacity + position % capacity

    round 0 sends rows    [token 0, token 1 | token 2, token 4]      round 1 sends    [token 3, empty | empty, empty]

Rows move by gathers only, both ways (`parallel.rows`). The gate weight travels with its row and is applied before the
down projection (as in DeepSeek's own trace), so combining is a plain sum and the gate's gradient comes out of the
expert's backward pass.

What lost: a worst-case buffer (memory), a capacity factor with dropping (wrong mathematics), `lax.ragged_all_to_all`
(absent on CPU, corrupted gradients on GPU in others' experience).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.mesh import vary
from deepseek_jax.parallel.rows import gather_rows, sum_rows
from deepseek_jax.parameters import EXPERTS

# (weights, x_TD, gates_TK, experts_TK) -> y_TD: the gated sum of each row's experts. An id outside the weights' experts
# contributes zero.
ExpertFn = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def exchange(
    x_TD: jax.Array,
    experts_TK: jax.Array,
    gates_TK: jax.Array,
    weights: Any,
    expert_fn: ExpertFn,
    *,
    transport: str,
    num_experts: int,
    slack: float,
) -> jax.Array:
    """Apply each token's experts wherever they live; return the gated sums y_TD.

    Args:
        x_TD: this device's rows.
        experts_TK: global expert ids, int32; `num_experts` means no expert (padding).
        gates_TK: gate weights, FP32.
        weights: this device's experts, leading dim E / devices.
        expert_fn: the experts' arithmetic on rows that are here.
        transport: "local" (every expert is here: the specification) or "all_to_all" (inside a shard_map with the
            `EXPERTS` axes).
        num_experts: E.
        slack: how many rows one round carries, in multiples of the balanced number.
    """
    if transport == "local":
        return expert_fn(weights, x_TD, gates_TK, experts_TK)
    parts = math.prod(lax.axis_size(axis) for axis in EXPERTS)
    capacity = math.ceil(slack * experts_TK.size / parts)
    route = _Route(parts, num_experts // parts, min(capacity, experts_TK.size))
    return _all_to_all(route, expert_fn, x_TD, experts_TK, gates_TK, weights)


class _Route(NamedTuple):
    """Static facts of an exchange."""

    parts: int  # devices along EXPERTS
    num_local: int  # experts on each
    capacity: int  # rows for one destination in one round


class _Plan(NamedTuple):
    """Where each assignment goes. Destination `parts` means nowhere."""

    destination: jax.Array
    position: jax.Array  # among the assignments to that destination
    rounds: jax.Array  # the same number on every device


def _plan(route: _Route, experts_TK: jax.Array) -> _Plan:
    expert = experts_TK.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    destination_sorted = expert[order] // route.num_local
    start = jnp.searchsorted(destination_sorted, jnp.arange(route.parts + 1), method="compare_all").astype(jnp.int32)
    position_sorted = jnp.arange(expert.size, dtype=jnp.int32) - start[destination_sorted]
    position = jnp.zeros_like(expert).at[order].set(position_sorted, unique_indices=True)
    rounds = (jnp.diff(start).max() + route.capacity - 1) // route.capacity
    return _Plan(expert // route.num_local, position, lax.pmax(rounds, EXPERTS))


def _one_round(route, expert_fn, r, plan, experts_TK, x_TD, gates_TK, weights):
    """Send the assignments of round `r`, apply this device's experts to what arrived, and send the results home."""
    num_slots, num_assignments = route.parts * route.capacity, experts_TK.size
    here = (plan.position // route.capacity == r) & (plan.destination < route.parts)
    slot = jnp.where(here, plan.destination * route.capacity + plan.position % route.capacity, num_slots)
    index = jnp.arange(num_assignments, dtype=jnp.int32)
    source_W = (
        vary(jnp.full((num_slots,), num_assignments, jnp.int32), slot)
        .at[slot]
        .set(index, mode="drop", unique_indices=True)
    )
    slots_TK = slot.reshape(experts_TK.shape)

    def travel(rows):
        parts = rows.reshape(route.parts, route.capacity, *rows.shape[1:])
        return lax.all_to_all(parts, EXPERTS, 0, 0).reshape(rows.shape)

    with jax.named_scope("dispatch"):
        local = jnp.take(experts_TK.reshape(-1) % route.num_local, source_W, mode="fill", fill_value=route.num_local)
        rows_WD = travel(gather_rows(x_TD, source_W, slots_TK))
        gates_W1 = travel(gather_rows(gates_TK.reshape(-1, 1), source_W, slots_TK.reshape(-1, 1)))
        local_W1 = travel(local)[:, None]
    y_WD = expert_fn(weights, rows_WD, gates_W1, local_W1)
    with jax.named_scope("combine"):
        return sum_rows(travel(y_WD), source_W, slots_TK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_to_all(route, expert_fn, x_TD, experts_TK, gates_TK, weights):
    plan = _plan(route, experts_TK)
    one_round = functools.partial(_one_round, route, expert_fn)
    first = one_round(0, plan, experts_TK, x_TD, gates_TK, weights)
    return lax.fori_loop(
        1, plan.rounds, lambda r, y: y + one_round(r, plan, experts_TK, x_TD, gates_TK, weights), first
    )


def _all_to_all_forward(route, expert_fn, x_TD, experts_TK, gates_TK, weights):
    plan = _plan(route, experts_TK)
    one_round = functools.partial(_one_round, route, expert_fn)
    first, pull_first = jax.vjp(functools.partial(one_round, 0, plan, experts_TK), x_TD, gates_TK, weights)
    y_TD = lax.fori_loop(
        1, plan.rounds, lambda r, y: y + one_round(r, plan, experts_TK, x_TD, gates_TK, weights), first
    )
    return y_TD, (plan, pull_first, x_TD, experts_TK, gates_TK, weights)


def _all_to_all_backward(route, expert_fn, residuals, g_TD):
    plan, pull_first, x_TD, experts_TK, gates_TK, weights = residuals

    def body(r, total):
        _, pull = jax.vjp(functools.partial(_one_round, route, expert_fn, r, plan, experts_TK), x_TD, gates_TK, weights)
        return jax.tree.map(jnp.add, total, pull(g_TD))

    dx_TD, dgates_TK, dweights = lax.fori_loop(1, plan.rounds, body, pull_first(g_TD))
    return dx_TD, None, dgates_TK, dweights


_all_to_all.defvjp(_all_to_all_forward, _all_to_all_backward)
