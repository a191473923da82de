"""The router of a decoding step: from normed rows to experts, gates, and what `experts_decode` reads of them.

    score_te = sigmoid(h_t . w_e);  K experts by score + bias within the best groups;  gate = score / sum of the chosen

The kernel takes as long as its launch and its chain of latencies: nothing that it reads is large.
"""

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch
from pallas_kernels.quantized import check_array
from pallas_kernels.routing import hopper, reference
from pallas_kernels.routing.rule import Routing, Rule

PARTS = 3  # BF16 numbers whose sum is an FP32 number


def route(
    h: Array,
    router: Array,
    bias: Array,
    valid: Array,
    *,
    rule: Rule,
    num_experts: int,
    zeros: Array | None = None,
    implementation: str = "auto",
) -> Routing:
    """Return experts, gates and scores of T tokens. There is no derivative.

    The products are exact before their sums in FP32, because the router comes in three BF16 parts. Of scores that are
    equal the lower index comes first. What stands in the row of a token reaches no other row, NaN included.

    Args:
        h: BF16 [T, D], normed.
        router: BF16 [3D, E]: the parts of an FP32 [D, E], one below the other, the largest first.
        bias: FP32 [E], which only selects.
        valid: bool [T], False on padding. Its experts are all `num_experts`, its gates 0.
        rule: how many experts, of which groups, with which gates.
        num_experts: at least E; the experts from E on are everybody's, with gate 1.
        zeros: int32 [256], for the marks of the kernel, which writes into them. None: XLA makes some, in two kernels.
            It does so, too, where the products have more than 256 blocks, which need more marks (`hopper.call`).
        implementation: "auto", "reference" or "hopper". The kernel takes at most 512 tokens, D a multiple of 64, and E
            of 64 up to 256; "auto" takes the reference for others.

    Returns:
        The routing; with `dense` from the kernel and up to 32 tokens.

    Raises:
        ValueError: a shape, a dtype or a rule that does not fit.
        NotImplementedError: there is no such kernel here.
    """
    check(h, router, bias, valid, rule, num_experts)
    faces = {"reference": reference.route}
    fault = hopper.fault(h, router)
    if not fault:
        faces["hopper"] = functools.partial(hopper.route, zeros=zeros)
    elif implementation == "hopper":
        raise NotImplementedError(f"routing has no 'hopper' kernel for {fault}; use 'auto' or 'reference'")
    face = dispatch.choose("routing", implementation, faces)
    return face(h, router, bias, valid, rule=rule, num_experts=num_experts)


def check(h: Array, router: Array, bias: Array, valid: Array, rule: Rule, num_experts: int) -> None:
    """Refuse operands that do not fit each other.

    Raises:
        ValueError: with the shapes, the dtypes or the rule.
    """
    arrays = {"h": (h, jnp.bfloat16, 2), "router": (router, jnp.bfloat16, 2), "bias": (bias, jnp.float32, 1)}
    for name, (array, dtype, dims) in (arrays | {"valid": (valid, jnp.bool_, 1)}).items():
        check_array(name, array)
        if array.dtype != dtype or array.ndim != dims or 0 in array.shape:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; it must be {dtype.__name__} with {dims} dims, none empty"
            )
    num_routed = router.shape[1]
    if (PARTS * h.shape[1], len(bias), len(valid)) != (len(router), num_routed, len(h)):
        raise ValueError(
            f"h has shape {h.shape}, router {router.shape}, bias {bias.shape} and valid {valid.shape}; they must be"
            f" [T, D], [{PARTS}D, E], [E] and [T]"
        )
    kept = num_routed // max(1, rule.num_groups) * min(rule.num_kept_groups, rule.num_groups)
    if rule.num_groups < 1 or num_routed % rule.num_groups or not 0 < rule.k <= kept or num_experts < num_routed:
        raise ValueError(
            f"{rule} does not fit {num_routed} of {num_experts} experts: groups must be equally large, and those kept"
            " have at least k experts"
        )
