"""Decoding with adapters beside their weights is decoding with weights to which they were added."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.adapters import adapters_of, has_adapters
from deepseek_jax.inference import decode
from deepseek_jax.inference.generate import expert_mesh
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model.absorbed import UpProjection
from deepseek_jax.parameters import ROWS, P
from tests.inference.test_decode import CONFIG, expanded_logits, ids, make_weights, prefilled
from tests.support.drawn_adapters import with_adapters
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("decode")


def adapted():
    return with_adapters(make_weights(), mesh_of(), 0.2)


def test_prefill_and_steps_with_adapters_equal_the_expanded_form_of_merged_weights():
    """Every target, in a dense and an MoE layer; measured: 1e-6 of the largest logit."""
    weights, merged = adapted()
    tokens_BS = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    want_BSV = np.asarray(expanded_logits(CONFIG, merged, tokens_BS))
    plain_BSV = np.asarray(expanded_logits(CONFIG, make_weights(), tokens_BS))
    assert np.abs(want_BSV - plain_BSV).max() > 0.1 * np.abs(want_BSV).max()
    prompts = [tokens_BS[0, :7], tokens_BS[1, :11]]
    execution, placed, logits_BV, cache = prefilled(CONFIG, weights, prompts, 128)
    step = jax.jit(functools.partial(decode.decode_token, CONFIG.model, execution))
    for i in range(4):
        want_BV = want_BSV[[0, 1], [6 + i, 10 + i]]
        np.testing.assert_allclose(logits_BV, want_BV, atol=4e-6 * np.abs(want_BV).max())
        with jax.set_mesh(mesh_of()):
            tokens_B = jax.device_put(tokens_BS[[0, 1], [7 + i, 11 + i]], P(ROWS))
            logits_BV, cache = step(placed, cache, tokens_B)


def test_a_base_is_not_merged_but_where_the_absorbed_form_takes_it_apart():
    weights, merged = adapted()
    with jax.set_mesh(mesh_of()):
        placed = decode_weights(CONFIG.model, decode.decode_execution(CONFIG, mesh_of()), weights, mesh_of())
    for name in ("dense_layers", "moe_layers"):
        (layer,), stack = placed.params[name], weights.params[name]
        kept = adapters_of(layer)
        assert kept["attention"].keys() == stack["attention"].keys() - {"norm_D", "q_norm_A", "kv_norm_C", "kv_b_CNX"}
        np.testing.assert_array_equal(layer["attention"]["o_NHD"].base, stack["attention"]["o_NHD"].base[0])
        up = UpProjection.of(CONFIG.model, merged.params[name]["attention"]["kv_b_CNX"][0])
        np.testing.assert_allclose(layer["attention"]["kv_b_CNX"].key_NPC, up.key_NPC, atol=2e-7)
    assert has_adapters(placed.params["moe_layers"][0]["moe"]["shared"])


@pytest.mark.slow
def test_adapters_of_experts_lie_with_the_experts_and_devices_change_no_token():
    weights, _ = adapted()
    prompts = np.random.default_rng(1).integers(0, 300, (4, 5)).astype(np.int32)
    one, eight = (ids(prompts, 6, weights=weights, mesh=mesh) for mesh in (None, expert_mesh(CONFIG.model, 8)))
    np.testing.assert_array_equal(one, eight)
