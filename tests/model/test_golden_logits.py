"""The whole forward pass against transformers' float64: logits, hidden states, routes and gates, MTP, decoding.

The goldens are exact to float32, so the tolerances are our own FP32 error, measured and multiplied by five: 3e-6 in
logits (of unit standard deviation), 1.6e-6 in gates. transformers' own float32 run is no closer to the goldens
(`versions.json`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference.cache import contiguous_tables, num_pages
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model import transformer
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.packed import Rows
from deepseek_jax.model.prefill import Sequences
from deepseek_jax.model.router import weigh
from deepseek_jax.parameters import Weights
from tests.golden import hf_checkpoint
from tests.support.meshes import mesh_of
from tests.support.network import apply

pytestmark = pytest.mark.xdist_group("golden_logits")  # one forward pass per case serves all tests of this file

LOGITS_ATOL = 1.5e-5
GATES_RTOL = 8e-6


@functools.cache
def forward(case):
    """Run `apply` once per case; return the golden, the output, and (experts, gates, counts) layer by layer."""
    golden = hf_checkpoint.read(case)

    def observe(model, scores_BSE, experts_BSK, valid_BS):
        return (
            experts_BSK,
            weigh(model, scores_BSE, experts_BSK),
            router_stats(golden.config.loss, model, scores_BSE, experts_BSK, valid_BS),
        )

    run = jax.jit(functools.partial(apply, golden.config, observe=observe))
    output = run(golden.params, golden.router_bias, hf_checkpoint.batch(golden.expected))
    experts, gates, stats = output.observed
    return golden, output, list(zip(np.asarray(experts), np.asarray(gates), np.asarray(stats.counts_E), strict=True))


def logits(golden, hidden_BSD):
    return np.asarray(hidden_BSD) @ golden.params["head_DV"]


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_logits(case):
    golden, output, _ = forward(case)
    np.testing.assert_allclose(output.hidden_BSD, golden.expected["hidden_BSD"], rtol=0, atol=LOGITS_ATOL)
    np.testing.assert_allclose(
        logits(golden, output.hidden_BSD), golden.expected["logits_BSV"], rtol=0, atol=LOGITS_ATOL
    )


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_routes_and_gates_of_every_layer(case):
    golden, output, routes = forward(case)
    expected = golden.expected
    assert len(routes) == len(expected["experts_LTK"])
    for layer, (experts_BSK, gates_BSK, reported_E) in enumerate(routes):
        experts_TK = experts_BSK.reshape(-1, experts_BSK.shape[-1])
        order = np.argsort(experts_TK, axis=-1)
        np.testing.assert_array_equal(
            np.take_along_axis(experts_TK, order, -1), expected["experts_LTK"][layer], err_msg=f"layer {layer}"
        )
        gates_TK = np.take_along_axis(gates_BSK.reshape(experts_TK.shape), order, -1)
        np.testing.assert_allclose(gates_TK, expected["weights_LTK"][layer], rtol=GATES_RTOL, err_msg=f"layer {layer}")
        counts_E = np.bincount(experts_TK.ravel(), minlength=golden.config.model.num_experts)
        np.testing.assert_array_equal(reported_E, counts_E)


def test_mtp_logits():
    """Both depths: [embedding; hidden] order, the chain of depths, and two norms.

    The first depth reads the state after the main model's final norm; each layer has a final norm of its own.
    """
    golden, output, _ = forward("base")
    length = golden.expected["tokens_BS"].shape[1]
    assert len(output.mtp_hidden) == 2
    for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1):
        defined = slice(0, length - depth)
        ours = logits(golden, hidden_BSD)[:, defined]
        np.testing.assert_allclose(
            ours,
            golden.expected["mtp_logits_KBSV"][depth - 1][:, defined],
            rtol=0,
            atol=LOGITS_ATOL,
            err_msg=f"depth {depth}",
        )


@pytest.mark.parametrize("case", ["yarn", "no_query_latent"])
def test_absorbed_decoding_gives_the_same_logits(case):
    """Packed prompts, then single tokens, over a latent cache that has room left, full of NaN.

    YaRN reaches past the original length.
    """
    golden, _, _ = forward(case)
    model, tokens_BS = golden.config.model, golden.expected["tokens_BS"]
    batch, length = tokens_BS.shape

    pages_each = num_pages(length + 7)
    pages = jnp.full((model.num_layers, batch * pages_each, 64, model.kv_latent + model.rotary_dim), jnp.nan)
    tables = contiguous_tables(batch, pages_each, devices=1)[:, ::-1].copy()
    execution = golden.config.execution
    mesh = mesh_of()
    decode = jax.jit(functools.partial(transformer.decode_step, model, execution))
    weights = decode_weights(model, execution, Weights(golden.params, golden.router_bias), mesh)
    weights = jax.device_get(weights)  # on no mesh
    prompt, num_tokens = length - 4, 1 << (batch * length).bit_length()
    tokens_T = np.zeros(num_tokens, np.int32)
    tokens_T[: batch * prompt] = tokens_BS[:, :prompt].reshape(-1)
    sequences = Sequences.of(
        jnp.asarray(tables), jnp.zeros(batch, jnp.int32), jnp.full(batch, prompt, jnp.int32), num_tokens
    )
    options = {"continues": False, "rows": Rows(0, 0)}
    prefill = jax.jit(functools.partial(transformer.prefill_step, model, execution, **options))
    hidden_TD, pages = prefill(weights, pages, tokens_T, sequences)
    hidden = [hidden_TD[: batch * prompt].reshape(batch, prompt, -1)]
    for start in range(prompt, length):
        positions_BS, valid_BS = np.full((batch, 1), start), np.ones((batch, 1), bool)
        step, pages = decode(weights, pages, tables, tokens_BS[:, start : start + 1], positions_BS, valid_BS)
        hidden.append(step)
    np.testing.assert_allclose(
        logits(golden, np.concatenate(hidden, axis=1)), golden.expected["logits_BSV"], rtol=0, atol=LOGITS_ATOL
    )
