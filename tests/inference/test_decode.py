"""Decoding with the latent cache against the training form of the model, and what a user of `generate` relies on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from deepseek_jax.config import from_config_dict, resolve
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference import decode
from deepseek_jax.inference.cache import make_cache
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import partition_specs

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0)
NEVER = -1  # an EOS that no token is
PROMPT = np.array([[7, 3, 250, 12, 88]], np.int32)


def make_config(precision="fp32", **model):
    config = get_config()
    config.model.update(
        vocab_size=300, width=32, num_layers=3, num_heads=2, query_latent=16, kv_latent=24, content_dim=8
    )
    config.model.update(rotary_dim=4, value_dim=8, dense_hidden=48, num_experts=8, expert_hidden=16, num_mtp_layers=0)
    config.model.update(model)
    config.execution.update(precision=precision, scan_unroll=1)
    config.data.sequence_length = 64
    return resolve(from_config_dict(config), "cpu", 1)


CONFIG = make_config()


@functools.cache
def make_weights(config=CONFIG):
    """Weights in the shapes of `init` (compiling its random numbers takes longer than the tests), and biases of both
    signs.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.eval_shape(lambda: jax.random.key(0)))
    params, router_bias = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.array(1 + 0.1 * leaf if "norm" in path[-1].key else 0.3 * leaf), params
    )
    return params, jax.tree.map(lambda leaf: jnp.array(0.05 * leaf), router_bias)


