"""Products that add to sums of gradients give the sum and the gradient, each once, whatever the experts' arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.model.experts_grouped import GroupedExperts
from deepseek_jax.parallel.gradient_sums import GradientSum, added, lend
from deepseek_jax.parallel.weights import attach
from pallas_kernels.quantize import quantize_blocks

T, K, E, D, F = 32, 2, 4, 128, 128
# Blocks of an expert are added to its sum one by one: an FP32 rounding each. Kernels add once, as the test does.
EXPERTS = {"grouped": (GroupedExperts(), 0), "fp8": (Fp8Experts(), 0), "blocks": (BlockedExperts(8, 2), 3e-7)}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    weights = {"gate_up_ED2F": rng.normal(size=(E, D, 2, F)) / D**0.5, "down_EFD": rng.normal(size=(E, F, D)) / F**0.5}
    sums = {name: rng.normal(size=w.shape) for name, w in weights.items()}
    weights, sums = jax.tree.map(np.float32, (weights, sums))
    x_TD, g_TD = (jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16) for _ in range(2))
    experts_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    return weights, sums, x_TD, g_TD, experts_TK, rng.random((T, K)).astype(np.float32)


def numbers_of(name, w):
    if name != "fp8":
        return (jnp.asarray(w, jnp.bfloat16),)
    quantized = quantize_blocks(jnp.asarray(w).reshape(E, w.shape[1], -1))
    return quantized.values.reshape(w.shape), quantized.scales


@pytest.mark.parametrize("name", EXPERTS)
def test_the_cotangent_of_a_lent_sum_is_the_new_sum(name):
    weights, sums, x_TD, g_TD, experts_TK, gates_TK = arrays()
    (experts, rounding), numbers = EXPERTS[name], {key: numbers_of(name, w) for key, w in weights.items()}

    @jax.jit
    def gradients(params):
        def apply(params):
            return exchange(
                x_TD, experts_TK, gates_TK, attach(params, numbers), experts, transport="local", num_experts=E, slack=1
            )

        return jax.vjp(apply, params)[1](g_TD)[0]

    apart, lent = gradients(weights), gradients(lend(weights, numbers, sums))
    for key, total in sums.items():
        assert isinstance(lent[key], GradientSum) and np.abs(apart[key]).max() > 0.1
        want = np.asarray(added(total, apart[key]))
        assert np.abs(added(total, lent[key]) - want).max() <= rounding * np.abs(want).max()


def test_sums_are_lent_to_experts_with_a_carrier_alone():
    """Other products would return their gradient without the sum, and FP32 weights are themselves differentiated."""
    dense, expert = np.ones((2, 2), np.float32), np.ones((2, 2, 2), np.float32)
    params = {"down_FD": dense, "moe": [{"down_EFD": expert}, {"down_EFD": expert}], "norm_D": dense[0]}
    numbers = {"down_FD": (dense,), "moe": [{"down_EFD": (expert,)}, {"down_EFD": None}], "norm_D": None}
    sums = jax.tree.map(np.zeros_like, params)
    lent = lend(params, numbers, sums)
    assert lent["down_FD"] is dense and lent["moe"][1]["down_EFD"] is expert and lent["norm_D"] is params["norm_D"]
    assert lent["moe"][0]["down_EFD"].total is sums["moe"][0]["down_EFD"]
