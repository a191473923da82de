"""The train step compiles for TPUs on a machine that has none.

The compiler is that of the libtpu wheel, inputs are abstract, and attention is splash. This proves that the step traces
for a TPU mesh inside the checked shard_map, that the Pallas kernels of attention compile forward and backward (tiny's
48/32 head dims, V3's 192/128), and that the program fits the chip's memory, which the compiler checks. It proves
nothing about speed.

Each program compiles in a process of its own, `python -m tests.test_aot_tpu PROGRAM TOPOLOGY`: libtpu reads its
environment once.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from configs import deepseek_v3, tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from tests.support import abstract
from tests.support.aot_tpu import ENVIRONMENT

ROOT = Path(__file__).parents[1]
TOPOLOGIES = {"v5p:2x2x2": "TPU v5", "tpu7x:2x2x1": "TPU7x"}  # eight devices each: a chip of tpu7x is two
HBM_BYTES = 95 * 2**30  # of a v5p chip; one device of tpu7x has 96
KERNELS_PER_ATTENTION = 3  # forward, dq, dkv; more would be the forward again in the backward pass


def program(name: str) -> Config:
    """`tiny` as it is, on 2 x 4 devices; or one layer of V3's width, on 1 x 8.

    The layer has all experts, BF16, and sequence 4096.
    """
    if name == "tiny":
        tree = tiny.get_config()
        tree.mesh.update({"data": 2, "expert": 4})
    else:
        tree = deepseek_v3.get_config()
        tree.execution.precision = "bf16"
        tree.model.update({"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 0})
        tree.mesh.update({"data": 1, "node": 1, "expert": 8})
        tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    return from_config_dict(tree)


def compile_program(name: str, topology: str) -> dict:
    """Compile for the first eight devices of a topology; return what the test looks at."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = program(name)
    mesh = make_mesh(config.mesh, devices)
    traced = abstract.trace(config, mesh)
    with jax.set_mesh(mesh):
        compiled = traced.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "device_kind": devices[0].device_kind,
        "attention": resolve_for(config, mesh).execution.attention,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "all_to_all": "all-to-all" in text,
    }


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", TOPOLOGIES)
# layers and MTP layers: tiny's are unrolled
@pytest.mark.parametrize(("name", "attentions"), [("tiny", 5), ("v3_layer", 1)])
def test_step_compiles_for_tpu(name, attentions, topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: the `dev` extra has it on Linux x86-64")
    command = [sys.executable, "-m", "tests.test_aot_tpu", name, topology]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["device_kind"] == TOPOLOGIES[topology]
    assert result["attention"] == "splash"
    assert result["kernels"] == KERNELS_PER_ATTENTION * attentions
    assert result["all_to_all"]
    assert result["bytes"] < HBM_BYTES


if __name__ == "__main__":
    print(json.dumps(compile_program(*sys.argv[1:])))