@functools.partial(jax.jit, static_argnums=0)
def expanded_logits(config, params, router_bias, tokens_BS):
    """The training form: expanded attention over the whole sequence, no cache."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    batch = {
        "tokens_BS": tokens_BS,
        "targets_BS": tokens_BS,
        "positions_BS": positions_BS,
        "segment_ids_BS": jnp.ones_like(tokens_BS),
    }
    return transformer.apply(config, params, router_bias, batch).hidden_BSD @ params["head_DV"]


def ids(prompts=PROMPT, num_tokens=12, sampling=GREEDY, seed=0, eos=NEVER, weights=None):
    params, router_bias = weights or make_weights()
    return np.concatenate(
        list(decode.stream_ids(CONFIG, params, router_bias, prompts, num_tokens, sampling, seed, eos)), axis=1
    )


@pytest.mark.parametrize(
    "model",
    [{}, {"query_latent": 0, "gate": "softmax", "normalize_gates": False, "group_score": "max", "num_dense_layers": 0}],
    ids=["v3", "v2 without dense layers"],
)
def test_prefill_and_steps_equal_the_expanded_form(model):
    """Teacher forcing: at every position the cache gives the logits that a pass over the whole sequence gives."""
    config = make_config(**model)
    params, router_bias = make_weights(config)
    tokens_BS = np.random.default_rng(0).integers(0, 300, (2, 20)).astype(np.int32)
    want_BSV = np.asarray(expanded_logits(config, params, router_bias, tokens_BS))
    config = decode.decode_config(config)
    prompts_BS = np.where(np.arange(11) < np.array([[7], [11]]), tokens_BS[:, :11], 0)  # two lengths in one batch
    cache = make_cache(config, 2, decode.PREFILL_CHUNK)
    logits_BV, cache = decode.prefill(
        config, params, router_bias, cache, decode.in_chunks(prompts_BS), np.array([7, 11], np.int32)
    )
    step = jax.jit(decode.decode_token, static_argnums=0)
    for i in range(9):
        want_BV = want_BSV[[0, 1], [6 + i, 10 + i]]
        np.testing.assert_allclose(logits_BV, want_BV, atol=1e-5 * np.abs(want_BV).max())
        logits_BV, cache = step(config, params, router_bias, cache, tokens_BS[[0, 1], [7 + i, 11 + i]])
    assert cache["length"].tolist() == [16, 20]


def test_greedy_takes_the_argmax_of_the_expanded_form():
    new_ids = ids(num_tokens=20)
    whole = np.concatenate([PROMPT, new_ids], axis=1)
    logits_BSV = np.asarray(expanded_logits(CONFIG, *make_weights(), whole[:, :-1]))
    assert new_ids.shape == (1, 20)
    assert (logits_BSV[0, PROMPT.shape[1] - 1 :].argmax(-1) == new_ids[0]).all()
    assert len(set(new_ids[0].tolist())) > 3, "a constant continuation would test nothing"


def test_prompts_longer_than_a_chunk(monkeypatch):
    """21 tokens in one pass or in three: the same logits, and the same cache up to the prompt's end."""
    config, (params, router_bias) = decode.decode_config(CONFIG), make_weights()
    results = []
    for size in (decode.PREFILL_CHUNK, 8):
        monkeypatch.setattr(decode, "PREFILL_CHUNK", size)
        chunks = decode.in_chunks(np.random.default_rng(1).integers(0, 300, (1, 21)))
        assert chunks.shape == (-(-21 // size), 1, size)
        logits_BV, cache = decode.prefill(
            config, params, router_bias, make_cache(config, 1, 256), chunks, np.array([21], np.int32)
        )
        results.append(
            [logits_BV, cache["moe_layers"]["latent"][:, :, :21], cache["dense_layers"]["rotary"][:, :, :21]]
        )
    for one_pass, three_passes in zip(*results, strict=True):
        np.testing.assert_allclose(one_pass, three_passes, atol=1e-5 * np.abs(one_pass).max())


def test_slots_beyond_the_length_are_never_read():
    config, (params, router_bias) = decode.decode_config(CONFIG), make_weights()
    chunks = decode.in_chunks(PROMPT)
    logits = []
    for poison in (0.0, 1e3):
        cache = make_cache(config, 1, 256)
        cache = jax.tree.map(
            lambda leaf, poison=poison: leaf + leaf.dtype.type(poison) if leaf.ndim > 1 else leaf, cache
        )
        logits.append(decode.prefill(config, params, router_bias, cache, chunks, np.array([5], np.int32))[0])
    np.testing.assert_array_equal(*logits)


def test_a_row_does_not_depend_on_its_neighbours_or_on_bursts(monkeypatch):
    prompts = np.concatenate([PROMPT, PROMPT[:, ::-1]])
    together = ids(prompts=prompts, sampling=WARM)
    np.testing.assert_array_equal(together[:1], ids(sampling=WARM))
    monkeypatch.setattr(decode, "BURST", 5)
    np.testing.assert_array_equal(together[:1], ids(sampling=WARM))


def test_the_seed_decides():
    assert (
        ids(sampling=WARM, seed=1).tolist()
        == ids(sampling=WARM, seed=1).tolist()
        != ids(sampling=WARM, seed=2).tolist()
    )


def test_a_row_ends_at_eos_while_the_other_goes_on():
    prompts = np.concatenate([PROMPT, PROMPT[:, ::-1]])
    free = ids(prompts=prompts, num_tokens=40)
    eos = next(
        token for i, token in enumerate(free[0]) if i > 2 and token not in free[0, :i] and token not in free[1, : i + 8]
    )
    ended = ids(prompts=prompts, num_tokens=40, eos=eos)
    ends = [row.tolist().index(eos) if eos in row else 40 for row in free]
    assert ends[0] + 8 <= ends[1] and ended.shape[1] > ends[0] + 8
    for before, after, end in zip(free, ended, ends, strict=True):
        np.testing.assert_array_equal(after[:end], before[: ended.shape[1]][:end])
        assert (after[end:] == eos).all()


def test_nothing_is_computed_after_every_row_has_ended():
    first = ids(num_tokens=1)[0, 0]
    assert ids(num_tokens=40, eos=first).tolist() == [[first]]


def test_the_number_of_tokens_is_kept():
    for num_tokens in (1, 2, decode.BURST + 1, decode.BURST + 2):
        assert ids(num_tokens=num_tokens).shape == (1, num_tokens)


def test_streamed_text_is_that_of_the_ids():
    tokenizer, (params, router_bias) = byte_tokenizer(), make_weights()
    text = "".join(decode.stream(CONFIG, params, router_bias, tokenizer, "def ", 20, GREEDY, seed=0))
    prompt = np.array([[tokenizer.bos, *tokenizer.encode("def ")]], np.int32)
    known = params | {"head_DV": params["head_DV"][:, : tokenizer.vocab_size]}
    want = ids(prompts=prompt, num_tokens=20, eos=tokenizer.eos, weights=(known, router_bias))[0].tolist()
    want = want[: want.index(tokenizer.eos)] if tokenizer.eos in want else want
    assert text == tokenizer.decode_bytes(want).decode(errors="replace") and "def" not in text[:3]


def test_stream_holds_back_half_a_character(monkeypatch):
    tokenizer = byte_tokenizer()
    euro = [tokenizer.encode("€")[i] for i in range(3)]
    monkeypatch.setattr(
        decode, "stream_ids", lambda *_: iter([np.array([[euro[0]]]), np.array([euro[1:]]), np.array([euro[:1]])])
    )
    pieces = list(decode.stream(CONFIG, *make_weights(), tokenizer, "x", 5, GREEDY, seed=0))
    assert pieces == ["", "€", "", "�"]


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "message"),
    [
        ("", 5, "prompt is empty"),
        ("x" * 64, 5, "prompt of 65 tokens .* 64 positions .* shorten the prompt"),
        ("x" * 40, 30, "set max_new_tokens to 23 or less"),
        ("x", 0, "max_new_tokens = 0"),
    ],
)
def test_refuses_what_does_not_fit(prompt, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        list(decode.stream(CONFIG, *make_weights(), byte_tokenizer(), prompt, num_tokens, GREEDY, seed=0))


def test_yarn_extends_the_positions():
    yarn = dataclasses.replace(CONFIG.model.yarn, enabled=True, original_length=64, factor=4.0)
    longer = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, yarn=yarn))
    decode.check_lengths(longer, 200, 56)
    with pytest.raises(ValueError, match="256 positions"):
        decode.check_lengths(longer, 200, 57)


