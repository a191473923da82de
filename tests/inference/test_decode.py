"""Decoding with the latent cache against the training form of the model, and what a user of `generate` relies on."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.inference import decode, generate, memory, prefill
from deepseek_jax.inference.cache import make_cache
from deepseek_jax.inference.completions import complete
from deepseek_jax.inference.requests import Request, make_rows, row_keys
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.weights import APART, decode_weights, dequantized, takes_fp8
from deepseek_jax.model import transformer
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import (
    PARAMETERS,
    ROWS,
    Fp8Weight,
    P,
    TurnedFp8Weight,
    Weights,
    leaf_name,
    matrix_shape,
    num_lead_dims,
    partition_specs,
)
from pallas_kernels.quantize import quantize_blocks
from tests.support.drawn import drawn_weights
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.xdist_group("decode")  # what one worker made or compiled, its other tests use

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
WARM = Sampling(temperature=1.0, top_k=0, top_p=1.0)
NEVER = -1  # an EOS that no token is
PROMPT = np.array([[7, 3, 250, 12, 88]], np.int32)


def make_config(precision="fp32", **model):
    config = get_config()
    config.model.update(
        vocab_size=300, width=32, num_layers=2, num_heads=2, query_latent=16, kv_latent=24, content_dim=8
    )
    config.model.update(rotary_dim=4, value_dim=8, dense_hidden=48, num_experts=8, expert_hidden=16, num_mtp_layers=0)
    config.model.update(model)
    config.execution.update(precision=precision, scan_unroll=1)
    config.data.sequence_length = 64
    return resolve(from_config_dict(config), "cpu", 1)


CONFIG = make_config()


def make_weights(config=CONFIG):
    return drawn_weights(config.model)


@functools.partial(jax.jit, static_argnums=0)
def expanded_logits(config, weights, tokens_BS):
    """The training form: expanded attention over the whole sequence, no cache."""
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    inputs = transformer.Inputs(tokens_BS, positions_BS, jnp.ones_like(tokens_BS, dtype=bool))
    hidden_BSD = transformer.apply(config.model, config.execution, weights, inputs).hidden_BSD
    return hidden_BSD @ weights.params["head_DV"]


def ids(prompts=PROMPT, num_tokens=12, sampling=GREEDY, seed=0, eos=NEVER, weights=None, mesh=None, config=CONFIG):
    weights = weights or make_weights()
    new = generate.stream_ids(config, weights, prompts, num_tokens, sampling, seed, eos, mesh)
    return np.concatenate(list(new), axis=1)


def prefilled(config, weights, prompts, num_slots=256, cache=None):
    """Execution and weights of decoding, and logits and cache after a prefill on one device."""
    mesh = mesh_of()
    execution = decode.decode_execution(config, mesh)
    with jax.set_mesh(mesh):
        weights = decode_weights(config.model, execution, weights, mesh)
        cache = cache or make_cache(config.model, execution, len(prompts), num_slots)
        run = prefill.prefill_execution(config, mesh)
        return execution, weights, *prefill.run_prefill(config.model, run, mesh, weights, cache, prompts)


@pytest.mark.parametrize(
    "model",
    [{}, {"query_latent": 0, "gate": "softmax", "normalize_gates": False, "group_score": "max", "num_dense_layers": 0}],
    ids=["v3", "v2 without dense layers"],
)
def test_prefill_and_steps_equal_the_expanded_form(model):
    """Teacher forcing: at every position the cache gives the logits that a pass over the whole sequence gives.

    Three lengths in one batch, two of which cross the end of a page, at 64 and at 128; what no token wrote is NaN.
    A fourth row has no sequence, and stays without one.
    """
    config = make_config(**model)
    weights = make_weights(config)
    tokens_BS = np.random.default_rng(0).integers(0, 300, (4, 130)).astype(np.int32)
    want_BSV = np.asarray(expanded_logits(config, weights, tokens_BS))
    start_B, rows = np.array([7, 60, 121, 0]), np.arange(4)
    with jax.set_mesh(mesh_of()):
        cache = make_cache(config.model, decode.decode_execution(config, mesh_of()), 4, 192)
        cache = cache._replace(pages=cache.pages + np.float32(np.nan))
    prompts = [tokens_S[:start] for tokens_S, start in zip(tokens_BS, start_B, strict=True)]
    execution, weights, logits_BV, cache = prefilled(config, weights, prompts, cache=cache)
    step = jax.jit(functools.partial(decode.decode_token, config.model, execution))
    for i in range(9):
        want_BV = want_BSV[rows, start_B + i - 1]
        np.testing.assert_allclose(logits_BV[:3], want_BV[:3], atol=1e-5 * np.abs(want_BV).max())
        with jax.set_mesh(mesh_of()):
            tokens_B = jax.device_put(tokens_BS[rows, start_B + i], P(ROWS))
            logits_BV, cache = step(weights, cache, tokens_B)
    assert cache.length_B.tolist() == [16, 69, 130, 0] and np.isfinite(logits_BV).all()
    written = np.isfinite(np.asarray(cache.pages)).all(-1).sum((1, 2))
    assert written.tolist() == [16 + 69 + 130] * config.model.num_layers, "only tokens of a sequence are written"


def test_pages_that_are_not_written_are_never_read():
    logits = []
    for poison in (0.0, np.nan):
        execution = decode.decode_execution(CONFIG, mesh_of())
        with jax.set_mesh(mesh_of()):
            cache = make_cache(CONFIG.model, execution, 1, 256)
            cache = cache._replace(pages=cache.pages + np.float32(poison))
        logits.append(prefilled(CONFIG, make_weights(), PROMPT, cache=cache)[2])
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("together", [1, 4])
def test_sequences_that_have_ended_write_nothing(together, monkeypatch):
    """Of three, one has ended and one has no tokens: a burst leaves their pages and lengths as they are.

    So does the last of four steps in one loop, of which three are wanted.
    """
    monkeypatch.setattr(decode, "steps_together", lambda burst: together)
    execution, weights, _, cache = prefilled(CONFIG, make_weights(), [PROMPT[0], PROMPT[0], []], num_slots=64)
    before, ended_B = np.asarray(cache.pages), np.array([False, True, True])
    run = jax.jit(functools.partial(decode.decode_burst, CONFIG.model, execution, GREEDY, 4))
    with jax.set_mesh(mesh_of()):
        rows = np.array([1, 2, 3], np.int32), ended_B, make_rows([], 0, 3)
        tokens_B, finished_B, rows = jax.device_put(rows, P(ROWS))
        (new_BK, _), state = run(weights, decode.Generation(cache, tokens_B, finished_B), rows, NEVER, 3)
    after = np.asarray(state.cache.pages)
    changed = (after != before).any(axis=(0, 3))
    assert changed[0].nonzero()[0].tolist() == [5, 6, 7] and not changed[1:].any()
    assert state.cache.length_B.tolist() == [8, 5, 0] and (new_BK[1:] == NEVER).all()
    assert new_BK[0, 3] == NEVER and state.tokens_B[0] == new_BK[0, 2] != new_BK[0, 0]
    whole = np.concatenate([PROMPT, [[1]], np.asarray(new_BK)[:1, :3]], axis=1)
    logits_BSV = np.asarray(expanded_logits(CONFIG, make_weights(), whole[:, :-1]))
    assert (logits_BSV[0, -3:].argmax(-1) == new_BK[0, :3]).all()
    with jax.set_mesh(mesh_of()):
        again = decode.Generation(cache, tokens_B, finished_B)
        (ended_BK, _), state = run(weights, again, rows, new_BK[0, 1], 4)
    assert ended_BK[0].tolist() == [new_BK[0, 0], *[new_BK[0, 1]] * 3], "a sequence that ends within a loop"
    assert state.cache.length_B.tolist() == [7, 5, 0] and state.finished_B.all()


def test_no_step_copies_the_cache_or_a_weight():
    """In the compiled program of a step no operation but the writes in place makes an array of the cache's size."""
    execution = decode.decode_execution(CONFIG, mesh_of())
    with jax.set_mesh(mesh_of()):
        weights = decode_weights(CONFIG.model, execution, make_weights(), mesh_of())
        cache = make_cache(CONFIG.model, execution, 3, 64 * 1024)
        tables_BJ = jax.device_put(np.asarray(cache.tables_BJ)[:, :2], P(ROWS))  # the reference gathers what they name
        step = jax.jit(functools.partial(decode.decode_token, CONFIG.model, execution), donate_argnums=1)
        tokens_B = jax.device_put(np.ones(3, np.int32), P(ROWS))
        text = step.lower(weights, cache._replace(tables_BJ=tables_BJ), tokens_B).compile().as_text()
    made = re.findall(r"= \(?(\w+\[[\d,]+\])\S* (?:copy|dynamic-slice|transpose)\(", text)
    sizes = [math.prod(map(int, shape.split("[")[1][:-1].split(","))) for shape in made]
    assert sizes and max(sizes) < weights.params["moe_layers"][0]["moe"]["down_EFD"].size < cache.pages.size


