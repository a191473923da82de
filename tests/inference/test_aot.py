"""A burst of decoding, compiled for an H100 that is not there: few kernels; cache and weights stay in place."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from configs import v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference import decode
from deepseek_jax.inference.cache import CACHE_SPECS, make_cache
from deepseek_jax.inference.requests import make_rows
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


def test_a_burst_has_few_kernels_and_copies_nothing_large(monkeypatch):
    """108 kernels of a step with three layers, on 2026-11-29; a copy of pages or of a weight would be in the loop."""
    monkeypatch.setattr(dispatch, "_hardware", lambda: ("gpu", dispatch.HOPPER))
    config = from_config_dict(v3_5b.get_config()).with_(model={"num_layers": NUM_LAYERS})
    target = H100.replace("device_memory_size: 84978434048", "device_memory_size: 150754820096")
    devices = topologies.get_topology_desc("h200", "cuda", target_config=target, topology="1x1x1").devices
    mesh, here = make_mesh(config.mesh, devices), make_mesh(config.mesh, jax.devices()[:1])
    execution = decode.decode_execution(config, mesh)

    def make(key):
        weights = decode_weights(config.model, execution, transformer.init(config.model, key), here)
        cache = make_cache(config.model, execution, NUM_ROWS, 1024)
        ints, bools = jnp.zeros(NUM_ROWS, jnp.int32), jnp.zeros(NUM_ROWS, bool)
        return weights, decode.Generation(cache, ints, bools), make_rows([], 0, NUM_ROWS)

    with jax.set_mesh(here):
        weights, state, rows = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    with jax.set_mesh(mesh):
        split = P(ROWS)
        specs = weight_specs(weights), decode.Generation(CACHE_SPECS, split, split), jax.tree.map(lambda _: split, rows)
        operands = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)),
            (weights, state, rows),
            specs,
        )
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
        burst = functools.partial(decode.decode_burst, config.model, execution, greedy, 16)
        compiled = (
            jax.jit(burst, donate_argnums=1).trace(*operands, 1, 16).lower(lowering_platforms=("cuda",)).compile()
        )
    text = compiled.as_text()
    assert kernels_of_a_step(text) <= 120
    large = re.findall(r"= \w+\[(?:768|65|2048|3072|16384),[\d,]*\]\S* (?:copy|transpose)\(", text)
    assert not large and compiled.memory_analysis().temp_size_in_bytes < 2**24
