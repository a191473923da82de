"""Routing of a decoding step on Hopper: a kernel for the router's product, and one that chooses.

Floor. The router's parts are 0.8 MB in configs/v3_5b.py and 11 MB in V3, 0.2 and 2.6 us at 4.3 TB/s. Everything else is
latency: a launch in a graph about 1 us, first bytes from memory 0.8 us, sums through shared memory 0.1 us each.

Prediction, before the first run, 16 tokens of configs/v3_5b.py: product 2.2 us and choice 3 us, where XLA's kernels for
the same work and for the plan of `experts_decode` took about 15. V3, 128 tokens: 6 and 6 us.

In one kernel, the last block of a token to finish would choose. It needs a counter that is zero when a step begins, and
what makes it zero is a kernel, too. A cluster of eight blocks needs no counter. But eight multiprocessors read V3's
router in 30 us, and that of configs/v3_5b.py no sooner than the two launches take.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.experts_decode.plan import MOST_DENSE, Dense, round_up
from pallas_kernels.routing.hopper_choice import choose
from pallas_kernels.routing.hopper_product import TILE, partial_logits
from pallas_kernels.routing.rule import Routing, Rule

MOST_TOKENS, MOST_EXPERTS = 128, 256  # of a block's shared memory; of a byte
LANES = 128  # of a warpgroup


def fault(h: Array, router: Array, rule: Rule, num_experts: int) -> str | None:
    """Return what the kernels are not made for, or None."""
    (num_tokens, width), num_routed = h.shape, router.shape[1]
    if num_tokens > MOST_TOKENS:
        return f"{num_tokens} tokens, only for up to {MOST_TOKENS}"
    if width % TILE or num_routed % TILE or num_routed > MOST_EXPERTS:
        return f"D = {width} and E = {num_routed}, only for multiples of {TILE}, E up to {MOST_EXPERTS}"
    return None


def route(
    h: Array,
    router: Array,
    bias: Array,
    valid: Array,
    *,
    rule: Rule,
    num_experts: int,
    interpreted: bool = False,
) -> Routing:
    """Return the routing, with `dense` for up to 32 tokens."""
    num_tokens, num_routed = len(h), router.shape[1]
    n, columns = round_up(num_tokens), -(-num_experts // LANES) * LANES
    valid = valid.astype(jnp.int32)
    if n > num_tokens:
        h, valid = jnp.pad(h, ((0, n - num_tokens), (0, 0))), jnp.pad(valid, (0, n - num_tokens))
    partial = partial_logits(h, router, columns, interpreted=interpreted)
    experts, gates, scores, *dense = choose(partial, bias, valid, rule, num_experts)
    found = experts[:num_tokens], gates[:num_tokens], scores[:num_tokens, :num_routed]
    return Routing(*found, Dense(*dense) if num_tokens <= MOST_DENSE else None)
