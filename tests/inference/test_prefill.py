"""Prefill of packed sequences: whole, in pieces, behind cached prefixes, alone, in a batch, and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from deepseek_jax.inference import decode, prefill
from deepseek_jax.inference.cache import make_cache
from deepseek_jax.inference.weights import decode_weights
from deepseek_jax.model import exchange, layer, transformer
from deepseek_jax.parameters import ROWS, P
from tests.inference.test_decode import make_config
from tests.support.cudnn import causal_attention
from tests.support.drawn import drawn_weights
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("prefill")  # what is compiled once, serves all tests

LENGTHS = [40, 1, 64, 130, 7]  # tokens of the sequences
RNG = np.random.default_rng(3)
TOKENS = [RNG.integers(0, 300, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(autouse=True)
def _one_size(monkeypatch):
    """Calls of one size, so that few programs are compiled."""
    monkeypatch.setattr(prefill, "FEWEST_TOKENS", 256)


CONFIG = make_config().with_(data={"sequence_length": 256})


def make_weights():
    return drawn_weights(CONFIG.model)


@functools.cache
def placed_weights(num_devices=1):
    mesh = mesh_of(data=num_devices // 2 or 1, expert=min(num_devices, 2))
    execution, weights = decode.decode_execution(CONFIG, mesh), make_weights()
    with jax.set_mesh(mesh):
        return decode_weights(CONFIG.model, execution, weights, mesh)


def empty_cache(num_rows, num_devices=1):
    """Pages for 192 tokens of each row; what lies in them is NaN."""
    mesh = mesh_of(data=num_devices // 2 or 1, expert=min(num_devices, 2))
    with jax.set_mesh(mesh):
        cache = make_cache(CONFIG.model, decode.decode_execution(CONFIG, mesh), num_rows, 192)
        return cache._replace(pages=cache.pages + np.float32(np.nan))


def run(cache, new_tokens, num_devices=1, **changes):
    mesh = mesh_of(data=num_devices // 2 or 1, expert=min(num_devices, 2))
    execution, weights = prefill.prefill_execution(CONFIG, mesh), placed_weights(num_devices)
    execution = dataclasses.replace(execution, **changes)
    with jax.set_mesh(mesh):
        return prefill.run_prefill(CONFIG.model, execution, mesh, weights, cache, new_tokens)


@functools.cache
def teacher_forced():
    """Logits [S, V] of every sequence, by the training form over the whole of it."""

    @jax.jit
    def logits(tokens_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        inputs = transformer.Inputs(tokens_BS, positions_BS, jnp.ones_like(tokens_BS, dtype=bool))
        hidden_BSD = transformer.apply(CONFIG.model, CONFIG.execution, make_weights(), inputs).hidden_BSD
        return hidden_BSD @ make_weights().params["head_DV"]

    padded = np.zeros((len(TOKENS), max(LENGTHS)), np.int32)
    for row, tokens in zip(padded, TOKENS, strict=True):
        row[: len(tokens)] = tokens
    return np.asarray(logits(padded))


def check_last(logits_BV, num_tokens, relative=1e-5):
    """The logits after so many tokens of each sequence are those of teacher forcing."""
    for got_V, want_SV, num in zip(np.asarray(logits_BV), teacher_forced(), num_tokens, strict=False):
        if num:
            np.testing.assert_allclose(got_V, want_SV[num - 1], atol=relative * np.abs(want_SV[num - 1]).max())


def entries(cache, row, num_tokens):
    pages = np.asarray(cache.pages)[:, np.asarray(cache.tables_BJ)[row]]
    return pages.reshape(len(pages), -1, pages.shape[-1])[:, :num_tokens]


@functools.cache
def whole():
    """All sequences in one call."""
    return run(empty_cache(5), TOKENS)


def test_whole_prompts_of_mixed_lengths():
    logits_BV, cache = whole()
    check_last(logits_BV, LENGTHS)
    assert cache.length_B.tolist() == LENGTHS
    written = np.isfinite(np.asarray(cache.pages)).all(-1).sum((1, 2))
    assert written.tolist() == [sum(LENGTHS)] * CONFIG.model.num_layers, "only tokens of a sequence are written"
    # A batch is each prompt alone, by norm within 2e-6: its place in a block of an expert changes the order of sums.
    for row in range(5):
        alone_BV, _ = run(empty_cache(5), [tokens if i == row else [] for i, tokens in enumerate(TOKENS)])
        assert np.linalg.norm(alone_BV[row] - logits_BV[row]) <= 2e-6 * np.linalg.norm(logits_BV[row])


@pytest.mark.parametrize(
    ("attention", "most_tokens"),
    [("xla", 16), *(pytest.param(name, most, marks=pytest.mark.slow) for name, most in (("xla", 256), ("cudnn", 256)))],
)
def test_prefixes_of_every_size_in_one_batch(attention, most_tokens, monkeypatch):
    """None, one token, a page, many pages in the cache; then the rest, also in chunks of 16.

    cuDNN has a stand-in of its signature.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", causal_attention)
    prefix = [0, 1, 64, 129, 6]
    first = [tokens[:n] for tokens, n in zip(TOKENS, prefix, strict=True)]
    _, cache = run(empty_cache(5), first, attention=attention)
    rest = [tokens[n:] for tokens, n in zip(TOKENS, prefix, strict=True)]
    monkeypatch.setattr(prefill, "MOST_TOKENS_ON_CPU", most_tokens)
    monkeypatch.setattr(prefill, "FEWEST_TOKENS", most_tokens)
    logits_BV, cache = run(cache, rest, attention=attention)
    have = [length if n < length else 0 for n, length in zip(prefix, LENGTHS, strict=True)]
    check_last(logits_BV, have)
    assert not np.asarray(logits_BV)[[1, 2]].any(), "a row without new tokens has no logits"
    for row, length in enumerate(LENGTHS):
        want = entries(whole()[1], row, length)
        np.testing.assert_allclose(entries(cache, row, length), want, atol=1e-5 * np.abs(want).max())


