"""Experts of a decoding step against the exchange, which training uses."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.model import experts_decode
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.experts_blocks import BlockedExperts
from deepseek_jax.model.experts_decode import expert_decode
from deepseek_jax.model.experts_fp8 import Fp8Experts
from deepseek_jax.parameters import EXPERTS, Fp8Weight, P
from pallas_kernels.quantize import quantize_blocks

T, K, E, D, F = 5, 2, 4, 256, 128


def case(dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    h_TD = jax.random.normal(keys[0], (T, D), dtype)
    experts_TK = jax.vmap(lambda key: jax.random.permutation(key, E)[:K])(jax.random.split(keys[1], T))
    gates_TK = jax.random.uniform(keys[2], (T, K))
    gate_up_ED2F = jax.random.normal(keys[3], (E, D, 2, F), dtype) / D**0.5
    down_EFD = jax.random.normal(keys[4], (E, F, D), dtype) / F**0.5
    return h_TD, experts_TK.at[2, 1].set(E), gates_TK, {"gate_up_ED2F": gate_up_ED2F, "down_EFD": down_EFD}


def in_fp8(weights):
    def quantized(weight):
        blocks = quantize_blocks(weight.reshape(*weight.shape[:2], -1))
        return Fp8Weight(None, blocks.values.reshape(weight.shape), blocks.scales)

    return {name: quantized(weight) for name, weight in weights.items()}


def through_exchange(h_TD, experts_TK, gates_TK, weights, experts):
    return exchange(h_TD, experts_TK, gates_TK, weights, experts, transport="local", num_experts=E, slack=1.25)


def distance(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def sums(*operands, **options):
    return expert_decode(*operands, **options).sum(0)


def test_it_equals_the_exchange():
    operands = case(jnp.float32)
    assert distance(jax.jit(sums)(*operands), through_exchange(*operands, BlockedExperts(4, 4))) < 2e-6


def test_so_it_does_in_fp8():
    """The sums of training are rounded to BF16 for each expert; here only once."""
    *operands, weights = case(jnp.bfloat16)
    weights = in_fp8(weights)
    want = through_exchange(*operands, weights, Fp8Experts())
    assert distance(jax.jit(sums)(*operands, weights), want) < 5e-3


def test_experts_of_every_token_may_be_products_of_their_own(monkeypatch):
    """All sums are in FP32 in both ways, and both round the activations to BF16."""
    h_TD, experts_TK, gates_TK, weights = case(jnp.bfloat16)
    experts_TK = jnp.stack([experts_TK[:, 0] % (E - 1), jnp.full(T, E - 1)], axis=1)
    operands = h_TD, experts_TK, gates_TK.at[:, 1].set(1.0), weights
    inside = sums(*operands, everybody=1)
    monkeypatch.setattr(experts_decode, "MOST_BESIDE", 0)
    parts_XTD = expert_decode(*operands, everybody=1)
    assert parts_XTD.dtype == jnp.float32 and distance(parts_XTD.sum(0), inside) < 1e-4


def test_devices_sum_up_what_their_experts_give():
    *operands, weights = case(jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), EXPERTS)

    def local(h_TD, experts_TK, gates_TK, weights):
        first = jax.lax.axis_index(EXPERTS) * weights["down_EFD"].shape[0]
        return jax.lax.psum(sums(h_TD, experts_TK - first, gates_TK, weights), EXPERTS)

    whole = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(), P(EXPERTS)), out_specs=P()))
    assert distance(whole(*operands, weights), sums(*operands, weights)) < 1e-6
