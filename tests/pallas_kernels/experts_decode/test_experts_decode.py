"""Experts at decode in plain jnp against FP64, and what the public function refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.experts_decode import experts_decode, plan
from pallas_kernels.quantized import Quantized
from tests.pallas_kernels.experts_decode import cases

run = jax.jit(functools.partial(experts_decode, implementation="reference"))
SMALL = 256, 128  # D, F


@pytest.mark.parametrize("routing", ["spread", "one", "nobody"])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 8), (6, 20), (40, 6)])
def test_the_reference_equals_fp64(num_tokens, num_experts, routing):
    """Experts in turn, one row and several; all at once, and again for an expert with more rows."""
    operands = cases.make(num_tokens, 3, num_experts, *SMALL, dtype=jnp.float32, routing=routing)
    assert cases.error(run(*operands), cases.expected(*operands)) < 1e-6


def test_in_fp8_it_is_as_good_as_the_quantised_activations():
    operands = cases.in_fp8(*cases.make(2, 3, 8, *SMALL))
    assert cases.error(run(*operands), cases.expected(*operands)) < 0.03  # E4M3 rounds the activations by 2%


def test_parts_are_summed_by_the_caller():
    operands = cases.make(3, 3, 8, *SMALL)
    parts = jax.jit(functools.partial(experts_decode, implementation="reference", parts=True))(*operands)
    assert parts.dtype == jnp.float32
    assert (parts.sum(0).astype(jnp.bfloat16) == run(*operands)).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_one_layer_of_many_is_that_layer(fp8):
    h, experts, gates, *weights = cases.make(2, 2, 4, *SMALL)
    operands = (h, experts, gates, *weights)
    if fp8:
        h, experts, gates, *weights = operands = cases.in_fp8(*operands)
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), weights)
    stacked = [w if not isinstance(w, Quantized) else Quantized(w.values, w.scales, "block") for w in stacked]
    layered = jax.jit(functools.partial(experts_decode, implementation="reference"))
    result = layered(h, experts, gates, *stacked, layer=jnp.int32(1))
    assert cases.error(result, np.asarray(run(*operands), np.float64)) < 1e-6


@pytest.mark.parametrize("num_experts", [4, 20], ids=["at once", "in turn"])
def test_a_token_that_is_nan_spoils_itself_only(num_experts):
    h, *rest = cases.make(7, 2, num_experts, *SMALL, dtype=jnp.float32)
    poisoned = run(h.at[3].set(jnp.nan), *rest)
    others = np.arange(7) != 3
    np.testing.assert_allclose(poisoned[others], run(h, *rest)[others], rtol=1e-6, atol=1e-6)


def test_padding_that_is_nan_gives_zeros():
    h, experts, *rest = cases.make(7, 2, 8, *SMALL, dtype=jnp.float32)
    y = run(h.at[3].set(jnp.nan), experts.at[3].set(8), *rest)
    assert not y[3].any()


@pytest.mark.parametrize(
    "change",
    [
        {"h": jnp.zeros((4, 128), jnp.bfloat16)},
        {"h": jnp.zeros((4, 256), jnp.float32)},
        {"experts": jnp.zeros((4, 2), jnp.int16)},
        {"gates": jnp.zeros((4, 3), jnp.float32)},
        {"gates": jnp.zeros((3, 2), jnp.float32)},
        {"down": jnp.zeros((7, 128, 256), jnp.bfloat16)},
        {"down": jnp.zeros((8, 64, 256), jnp.bfloat16)},
        {"gate_up": jnp.zeros((256, 256), jnp.bfloat16)},
        {"layer": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_operands_that_do_not_fit_are_refused(change):
    names = "h", "experts", "gates", "gate_up", "down"
    operands = dict(zip(names, cases.make(4, 2, 8, *SMALL), strict=True)) | change
    with pytest.raises(ValueError, match="must be|do not fit"):
        experts_decode(**operands)


@pytest.mark.parametrize("everybody", [-1, 2])
def test_a_token_has_an_expert_of_its_own(everybody):
    with pytest.raises(ValueError, match="from 0 to 1 .* pass 0"):
        experts_decode(*cases.make(4, 2, 8, *SMALL), everybody=everybody)


def test_hopper_says_which_widths_it_takes():
    with pytest.raises(NotImplementedError, match="F = 64, only for multiples"):
        experts_decode(*cases.make(4, 2, 8, 256, 64), implementation="hopper")


def test_the_bits_of_a_word_are_found():
    word = jnp.int32(-(2**31) | 0b10010110)
    places = [int(plan.place(word, jnp.int32(rank))) for rank in range(int(plan.ones(word)))]
    assert places == [1, 2, 4, 7, 31]


def test_sorted_visits_are_those_of_the_docstring():
    """Three tokens that choose [5 1], [1 7], [5 none]."""
    found, keys, first_E = plan.make_sorted(jnp.array([[5, 1], [1, 7], [5, 8]]), 8, 8)
    assert found.tables[0][:4].tolist() == [3, 1, 5, 7]
    assert keys[:6].tolist() == [5, 1, 1, 7, 5, 8]
    assert first_E[jnp.array([1, 5, 7])].tolist() == [0, 1, 2]
