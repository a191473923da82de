"""Adapters of routed experts have the derivatives of merged weights, and change no bit while B is zero."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.adapters import Adapted
from deepseek_jax.model.experts_adapted import AdaptedExperts, pair_of
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.parameters import Fp8Weight
from tests.model.test_experts_fp8 import D, E, F, apply_local, ids, inputs, quantized

RANK, SCALE = 4, 0.5
INNER = {"fp32": BlockedExperts(32, 100), "bf16": GroupedExperts(), "fp8": Fp8Experts()}
LEAST = {"fp32": 1 - 1e-9, "bf16": 0.9999, "fp8": 0.995}  # cosines; measured 1 - 1e-12, 0.99997, 0.998


def pairs(moved=True):
    random = np.random.default_rng(0).standard_normal
    shapes = {"gate_up_ED2F": (D, 2 * F), "down_EFD": (F, D)}
    return {
        name: {
            "lora_a_EIU": np.float32(random((E, size, RANK)) / size**0.5),
            "lora_b_EUO": np.float32(moved * random((E, RANK, out))),
        }
        for name, (size, out) in shapes.items()
    }


@functools.partial(jax.jit, static_argnames=("precision", "adapted"))
def value_and_gradients(weights, given, x_TD, g_TD, gates_TK, experts_TK, precision, adapted=True):
    """Of the adapted experts, or of plain experts with merged weights."""
    dtype, inner = jnp.float32 if precision == "fp32" else jnp.bfloat16, INNER[precision]

    def base(w):
        return Fp8Weight(None, *quantized(w)) if precision == "fp8" else w.astype(dtype)

    def apply(given, x_TD, gates_TK):
        if adapted:
            parts = {name: Adapted(base(w), given[name], SCALE) for name, w in weights.items()}
            experts = AdaptedExperts(inner, tuple((name, SCALE) for name in weights))
            return apply_local(experts, parts, x_TD.astype(dtype), gates_TK, experts_TK)
        merged = {
            name: w + SCALE * (given[name]["lora_a_EIU"] @ given[name]["lora_b_EUO"]).reshape(w.shape)
            for name, w in weights.items()
        }
        return apply_local(INNER["fp32"], merged, x_TD.astype(jnp.float32), gates_TK, experts_TK)

    y, pull = jax.vjp(apply, given, x_TD, gates_TK)
    dpairs, dx, dgates = pull(g_TD.astype(y.dtype))
    return {"y": y, "x": dx, "gates": dgates, "pairs": dpairs}


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bf16", "fp8"))]
)
def test_derivatives_are_those_of_merged_weights(precision):
    weights, x, g, gates = inputs()
    got, want = (
        value_and_gradients(weights, pairs(), x, g, gates, ids("absent"), each, adapted)
        for each, adapted in ((precision, True), ("fp32", False))
    )
    leaves = jax.tree_util.tree_leaves_with_path(got)
    assert len(leaves) == 3 + 4
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert cosine >= LEAST[precision] and abs(np.linalg.norm(a) / np.linalg.norm(b) - 1) < 0.02, (path, cosine)


def test_gradients_are_added_to_those_that_some_pairs_have(monkeypatch):
    """One of two pairs comes with a sum so far, of ones: its gradients are the sum, the other's are as they were."""

    class Begun(AdaptedExperts):
        def backward(self, weights, *args):
            pair = pair_of("down_EFD")
            *rest, dweights = args
            return super().backward(weights, *rest, dweights | {pair: jax.tree.map(jnp.ones_like, weights[pair])})

    weights, x, g, gates = inputs()
    given = weights, pairs(), x, g, gates, ids("absent"), "fp32"
    want = value_and_gradients(*given)["pairs"]
    monkeypatch.setitem(globals(), "AdaptedExperts", Begun)
    got = jax.jit(lambda: value_and_gradients.__wrapped__(*given)["pairs"])()
    for name, begun in (("gate_up_ED2F", 0), ("down_EFD", 1)):
        for one, other in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            np.testing.assert_allclose(one, other + begun, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_no_bit_changes_while_b_is_zero(precision):
    weights, x, g, gates = inputs()
    got = value_and_gradients(weights, pairs(moved=False), x, g, gates, ids("absent"), precision)

    @jax.jit
    def plain(weights, x):
        if precision == "fp8":
            parts = {name: Fp8Weight(jnp.zeros(w.shape), *quantized(w)) for name, w in weights.items()}
        else:
            parts = jax.tree.map(lambda w: w.astype(got["y"].dtype), weights)
        return apply_local(INNER[precision], parts, x.astype(got["y"].dtype), gates, ids("absent"))

    np.testing.assert_array_equal(np.float32(got["y"]), np.float32(plain(weights, x)))
    for pair in got["pairs"].values():
        assert not np.any(pair["lora_a_EIU"]) and np.any(pair["lora_b_EUO"])


def test_no_sum_is_said_to_be_sorted():
    """For such a sum of blocks XLA makes a kernel of a GPU that its assembler takes minutes for."""
    weights, x, g, gates = inputs()
    traced = value_and_gradients.trace(weights, pairs(), x, g, gates, ids("absent"), "fp32")
    sums = re.findall(r"scatter-add\[.*?indices_are_sorted=(\w+)", str(traced.jaxpr), re.DOTALL)
    assert sums and set(sums) == {"False"}
