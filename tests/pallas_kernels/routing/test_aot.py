"""The routing kernel, compiled for an H100 that is not there: registers suffice."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.routing import route
from pallas_kernels.routing.rule import Rule
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")


@pytest.mark.parametrize(("num_tokens", "width", "num_routed"), [(16, 2048, 64), (512, 7168, 256)])
def test_the_assembler_has_registers_enough(num_tokens, width, num_routed, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]
    shapes = ((num_tokens, width), jnp.bfloat16), ((3 * width, num_routed), jnp.bfloat16)
    shapes += ((num_routed,), jnp.float32), ((num_tokens,), jnp.bool_)
    placed = [jax.ShapeDtypeStruct(*shape, sharding=SingleDeviceSharding(device)) for shape in shapes]
    rule = Rule(8, num_groups=8, num_kept_groups=4, scale=2.5)
    run = functools.partial(route, rule=rule, num_experts=num_routed + 1, implementation="hopper")
    jax.jit(run).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
    report = "".join(capfd.readouterr())
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"], report