def test_weights_come_from_any_mesh():
    """Parameters split over eight devices, read under their mesh, give the text of unsplit ones."""
    unsplit = ids(num_tokens=4)
    with jax.set_mesh(make_mesh(dataclasses.replace(CONFIG.mesh, data=8))):
        split = ids(num_tokens=4, weights=split_weights())
    np.testing.assert_array_equal(split, unsplit)


def split_weights():
    params, router_bias = make_weights()
    specs = partition_specs(params)
    assert any(axis is not None for spec in jax.tree.leaves(specs) for axis in spec)
    return jax.tree.map(jax.device_put, params, specs), jax.device_put(router_bias, jax.P())


def test_mtp_layers_stay_behind():
    params, router_bias = make_weights()
    mtp_layers = {"mtp_layers": {"final_norm_D": jnp.ones((1, 32))}}
    kept_params, kept_bias = decode.decode_weights(CONFIG, params | mtp_layers, router_bias | mtp_layers)
    assert set(kept_params) == set(params) and set(kept_bias) == set(router_bias)


def test_bf16_weights_keep_gains_embedding_and_router_in_fp32():
    params, _ = decode.decode_weights(make_config(precision="bf16"), *make_weights())
    attention, moe = params["moe_layers"]["attention"], params["moe_layers"]["moe"]
    assert {leaf.dtype for leaf in (params["head_DV"], attention["q_b_ANQ"], moe["down_EFD"])} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {leaf.dtype for leaf in (params["embed_VD"], attention["kv_norm_C"], moe["router_DE"])} == {
        jnp.dtype(jnp.float32)
    }


def test_bf16_decodes_with_a_bf16_cache_and_fp32_logits():
    config = decode.decode_config(make_config(precision="bf16"))
    params, router_bias = decode.decode_weights(config, *make_weights())
    cache = make_cache(config, 1, 256)
    logits_BV, after = jax.eval_shape(
        functools.partial(decode.prefill, config), params, router_bias, cache, decode.in_chunks(PROMPT), np.array([5])
    )
    assert logits_BV.dtype == jnp.float32
    logits_BV, after = jax.eval_shape(
        functools.partial(decode.decode_token, config), params, router_bias, after, np.array([1])
    )
    assert logits_BV.dtype == jnp.float32 and after["moe_layers"]["latent"].dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
