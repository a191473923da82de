"""The routed experts of a decoding step: few tokens, whose time is that of reading the experts' weights once.

    y_t = sum over the experts e of token t of  gate_te * down_e^T (silu(gate_e^T h_t) * (up_e^T h_t))

Here the experts of all layers may lie in one array, of which a call reads one layer in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import GROUP, dispatch
from pallas_kernels.experts_decode import hopper, reference
from pallas_kernels.experts_decode.plan import Dense
from pallas_kernels.quantized import Quantized, check_array, check_quantized

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def experts_decode(
    h: Array | Quantized,
    experts: Array,
    gates: Array,
    gate_up: Array | Quantized,
    down: Array | Quantized,
    *,
    layer: Array | int | None = None,
    dense: Dense | None = None,
    parts: bool = False,
    everybody: int = 0,
    implementation: str = "auto",
) -> Array:
    """Return the gated sums y [T, D] over each token's experts.

    In FP8 the products and their promotion every 128 are those of training (`grouped_matmul`). The activations between
    the two products are quantised in tiles of 128 channels, straight from FP32. An expert without tokens is not read.
    What stands in the row of a token reaches no other row, NaN included.

    Args:
        h: BF16 or FP32 [T, D], or in FP8 tiles [T, D]. T is 1 to 512, or more where that is fast enough.
        experts: int32 [T, K]; values outside [0, E) are no expert.
        gates: FP32 [T, K].
        gate_up: of h's dtype [E, D, 2F], gate first; in FP8 blocks [E, 2F, D], D last as the tensor cores want it. With
            `layer` [L, E, ...].
        down: [E, F, D]; in FP8 blocks [E, D, F]. With `layer` [L, E, ...].
        layer: which of L layers is read.
        dense: what `pallas_kernels.routing` has made of these experts and gates, which saves kernels.
        parts: whether to return FP32 parts [., T, D], whose sum is y: for a caller that adds more to them.
        everybody: how many of the experts, the last ones, every token has: the shared ones. The kernel cuts its work
            for the rows of the others. From 0 to K - 1; any of these gives the same sums.
        implementation: "auto", "reference" or "hopper". The Hopper kernels take BF16 or FP8, D a multiple of 256 and F
            of 128; "auto" takes the reference for others.

    Returns:
        [T, D] of h's dtype, BF16 in FP8; or the parts.

    Raises:
        ValueError: shapes, dtypes or groupings that do not fit.
        NotImplementedError: there is no such kernel here.
    """
    num_experts = check(h, experts, gates, gate_up, down, layer)
    if not 0 <= everybody < experts.shape[1]:
        raise ValueError(
            f"everybody = {everybody} must be from 0 to {experts.shape[1] - 1} for experts {experts.shape}, so that a"
            " token has an expert of its own; pass 0 if it has none"
        )
    faces = {"reference": reference.experts_decode}
    fault = kernel_fault(h, down)
    if not fault:
        faces["hopper"] = functools.partial(hopper.experts_decode, everybody=everybody)
    elif implementation == "hopper":
        raise NotImplementedError(f"experts_decode has no 'hopper' kernel for {fault}; use 'auto' or 'reference'")
    base = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32) * num_experts
    if layer is not None:
        gate_up, down = merge(gate_up), merge(down)
    face = dispatch.choose("experts_decode", implementation, faces)
    return face(h, experts, gates, gate_up, down, base, dense, num_experts=num_experts, parts=parts)


def merge(weight: Array | Quantized) -> Array | Quantized:
    """Return weights [L, E, ...] as [L * E, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), weight)


def check(h, experts, gates, gate_up, down, layer) -> int:
    """Refuse operands that do not fit each other; return E.

    Raises:
        ValueError: with the shapes or dtypes.
    """
    lead = 1 if layer is None else 2
    in_fp8 = isinstance(gate_up, Quantized)
    if in_fp8:
        check_quantized("h", h, "tile", num_dims=2)
        check_quantized("gate_up", gate_up, "block", num_dims=2 + lead)
        check_quantized("down", down, "block", num_dims=2 + lead)
        width, hidden = gate_up.shape[-1], down.shape[-1]
        expected = (2 * hidden, width), (width, hidden)
    else:
        for name, array, dims in (("h", h, 2), ("gate_up", gate_up, 2 + lead), ("down", down, 2 + lead)):
            check_array(name, array)
            if array.ndim != dims or 0 in array.shape or array.dtype != h.dtype or array.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}; it must be of h's dtype, bfloat16 or float32, with {dims}"
                    " dims, none of them empty"
                )
        width, hidden = gate_up.shape[-2], down.shape[-2]
        expected = (width, 2 * hidden), (hidden, width)
    found = gate_up.shape[-2:], down.shape[-2:]
    if found != expected or gate_up.shape[:-2] != down.shape[:-2] or h.shape[1] != width:
        raise ValueError(f"h has shape {h.shape}, gate_up {gate_up.shape} and down {down.shape}: they do not fit")
    for name, array, dtype in (("experts", experts, jnp.int32), ("gates", gates, jnp.float32)):
        check_array(name, array)
        if array.dtype != dtype or array.ndim != 2 or array.shape[0] != h.shape[0] or array.shape != experts.shape:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; for h {h.shape} it must be {dtype.__name__} [T, K]"
            )
    return gate_up.shape[lead - 1]


def kernel_fault(h: Array | Quantized, down: Array | Quantized) -> str | None:
    """Return what the Hopper kernels are not made for, or None."""
    if not isinstance(h, Quantized) and h.dtype != jnp.bfloat16:
        return str(h.dtype)
    width, hidden = h.shape[1], down.shape[-1 if isinstance(down, Quantized) else -2]
    if width % (2 * GROUP) or hidden % GROUP:
        return f"D = {width} and F = {hidden}, only for multiples of {2 * GROUP} and {GROUP}"
    return None
