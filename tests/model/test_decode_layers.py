"""Layers of a step that take the residual stream with its norm equal layers that norm for themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference import decode
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model import decode_layers, layer, transformer
from deepseek_jax.model.attention import Beside
from deepseek_jax.parameters import Weights
from pallas_kernels.quantized import Quantized
from tests.inference.test_decode import CONFIG, make_weights
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("decode_layers")  # what one worker made or compiled, its other tests use

TABLES_BJ = np.array([[3, 0], [1, 4], [2, 5]], np.int32)
POSITIONS_BS = np.array([[70, 71], [5, 6], [0, 1]], np.int32)
VALID_BS = np.array([[True, True], [True, False], [False, False]])


@pytest.fixture(scope="module")
def results():
    """The step in three forms: hidden states, pages, and the experts of each token; then the pages before."""
    execution = decode.decode_execution(CONFIG, mesh_of())
    placed = decode_weights(CONFIG.model, execution, make_weights(), mesh_of())
    weights = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), placed)  # on no mesh
    width = CONFIG.model.kv_latent + CONFIG.model.rotary_dim
    pages = jax.random.normal(jax.random.key(5), (CONFIG.model.num_layers, 6, 64, width), jnp.float32)
    tokens_BS = np.arange(6, dtype=np.int32).reshape(3, 2)
    run = functools.partial(transformer.routed_decode_step, CONFIG.model, execution)

    def step(joined, most_rows=128):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_layers, "MOST_ROWS", most_rows)
            patch.setattr(transformer, "has_kernels", lambda *_: joined)
            return jax.jit(lambda *operands: run(*operands))(
                weights, pages, TABLES_BJ, tokens_BS, POSITIONS_BS, VALID_BS
            )

    return step(False), step(True), step(True, most_rows=5), pages


def test_hidden_states_pages_and_routes_are_those_of_separate_norms(results):
    """With the products of few rows, and with XLA's, which more rows than these take have."""
    (hidden, pages, routes), *both, _ = results
    for joined_hidden, joined_pages, joined_routes in both:
        np.testing.assert_allclose(joined_hidden[VALID_BS], hidden[VALID_BS], rtol=0, atol=2e-5 * np.abs(hidden).max())
        np.testing.assert_allclose(joined_pages, pages, rtol=0, atol=2e-5 * np.abs(pages).max())
        assert (joined_routes[VALID_BS] == routes[VALID_BS]).all()


def test_rows_in_fp8_of_which_there_are_too_many_are_refused():
    """Their products would take no notice of the kind of scale."""
    rows, values = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((129, 128), (1, 128, 128)))
    with pytest.raises(ValueError, match="129 rows in FP8"):
        decode_layers._project(rows, Quantized(values, values, "block"), scale="pow2")


def test_only_the_entries_of_tokens_that_are_there_are_written(results):
    _, (_, pages, _), _, before = results
    changed = np.argwhere((np.asarray(pages) != np.asarray(before)).any(axis=(0, 3)))
    assert changed.tolist() == [[0, 6], [0, 7], [1, 5]]


def test_only_a_step_that_all_kernels_take_goes_through_them(monkeypatch):
    config = from_config_dict(v3_5b.get_config())
    monkeypatch.setattr(decode_layers.dispatch, "on_hopper", lambda: True)
    beside = Weights({"moe_layers": [{"attention": {"q_a_DA": Beside((1536,))}}]}, {})
    apart = Weights({"moe_layers": [{"attention": {"q_a_DA": jnp.zeros(())}}]}, {})
    pages = jax.ShapeDtypeStruct((12, 9, 64, 576), jnp.bfloat16)

    def takes(weights=beside, rows=16, pages=pages, model=config.model, **changes):
        execution = config.with_(execution={"exchange": "local"} | changes).execution
        return decode_layers.has_kernels(model, execution, weights, np.ones((rows, 1), bool), pages)

    assert takes() and takes(rows=512) and takes(rows=32, precision="fp8") and not takes(rows=40, precision="fp8")
    assert not takes(apart) and not takes(rows=520) and not takes(rows=12) and not takes(precision="fp32")
    assert not takes(exchange="dense") and not takes(pages=jax.ShapeDtypeStruct(pages.shape, jnp.float32))
    assert not takes(model=dataclasses.replace(config.model, query_latent=0))
    monkeypatch.setattr(decode_layers.dispatch, "on_hopper", lambda: False)
    assert not takes()


def test_few_tokens_of_a_prompt_take_the_experts_of_a_step_where_the_kernels_are(monkeypatch):
    config = from_config_dict(v3_5b.get_config())

    def experts(num_tokens, hopper=True, **changes):
        monkeypatch.setattr(layer.dispatch, "on_hopper", lambda: hopper)
        changes = {"exchange": "local", "experts": "grouped"} | changes
        return layer.cached_execution(config.with_(execution=changes).execution, np.ones((1, num_tokens), bool)).experts

    assert experts(1024) == experts(512, precision="fp8") == experts(4, hopper=False) == "few"
    assert experts(2048) == experts(1024, precision="fp8") == experts(512, precision="fp32") == "grouped"
    assert experts(512, hopper=False) == experts(512, exchange="dense") == "grouped"
    assert experts(512, experts="blocks") == "blocks"
