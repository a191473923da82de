"""The kernels of a decoding step's attention, compiled for an H100 that is not there: registers suffice."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.decode_projections import TuningConfig, absorb, add_norm, latents, project
from pallas_kernels.quantize import quantize_tiles
from tests.pallas_kernels.decode_projections import cases
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")


NAMES = ["project", "project_whole", "project_fp8", "project_tiles", "absorb", "latents", "latents_tiles", "add_norm"]
NAMES += ["add_norm_tiles", "add_norm_zeros"]


def operands_of(name, n):
    """A function, and operands of the shapes of `configs/v3_5b.py`."""
    if name == "project":
        return project, (cases.normal(0, n, 2048), cases.normal(1, 1, 2048, 2112))
    if name == "project_whole":
        return functools.partial(project, whole=True), (cases.normal(0, n, 8192), cases.normal(1, 16, 512, 128))
    if name == "project_fp8":
        return project, (cases.normal(0, n, 1536), cases.blocks(1, 3072, 1536))
    if name == "project_tiles":
        rows = quantize_tiles(cases.normal(0, n, 1536), scale="fp32", implementation="reference")
        return project, (rows, cases.blocks(1, 3072, 1536))
    if name == "absorb":
        parts = cases.normal(0, 2, n, 3072, dtype=jnp.float32)
        return absorb, (parts, cases.normal(1, 16, 128, 512), cases.table(n))
    if name.startswith("latents"):
        gains = jnp.ones(1536, jnp.float32), jnp.ones(512, jnp.float32)
        parts = cases.normal(0, 4, n, 2112, dtype=jnp.float32)
        operands = parts, gains, cases.table(n), cases.normal(1, 99, 64, 576), cases.places(n, 99)
        return functools.partial(latents, eps=1e-6, scale="fp32" if name == "latents_tiles" else None), operands
    parts, scale = cases.normal(1, 8, n, 2048, dtype=jnp.float32), "pow2" if name == "add_norm_tiles" else None
    operands = cases.normal(0, n, 2048), parts, jnp.ones(2048, jnp.float32)
    zeros = 256 if name == "add_norm_zeros" else 0
    return functools.partial(add_norm, eps=1e-6, scale=scale, zeros=zeros), operands


@pytest.mark.parametrize(("n", "early"), [(16, True), (128, False)])
@pytest.mark.parametrize("name", NAMES)
def test_the_assembler_has_registers_enough(name, n, early, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    device = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
        jax.eval_shape(lambda: operands_of(name, n)[1]),
    )
    run = functools.partial(operands_of(name, n)[0], implementation="hopper", config=TuningConfig(early=early))
    donated = 3 if name.startswith("latents") else ()
    program = jax.jit(run, donate_argnums=donated).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
    report = "".join(capfd.readouterr())
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"], report
    assert "are serialized" not in report, report
    assert len(re.findall(r" = .*? (?:fusion|custom-call|copy|transpose)\(", program.as_text())) == 1, program.as_text()
