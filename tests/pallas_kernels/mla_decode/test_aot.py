"""The MLA kernels for Hopper, compiled for an H100 that is not there: registers suffice, and nothing is copied."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import mla_decode
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")


@pytest.mark.parametrize(("heads", "queries"), [(16, 1), (8, 4), (64, 1), (128, 2)])
def test_the_assembler_has_registers_enough(heads, queries, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]

    def abstract(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, cache = abstract(jnp.bfloat16, 4, queries, heads, 576), abstract(jnp.bfloat16, 100, 64, 576)
    operands = q, cache, abstract(jnp.int32, 4, 16), abstract(jnp.int32, 4)
    run = jax.jit(functools.partial(mla_decode.mla_decode, scale=0.1, implementation="hopper"))
    program = run.trace(*operands).lower(lowering_platforms=("cuda",)).compile().as_text()
    report = "".join(capfd.readouterr())
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0", "0"], report  # attention and combine
    assert "are serialized" not in report, report
    assert program.count(" custom-call(") == 2
    assert " while(" not in program, "the schedule runs without the host"
    assert not re.search(r"(bf16|f32)\[4,\d+,512\]\S* copy\(", program), "the combine writes in place"
