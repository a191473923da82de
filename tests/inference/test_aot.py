"""A burst, and a step of an engine, compiled for an H100 that is not there: few kernels; cache and weights in place."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from configs import v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference import decode, row_programs, row_state, speculative
from deepseek_jax.inference.cache import CACHE_SPECS, make_cache
from deepseek_jax.inference.requests import make_rows
from deepseek_jax.inference.row_sampling import DRAWN, GREEDY
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.inference.weights import decode_weights, weight_specs
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS, P
from experiments.benchmarks.breakdown import kernels_of_a_step
from pallas_kernels import dispatch
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")

NUM_LAYERS, NUM_ROWS = 3, 16


def shapes(monkeypatch, num_layers=NUM_LAYERS, drafts=False):
    """Configuration, execution and meshes of an H200, and the shapes of weights and an empty cache there."""
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", dispatch.HOPPER))
    config = from_config_dict(v3_5b.get_config())
    config = config.with_(model={"num_layers": num_layers, "num_mtp_layers": int(drafts)})
    target = H100.replace("device_memory_size: 84978434048", "device_memory_size: 150754820096")
    devices = topologies.get_topology_desc("h200", "cuda", target_config=target, topology="1x1x1").devices
    mesh, here = make_mesh(config.mesh, devices), make_mesh(config.mesh, jax.devices()[:1])
    execution = decode.decode_execution(config, mesh)

    def make(key):
        weights = decode_weights(config.model, execution, transformer.init(config.model, key), here, drafts)
        return weights, make_cache(config.model, execution, NUM_ROWS, 1024, drafts=drafts)

    with jax.set_mesh(here):
        return config.model, execution, mesh, here, *jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))


def compiled_on(mesh, function, donate, operands, specs, *rest):
    """The program of `function` on a GPU that is not there, for operands of these shapes and layouts."""
    with jax.set_mesh(mesh):
        operands = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)),
            operands,
            specs,
        )
        traced = jax.jit(function, donate_argnums=donate).trace(*operands, *rest)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def check_in_place(compiled):
    """Nothing of the size of pages or of a weight is copied."""
    large = re.findall(r"= \w+\[(?:768|65|2048|3072|16384),[\d,]*\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert not large and compiled.memory_analysis().temp_size_in_bytes < 2**24


def test_a_burst_has_few_kernels_and_copies_nothing_large(monkeypatch):
    """65 kernels of a step with three layers, on 2026-11-30; a copy of pages or of a weight would be in the loop."""
    model, execution, mesh, here, weights, cache = shapes(monkeypatch)
    ints, bools = (jax.ShapeDtypeStruct((NUM_ROWS,), dtype) for dtype in (jnp.int32, bool))
    with jax.set_mesh(here):
        rows = jax.eval_shape(lambda: make_rows([], 0, NUM_ROWS))
    split = P(ROWS)
    specs = weight_specs(weights), decode.Generation(CACHE_SPECS, split, split), jax.tree.map(lambda _: split, rows)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
    burst = functools.partial(decode.decode_burst, model, execution, greedy, 16)
    operands = weights, decode.Generation(cache, ints, bools), rows
    compiled = compiled_on(mesh, burst, 1, operands, specs, 1, 16)
    text = compiled.as_text()
    assert kernels_of_a_step(text) <= 67 and f'"known_trip_count":{{"n":"{decode.STEPS_TOGETHER}"}}' in text
    check_in_place(compiled)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_step_of_an_engine_has_few_kernels_and_copies_nothing_large(monkeypatch, num_tokens):
    """68 kernels of a greedy step with three layers, on 2026-11-30; a single step is not a loop, so all of it counts.

    A burst has 70 a token. XLA knows the length of its loop, so that the host reads nothing before its end.
    """
    model, execution, mesh, _, weights, cache = shapes(monkeypatch)
    state = row_state.empty_state(NUM_ROWS, model.vocab_size)
    load_RLE = jax.ShapeDtypeStruct((1, NUM_LAYERS - model.num_dense_layers, model.num_experts), jnp.int32)
    rows = state.progress, state.settings, None, cache.tables_BJ, np.zeros(NUM_ROWS, bool), load_RLE
    specs = weight_specs(weights), CACHE_SPECS.pages, jax.tree.map(lambda _: P(ROWS), rows)
    step = functools.partial(row_programs.decode, model, execution, NUM_ROWS, GREEDY, num_tokens)
    compiled = compiled_on(
        mesh, lambda weights, pages, rows: step(weights, pages, *rows), 1, (weights, cache.pages, rows), specs
    )
    check_in_place(compiled)
    pages = cache.pages.size * cache.pages.dtype.itemsize
    assert compiled.memory_analysis().alias_size_in_bytes >= pages
    text = compiled.as_text()
    kernels = len(re.findall(r" = .*? (?:fusion|custom-call|copy|sort|dot|scatter)\(", text.rpartition("\nENTRY")[2]))
    assert kernels <= (75 if num_tokens == 1 else 12)
    if num_tokens > 1:
        assert kernels_of_a_step(text) <= 75 and f'"known_trip_count":{{"n":"{num_tokens}"}}' in text


def test_a_burst_with_drafts_that_are_drawn_branches_nowhere(monkeypatch):
    """99 kernels of a step with two layers and the MTP layer, on 2026-11-30. With conditions it had 335, and the host
    read 14 of them. Main model and MTP layer have one plan of their attention, and the same kernels.
    """
    num_layers, num_steps = 2, 4
    model, execution, mesh, _, weights, cache = shapes(monkeypatch, num_layers, drafts=True)
    state = row_state.empty_state(NUM_ROWS, model.vocab_size)
    load_RLE = jax.ShapeDtypeStruct((1, num_layers - model.num_dense_layers, model.num_experts), jnp.int32)
    draft_BD = jax.ShapeDtypeStruct((NUM_ROWS, model.width), jnp.bfloat16)
    rows = state.progress, draft_BD, state.settings, None, cache.tables_BJ, np.zeros(NUM_ROWS, bool), load_RLE
    specs = weight_specs(weights), CACHE_SPECS.pages, jax.tree.map(lambda _: P(ROWS), rows)
    kind = speculative.Kind(1, NUM_ROWS, DRAWN, num_steps)
    step = functools.partial(speculative.speculate, model, execution, kind)
    compiled = compiled_on(
        mesh, lambda weights, pages, rows: step(weights, pages, *rows), 1, (weights, cache.pages, rows), specs
    )
    check_in_place(compiled)
    text = compiled.as_text()
    assert " conditional(" not in text and f'"known_trip_count":{{"n":"{num_steps}"}}' in text
    assert kernels_of_a_step(text) <= 125