def test_a_row_does_not_depend_on_its_neighbours_or_on_bursts(monkeypatch):
    prompts = np.concatenate([PROMPT, PROMPT[:, ::-1]])
    together = ids(prompts=prompts, sampling=WARM)
    np.testing.assert_array_equal(together[:1], ids(sampling=WARM))
    monkeypatch.setattr(generate, "BURST", 5)
    np.testing.assert_array_equal(together[:1], ids(sampling=WARM))


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


MIXED = ["def ", "x", "if a == b:\n    return", "import o"]


def completed(prompts, sampling=GREEDY, **options):
    return complete(CONFIG, make_weights(), byte_tokenizer(), prompts, 18, sampling, 3, **options)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "drawn"])
def test_a_batch_of_mixed_lengths_is_each_prompt_alone(sampling):
    """Bit for bit here: each row is masked to its own length, and draws by its own number."""
    together = completed(MIXED, sampling)
    assert together == [completed([prompt], sampling, first_row=i)[0] for i, prompt in enumerate(MIXED)]
    assert together[2:] == completed(MIXED[2:], sampling, first_row=2, batch_size=4)
    assert len({found.text for found in together}) == 4 and all(found.num_tokens for found in together)


def test_penalties_follow_each_sequence_over_bursts(monkeypatch):
    """With a presence penalty beyond all logits no token comes twice."""
    monkeypatch.setattr(generate, "BURST", 4)
    prompts, alone = [[1, 2, 3, 4, 5], [6, 7]], []
    once = dataclasses.replace(GREEDY, presence_penalty=1e4, repetition_penalty=1e6)
    new_BK = ids(prompts, num_tokens=30, sampling=once)
    for row, prompt in zip(new_BK, prompts, strict=True):
        assert len(set(row.tolist())) == 30
        alone.append(ids([prompt], num_tokens=30, sampling=once)[0])
    np.testing.assert_array_equal(new_BK, alone)
    assert len(set(ids(prompts, num_tokens=30)[0].tolist())) < 30, "the plain text repeats nothing: nothing is tested"


