"""MLA decode compiles for real TPUs on a machine that has none: odd rows on each, and V3's 128 heads on one."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from deepseek_jax.plan.chips import ENVIRONMENT
from pallas_kernels.mla_decode import mla_decode

ROOT = Path(__file__).parents[3]
ODD, V3, V3_DRAFTS = (1, 3), (1, 128), (4, 128)  # queries, heads
TOPOLOGIES = {"v5p:2x2x1": (ODD, V3, V3_DRAFTS), "v6e:2x2x1": (ODD,), "tpu7x:2x2x1": (ODD,)}
BATCH, PAGES = 3, 20  # 20 pages are three blocks


def compile_all(topology: str) -> None:
    """Compile the kernel for a device of `topology`."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    cache, lengths = struct((100, 64, 576), jnp.bfloat16), struct((BATCH,), jnp.int32)
    tables = struct((BATCH, PAGES), jnp.int32)
    for queries, heads in TOPOLOGIES[topology]:
        q = struct((BATCH, queries, heads, 576), jnp.bfloat16)
        call = functools.partial(mla_decode, scale=0.1, implementation="tpu")
        compiled = jax.jit(call).trace(q, cache, tables, lengths).lower().compile()
        text = compiled.as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 1
        assert f" bf16[{','.join(map(str, cache.shape))}]" in text and "copy(%cache" not in text


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernel_compiles_for_tpu(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the `dev` extra has it on Linux x86-64")
    command = [sys.executable, __file__, topology]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
