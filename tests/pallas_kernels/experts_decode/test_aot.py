"""The kernels of experts at decode, compiled for an H100 that is not there: registers suffice, nothing is copied."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.experts_decode import experts_decode
from tests.pallas_kernels.experts_decode import cases
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")

LAYERS, NUM_EXPERTS, K = 3, 64, 8


@pytest.mark.parametrize("num_tokens", [1, 32, 128, 512])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_assembler_has_registers_enough(num_tokens, fp8, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]

    def operands():
        operands = [jnp.zeros((num_tokens, 2048), jnp.bfloat16), jnp.zeros((num_tokens, K), jnp.int32)]
        operands.append(jnp.zeros((num_tokens, K), jnp.float32))
        weights = jnp.zeros((NUM_EXPERTS, 2048, 2048), jnp.bfloat16), jnp.zeros((NUM_EXPERTS, 1024, 2048), jnp.bfloat16)
        whole = cases.in_fp8(*operands, *weights) if fp8 else (*operands, *weights)
        return *whole[:3], *jax.tree.map(lambda x: jnp.broadcast_to(x, (LAYERS, *x.shape)), whole[3:]), jnp.int32(1)

    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        jax.eval_shape(operands),
    )
    run = functools.partial(experts_decode, implementation="hopper")
    jitted = jax.jit(lambda *operands: run(*operands[:-1], layer=operands[-1]))
    program = jitted.trace(*placed).lower(lowering_platforms=("cuda",)).compile().as_text()
    report = "".join(capfd.readouterr())
    spills = re.findall(r"(\d+) bytes spill stores", report)
    assert spills == ["0"] * (2 if num_tokens <= 32 else 3), report
    assert "are serialized" not in report, report
    assert " while(" not in program, "nothing waits for the host"
    weights = rf"\[(?:{LAYERS},|{LAYERS * NUM_EXPERTS},)?(?:{NUM_EXPERTS},)?(?:2048|1024),(?:2048|1024)\]"
    assert not re.search(rf"{weights}\S* (copy|fusion|dynamic-slice|transpose)\(", program), "weights are read in place"