def test_a_stop_string_ends_one_sequence_and_no_other():
    plain = completed(MIXED)
    stop = plain[0].text[5:7]
    cut = completed(MIXED, stop=[stop])
    assert cut[0][:3] == (plain[0].text[: plain[0].text.index(stop)], "stop", cut[0].num_tokens)
    assert [found.text for found in cut] == [found.text.split(stop)[0] for found in plain]
    assert (
        "".join(generate.stream(CONFIG, make_weights(), byte_tokenizer(), MIXED[0], 18, GREEDY, 3, stop=[stop]))
        == cut[0].text
    )


def test_sequences_that_the_caller_stops_end_at_the_next_burst(monkeypatch):
    """They repeat EOS; when all are stopped, the device makes no burst more."""
    monkeypatch.setattr(generate, "BURST", 4)
    stopped_B, prompts, parts = np.array([False, False]), [[1, 2, 3], [4, 5]], []
    eos = min(set(range(300)) - set(ids(prompts, num_tokens=9).flat))
    for ids_BK in generate.stream_ids(CONFIG, make_weights(), prompts, 40, GREEDY, 0, eos, stopped_B=stopped_B):
        parts.append(ids_BK)
        stopped_B[:] = [len(parts) >= 2, len(parts) >= 3]
    assert [part.shape for part in parts] == [(2, 1), (2, 4), (2, 4)]
    assert (parts[2][0] == eos).all() and (parts[2][1] != eos).all()


def test_the_number_of_tokens_is_kept():
    for num_tokens in (1, 2, generate.BURST + 1, generate.BURST + 2):
        assert ids(num_tokens=num_tokens).shape == (1, num_tokens)


def test_streamed_text_is_that_of_the_ids():
    tokenizer, weights = byte_tokenizer(), make_weights()
    text = "".join(generate.stream(CONFIG, weights, tokenizer, "def ", 20, GREEDY, seed=0))
    prompt = np.array([[tokenizer.bos, *tokenizer.encode("def ")]], np.int32)
    known = weights.params | {"head_DV": weights.params["head_DV"][:, : tokenizer.vocab_size]}
    known = weights._replace(params=known)
    want = ids(prompts=prompt, num_tokens=20, eos=tokenizer.eos, weights=known)[0].tolist()
    want = want[: want.index(tokenizer.eos)] if tokenizer.eos in want else want
    assert text == tokenizer.decode_bytes(want).decode(errors="replace") and "def" not in text[:3]


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
        list(generate.stream(CONFIG, make_weights(), byte_tokenizer(), prompt, num_tokens, GREEDY, seed=0))


