"""Routing of a decoding step on Hopper, in one kernel: blocks that multiply, and behind them a block per token.

Blocks of the product (`hopper_product.py`) leave parts of the logits in memory, each with a mark (`hopper/marks.py`).
Those of the tokens (`hopper_choice.py`) have higher numbers, wait for all marks, and choose.

Floor. The router's parts are 0.8 MB in configs/v3_5b.py and 11 MB in V3, 0.2 and 2.6 us at 4.3 TB/s. Everything else is
latency: a launch in a graph about 1 us, first bytes from memory 0.8 us, marks 1 us, sums through shared memory 0.1 us
each.

Prediction, before the first run, 16 tokens of configs/v3_5b.py: 4.5 us, and 5.5 as two kernels, where XLA's for the
same work and for the plan of `experts_decode` took about 15. V3, 128 tokens: 10 us.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts_decode.plan import MOST_DENSE, Dense, round_up
from pallas_kernels.hopper.marks import MARKS, set_mark, wait_for_marks, write_zeros
from pallas_kernels.lowering import layout_inference
from pallas_kernels.routing.hopper_choice import Choice
from pallas_kernels.routing.hopper_product import MOST_ROWS, TILE, Product
from pallas_kernels.routing.rule import Routing, Rule

MOST_TOKENS, MOST_EXPERTS = 512, 256  # until then a block for each token is fast; of a byte


def fault(h: Array, router: Array) -> str | None:
    """Return what the kernel is not made for, or None."""
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
    zeros: Array | None = None,
    interpreted: bool = False,
) -> Routing:
    """Return the routing, with `dense` for up to 32 tokens."""
    num_tokens, num_routed = len(h), router.shape[1]
    n, valid = filled(num_tokens), valid.astype(jnp.int32)
    if n > num_tokens:
        h, valid = jnp.pad(h, ((0, n - num_tokens), (0, 0))), jnp.pad(valid, (0, n - num_tokens))
    product, choice = Product(n, h.shape[1], num_routed, interpreted), Choice(n, num_routed, num_experts, rule)
    experts, gates, scores, *dense = call(product, choice, h, router, bias, valid, zeros)
    found = experts[:num_tokens], gates[:num_tokens], scores[:num_tokens, :num_routed]
    return Routing(*found, Dense(*dense) if num_tokens <= MOST_DENSE else None)


def filled(num_tokens: int) -> int:
    """Return the rows of the product."""
    return round_up(num_tokens) if num_tokens <= MOST_ROWS else -(-num_tokens // MOST_ROWS) * MOST_ROWS


def call(
    product: Product,
    choice: Choice,
    h: Array,
    router: Array,
    bias: Array,
    valid: Array,
    zeros: Array | None = None,
) -> list[Array]:
    """Return what `choice` says of h BF16 [N, D], and zeros int32 [`MARKS`]."""
    num_blocks, out_types = product.blocks, choice.out_types()
    partial = jax.ShapeDtypeStruct((product.cuts, choice.n, choice.columns), jnp.float32)
    num_slots, num_out = len(product.scratch()), len(out_types)

    def kernel(h_ref, router_ref, bias_ref, valid_ref, marks_ref, partial_ref, *refs):
        outputs, zeros_ref, scratch = refs[:num_out], refs[num_out], refs[1 + num_out :]
        block = lax.axis_index("block")

        @pl.when(block < num_blocks)
        def _():
            product.leave_part(block, h_ref, router_ref, partial_ref, *scratch[:num_slots])
            if not product.interpreted:
                set_mark(marks_ref.at[pl.ds(block, 1)])

        @pl.when(block == num_blocks)
        def _():
            write_zeros(zeros_ref)

        @pl.when(block >= num_blocks)
        def _():
            token = block - num_blocks
            if not product.interpreted:
                wait_for_marks(marks_ref.at[pl.ds(product.first_mark(token), product.parts)])
            choice.take_token(token, partial_ref, bias_ref, valid_ref, outputs, scratch[num_slots:])

    if zeros is None or num_blocks > MARKS:
        zeros = jnp.zeros((max(MARKS, num_blocks),), jnp.int32)
    layout_inference.install()
    _, *found = plgpu.kernel(
        kernel,
        kernel_name="routing",
        out_type=[partial, *out_types, jax.ShapeDtypeStruct((MARKS,), jnp.int32)],
        grid=(num_blocks + choice.n,),
        grid_names=("block",),
        scratch_types=[*product.scratch(), *choice.scratch()],
    )(h, router, bias, valid, jax.new_ref(zeros))
    return found