def test_few_tokens_take_the_experts_of_decoding_on_hopper(monkeypatch):
    """The kernels' reference stands in for the kernels; nothing goes through the exchange."""
    with monkeypatch.context() as patch:
        patch.setattr(layer.dispatch, "on_hopper", lambda: True)
        patch.setattr(exchange, "_exchange", None)
        patch.setitem(layer.FEW_OF_PROMPTS, "fp32", 256)
        logits_BV, _ = run(empty_cache(5), TOKENS, experts="grouped")
    check_last(logits_BV, LENGTHS)


def test_two_sequences_share_the_pages_of_a_prefix():
    """Their tables begin with the same two pages, in which neither writes."""
    prefix = RNG.integers(0, 300, 128).astype(np.int32)
    ends = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    _, cache = run(empty_cache(5), [prefix, [], [], [], []])
    tables_BJ = np.array(cache.tables_BJ)
    tables_BJ[1, :2] = tables_BJ[0, :2]
    shared = np.asarray(cache.pages)[:, tables_BJ[0, :2]]
    length_B = np.array([128, 128, 0, 0, 0], np.int32)
    with jax.set_mesh(mesh_of()):
        cache = cache._replace(tables_BJ=jax.device_put(tables_BJ, P(ROWS)), length_B=jax.device_put(length_B, P(ROWS)))
    logits_BV, cache = run(cache, [*ends, [], [], []])
    want_BV, _ = run(empty_cache(5), [*(np.concatenate([prefix, end]) for end in ends), [], [], []])
    np.testing.assert_allclose(logits_BV[:2], want_BV[:2], atol=1e-5 * np.abs(want_BV).max())
    np.testing.assert_array_equal(np.asarray(cache.pages)[:, tables_BJ[0, :2]], shared)


@pytest.mark.parametrize("num_devices", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_one_device_is_many(num_devices):
    """Sequences over all devices, some of which have none, experts over two; in one call and continued."""
    prefix = [20, 0, 64, 100, 2]
    rows = [*TOKENS, [], [], []]
    first = [tokens[:n] for tokens, n in zip(rows, [*prefix, 0, 0, 0], strict=True)]
    rest = [tokens[n:] for tokens, n in zip(rows, [*prefix, 0, 0, 0], strict=True)]
    _, cache = run(empty_cache(8, num_devices), first, num_devices)
    logits_BV, cache = run(cache, rest, num_devices)
    have = [0 if length == n else length for n, length in zip(prefix, LENGTHS, strict=True)]
    check_last(logits_BV, have)
    assert cache.length_B.tolist() == [*LENGTHS, 0, 0, 0]


def test_calls_pack_whole_sequences_and_cut_only_long_ones(monkeypatch):
    """The example of the module's docstring."""
    monkeypatch.setattr(prefill, "FEWEST_TOKENS", 8)
    rows = [np.arange(n) + 100 * i for i, n in enumerate((7, 40, 5, 3))]
    found = prefill.calls(rows, np.zeros(4, int), 1, 16)
    assert [call.new_B.tolist() for call in found] == [[0, 16, 0, 0], [0, 16, 0, 0], [7, 8, 0, 0], [0, 0, 5, 3]]
    assert [len(call.tokens_T) for call in found] == [16, 16, 16, 8]
    assert [call.rows for call in found] == [(1, 16), (1, 16), (2, 8), (2, 8)]
    assert [call.continues for call in found] == [False, True, True, False]
    assert found[2].tokens_T.tolist() == [*range(7), *range(132, 140), 0]
    assert prefill.calls(rows, np.array([0, 0, 0, 1]), 1, 16)[3].continues
    split = prefill.calls(rows, np.zeros(4, int), 2, 64)  # two rows to a device
    assert [call.new_B.tolist() for call in split] == [[7, 40, 5, 3]]
    assert split[0].tokens_T.reshape(2, 64)[1, :8].tolist() == [*range(200, 205), *range(300, 303)]


def test_rows_of_the_core_are_padded_to_twice_the_tokens_at_most(monkeypatch):
    """One long sequence and many short ones do not share a call."""
    monkeypatch.setattr(prefill, "FEWEST_TOKENS", 128)
    found = prefill.calls([np.arange(n) for n in (4000, *[100] * 31)], np.zeros(32, int), 1, 4096)
    assert [call.rows for call in found] == [(1, 4096), (32, 128)]
    assert sum(call.new_B.sum() for call in found) == 4000 + 3100
    assert prefill.calls([np.arange(n) for n in (900, 600, 300)], np.zeros(3, int), 1, 4096)[0].rows == (4, 1024)


def test_prefill_ignores_that_training_masks_documents():
    """Segments keep documents apart in training; packed sequences are always kept apart."""
    masked = CONFIG.with_(data={"mask_documents": True})
    assert prefill.prefill_execution(masked, mesh_of()) == prefill.prefill_execution(CONFIG, mesh_of())