def test_yarn_extends_the_positions():
    yarn = dataclasses.replace(CONFIG.model.yarn, enabled=True, original_length=64, factor=4.0)
    longer = CONFIG.with_(model={"yarn": yarn})
    generate.check_lengths(longer, 200, 56)
    with pytest.raises(ValueError, match="256 positions"):
        generate.check_lengths(longer, 200, 57)


def split_weights():
    """The weights as a training state has them on the mesh that is set."""
    params, router_bias = make_weights()
    specs = partition_specs(params)
    assert any(axis is not None for spec in jax.tree.leaves(specs) for axis in spec)
    return Weights(jax.tree.map(jax.device_put, params, specs), jax.device_put(router_bias, jax.P()))


def test_weights_come_from_any_mesh():
    """Parameters split over eight devices, read under their mesh, give the text of unsplit ones."""
    unsplit = ids(num_tokens=4)
    with jax.set_mesh(mesh_of(data=8)):
        split = ids(num_tokens=4, weights=split_weights())
    np.testing.assert_array_equal(split, unsplit)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "num_prompts"), [((1, 1, 4), 1), ((2, 2, 2), 3)])
def test_every_mesh_decodes_the_same_text(sizes, num_prompts):
    """Sequences over all devices, some of which have none, experts over `node` and `expert`."""
    prompts = np.random.default_rng(4).integers(0, 300, (num_prompts, 9))
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        weights = split_weights()
    for sampling in (GREEDY, dataclasses.replace(WARM, frequency_penalty=0.5)):
        want = ids(prompts=prompts, num_tokens=20, sampling=sampling)
        np.testing.assert_array_equal(
            ids(prompts=prompts, num_tokens=20, sampling=sampling, weights=weights, mesh=mesh), want
        )


def test_a_row_without_a_sequence_ends_no_other(monkeypatch):
    """On four devices one prompt is one row of four; all leave the loop together, when it has ended."""
    mesh = mesh_of(expert=4)
    first = ids(num_tokens=1, mesh=mesh)[0, 0]
    assert ids(num_tokens=40, eos=first, mesh=mesh).tolist() == [[first]]
    assert ids(num_tokens=20, mesh=mesh).shape == (1, 20)


FP8_MODEL = {
    "width": 128,
    "query_latent": 128,
    "kv_latent": 128,
    "num_heads": 4,
    "value_dim": 32,
    "dense_hidden": 128,
    "expert_hidden": 128,
}


def stored_in_fp8(config):
    """The weights as a checkpoint stores them: values and scales, no carrier."""
    weights = make_weights(config)

    def quantize(path, w):
        name = leaf_name(path)
        if PARAMETERS[name].precision != "fp8":
            return w
        matrix = matrix_shape(w.shape, num_lead_dims(name, w.ndim), PARAMETERS[name].row_dims)
        q = quantize_blocks(w.reshape(-1, *matrix[-2:]))
        return Fp8Weight(None, q.values.reshape(w.shape), q.scales.reshape(*matrix[:-2], *q.scales.shape[-2:]))

    return Weights(jax.tree.map_with_path(quantize, weights.params), weights.router_bias)


@pytest.mark.parametrize("experts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_in_fp8_are_decoded_as_stored(experts):
    """They stay FP8, but for the one that absorbed attention takes apart; queries and latents share one."""
    config = make_config("fp8", **FP8_MODEL)
    weights = stored_in_fp8(config)
    mesh = mesh_of(expert=experts)
    placed = decode_weights(config.model, decode.decode_execution(config, mesh), weights, mesh)
    kept = jax.tree.leaves(placed.params, is_leaf=lambda leaf: isinstance(leaf, TurnedFp8Weight))
    shared = 2 if experts > 1 else 0  # on one device it lies behind the routed experts
    assert sum(isinstance(leaf, TurnedFp8Weight) for leaf in kept) == (3 + 2) + (3 + 2 + shared)
    tokens_BS = np.random.default_rng(2).integers(0, 300, (1, 128)).astype(np.int32)
    assert ids(prompts=tokens_BS[:, :9], num_tokens=5, weights=weights, mesh=mesh, config=config).shape == (1, 5)


def _without_fp8(name, weights):
    """Return weights of which those of this name are in BF16, as absorbed attention has them."""
    return jax.tree.map_with_path(
        lambda path, leaf: dequantized(name, leaf).astype(jnp.bfloat16) if leaf_name(path) == name else leaf,
        weights,
        is_leaf=lambda leaf: isinstance(leaf, Fp8Weight),
    )


@pytest.mark.parametrize(("num_layers", "tolerance"), [(1, 0.08), pytest.param(2, 0.2, marks=pytest.mark.slow)])
def test_fp8_over_a_cache_is_near_the_expanded_form(num_layers, tolerance):
    """The same bytes in both forms give logits that are near.

    The forms round to BF16 in different places, and E4M3 enlarges the difference in weights of this size. By token, in
    the median, it is 0.05 after a dense layer and 0.14 after one with experts; in BF16 0.01 and 0.02.
    """
    config = make_config("fp8", **FP8_MODEL, num_layers=num_layers)
    execution = decode.decode_execution(config, mesh_of())
    weights = decode_weights(config.model, execution, stored_in_fp8(config), mesh_of())
    tokens_BS = np.random.default_rng(2).integers(0, 300, (1, 128)).astype(np.int32)
    positions_BS, valid_BS = np.arange(128, dtype=np.int32)[None], np.ones((1, 128), bool)
    cache = make_cache(config.model, execution, 1, 128)

    @jax.jit
    def step(cache, token, position):
        there = jnp.ones((1, 1), bool)
        hidden_BSD, pages = transformer.decode_step(
            config.model, execution, weights, cache.pages, cache.tables_BJ, token, position, there
        )
        return hidden_BSD, cache._replace(pages=pages)

    got = []
    for i in range(128):
        hidden, cache = step(cache, tokens_BS[:, i : i + 1], positions_BS[:, i : i + 1])
        got.append(hidden)
    run = jax.jit(functools.partial(transformer.apply, config.model, config.execution))
    want = np.float32(
        run(
            _without_fp8(APART, stored_in_fp8(config)), transformer.Inputs(tokens_BS, positions_BS, valid_BS)
        ).hidden_BSD
    )
    got = np.float32(np.concatenate(got, axis=1))
    error_BS = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert np.median(error_BS) < tolerance, error_BS


def test_fp8_weights_of_an_fp32_model_are_refused():
    config = make_config("fp8", **FP8_MODEL)
    with pytest.raises(ValueError, match="is in FP8 and execution.precision = 'fp32': load the weights as 'fp32'"):
        ids(num_tokens=1, weights=stored_in_fp8(config), config=config.with_(execution={"precision": "fp32"}))


def test_mtp_layers_stay_behind():
    weights = make_weights()
    mtp_layers = {"mtp_layers": {"final_norm_D": jnp.ones((1, 32))}}
    kept = decode_weights(CONFIG.model, CONFIG.execution, Weights(*(part | mtp_layers for part in weights)), mesh_of())
    assert set(kept.params) == set(weights.params) and set(kept.router_bias) == set(weights.router_bias)


def test_bf16_weights_keep_gains_embedding_and_router_in_fp32():
    """The router as three BF16 parts, whose sum it is (`model.router`)."""
    config = make_config(precision="bf16")
    params, _ = decode_weights(config.model, config.execution, make_weights(), mesh_of())
    attention, moe = params["moe_layers"][0]["attention"], params["moe_layers"][0]["moe"]
    assert "shared" not in moe and len(moe["down_EFD"]) > config.model.num_experts  # it lies behind the routed ones
    in_bf16 = params["head_DV"], attention["q_b_ANQ"], attention["kv_b_CNX"].key_NPC, moe["down_EFD"]
    in_fp32 = params["embed_VD"], attention["kv_norm_C"]
    parts = np.split(np.float64(moe["router_DE"]), 3, axis=0)
    np.testing.assert_array_equal(sum(parts), make_weights().params["moe_layers"]["moe"]["router_DE"][0])
    assert {leaf.dtype for leaf in in_bf16} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in in_fp32} == {jnp.dtype(jnp.float32)}
    moe = decode_weights(CONFIG.model, CONFIG.execution, make_weights(), mesh_of()).params["moe_layers"][0]["moe"]
    assert "shared" in moe and len(moe["down_EFD"]) == CONFIG.model.num_experts, "FP32: in products of its own"


def test_bf16_decodes_with_a_bf16_cache_and_fp32_logits():
    config = make_config(precision="bf16")
    *_, logits_BV, cache = prefilled(config, make_weights(), PROMPT)
    assert logits_BV.dtype == jnp.float32
    assert {leaf.dtype for leaf in [cache.pages]} == {jnp.dtype(jnp.bfloat16)}


def test_which_models_decode_fp8_as_stored():
    fp8 = make_config("fp8", **FP8_MODEL)
    assert takes_fp8(fp8.model, fp8.execution)
    assert takes_fp8(fp8.with_(model={"kv_latent": 64}).model, fp8.execution)  # its projection is read in BF16
    assert not takes_fp8(fp8.model, fp8.with_(execution={"precision": "fp32"}).execution)
    assert not takes_fp8(fp8.with_(model={"expert_hidden": 96}).model, fp8.execution)


def test_a_request_draws_by_its_own_seed_wherever_it_stands():
    """Like the first prompt of a batch with that seed, in any row and among any neighbours."""
    prompts, own = [MIXED[1], MIXED[0], MIXED[0], MIXED[2]], [Request(), Request(seed=9), Request(), Request(seed=9)]
    found, plain = completed(prompts, WARM, requests=own), completed(prompts, WARM)
    alone = complete(CONFIG, make_weights(), byte_tokenizer(), [MIXED[0]], 18, WARM, 9)
    assert found[1] == alone[0] and found[1] != found[2]
    assert (found[0], found[2]) == (plain[0], plain[2])


def test_requests_of_a_batch_ask_for_different_things():
    """Log-probabilities are those of the expanded form, over bursts; a bias is of one row; a plain row is unchanged."""
    tokenizer, params = byte_tokenizer(), make_weights().params
    letter = tokenizer.encode("A")[0]
    asked = [Request(num_logprobs=2), Request(logit_bias={letter: 1000.0, 0: -5.0}), Request(num_logprobs=0), Request()]
    found = completed(MIXED, WARM, requests=asked)
    plain = completed(MIXED, WARM)
    assert found[1] == ("A" * 18, "length", 18, None) and found[3] == plain[3]
    known = make_weights()._replace(params=params | {"head_DV": params["head_DV"][:, : tokenizer.vocab_size]})
    for i, count in ((0, 2), (2, 0)):
        prompt, logprobs = [tokenizer.bos, *tokenizer.encode(MIXED[i])], found[i].logprobs
        assert found[i][:3] == plain[i][:3] and len(logprobs) == found[i].num_tokens > 12
        tokens = [token.token for token in logprobs]
        whole = np.array([(prompt + tokens + [0] * 60)[:60]])  # one program for both
        logits_SV = np.float64(expanded_logits(CONFIG, known, whole)[0, len(prompt) - 1 :][: len(tokens)])
        want_SV = logits_SV - np.log(np.exp(logits_SV).sum(-1, keepdims=True))
        got_S = [token.logprob for token in logprobs]
        np.testing.assert_allclose(got_S, want_SV[np.arange(len(tokens)), tokens], atol=2e-4)
        for token, want_V in zip(logprobs, want_SV, strict=True):
            order = np.argsort(-want_V)[:count]
            assert [other for other, _ in token.top] == order.tolist()
            np.testing.assert_allclose([value for _, value in token.top], want_V[order], atol=2e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 2**64}, "does not fit into 64 bits"),
        ({"logit_bias": {-1: 1.0}}, "an id is at least 0"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias = nan for id 1"),
        ({"logit_bias": {262: 1.0}}, "logit_bias has id 262, and the last token is 261"),
        ({"num_logprobs": 21}, "logprobs = 21 must be from 0 to 20"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        completed(MIXED[:1], requests=[Request(**values)])


def test_keys_are_those_of_jax_and_take_64_bits():
    want = jax.random.fold_in(jax.random.key(5), 3)
    assert (jax.random.key_data(row_keys([5], [3])[0]) == jax.random.key_data(want)).all()
    keys = jax.random.key_data(row_keys([1, 1 + 2**32, -1, 2**64 - 1], [0] * 4)).tolist()
    assert keys[0] != keys[1] and keys[2] == keys[3]


def test_a_cache_beyond_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 2**20)
    with pytest.raises(ValueError, match=r"of 64 sequences of \d+ tokens takes 0.0 GiB .* 0.0 GiB are fr"):
        ids([[1]] * 64)
    monkeypatch.undo()
    assert 2**28 < memory.free_bytes(mesh_of()) < 2**44


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="a prompt is empty, or there is none; give at least one id"):
        ids(prompts)
