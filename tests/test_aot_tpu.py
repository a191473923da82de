"""The train step compiles for TPUs on a machine that has none.

The compiler is that of the libtpu wheel, inputs are abstract, and attention is splash. This proves that the step traces
for a TPU mesh inside the checked shard_map, that the Pallas kernels of attention compile forward and backward (tiny's
48/32 head dims, V3's 192/128), and that the program fits the chip's memory, which the compiler checks. It proves
nothing about speed.

Each program compiles in a process of its own, `python -m tests.test_aot_tpu PROGRAM CHIP`: libtpu reads its
environment once.
"""

import json
import sys

import jax
import pytest

from configs import deepseek_v3, tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.program import resolve_for
from deepseek_jax.plan.chips import CHIPS, absent_devices
from deepseek_jax.plan.memory import memory_of, trace_step
from tests.support.tpu import compile_elsewhere

DEVICE_KINDS = {"v5p": "TPU v5", "tpu7x": "TPU7x"}
KERNELS_PER_ATTENTION = 3  # forward, dq, dkv; more would be the forward again in the backward pass


def program(name: str) -> Config:
    """`tiny` with one layer of each kind, on 2 x 4 devices; or one layer of V3's width, on 1 x 8.

    The layer has all experts, BF16, and sequence 4096.
    """
    if name == "tiny":
        tree = tiny.get_config()  # more layers repeat the same kernels, and compile twice as long
        tree.model.update({"num_layers": 2, "num_dense_layers": 1})
        tree.mesh.update({"data": 2, "expert": 4})
    else:
        tree = deepseek_v3.get_config()
        tree.execution.precision = "bf16"
        tree.model.update({"num_layers": 1, "num_dense_layers": 0, "num_mtp_layers": 0})
        tree.mesh.update({"data": 1, "node": 1, "expert": 8})
        tree.training.update({"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 8})
    return from_config_dict(tree)


def compile_program(name: str, chip: str) -> dict:
    """Compile for eight devices of a chip; return what the test looks at."""
    devices = absent_devices(CHIPS[chip], 8)
    config = program(name)
    mesh = make_mesh(config.mesh, devices)
    traced = trace_step(config, mesh)
    with jax.set_mesh(mesh):
        compiled = traced.lower().compile()
    text = compiled.as_text()
    return {
        "device_kind": devices[0].device_kind,
        "attention": resolve_for(config, mesh).execution.attention,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "bytes": memory_of(compiled).total,
        "all_to_all": "all-to-all" in text,
    }


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
# Attentions: tiny's two layers and its MTP layer are unrolled. The other pairs compile for three to five minutes.
@pytest.mark.parametrize(("name", "attentions", "chip"), [("tiny", 3, "tpu7x"), ("v3_layer", 1, "v5p")])
def test_step_compiles_for_tpu(name, attentions, chip):
    result = json.loads(compile_elsewhere(__file__, name, chip).splitlines()[-1])
    assert result["device_kind"] == DEVICE_KINDS[chip]
    assert result["attention"] == "splash"
    assert result["kernels"] == KERNELS_PER_ATTENTION * attentions
    assert result["all_to_all"]
    assert result["bytes"] < CHIPS[chip].memory


if __name__ == "__main__":
    print(json.dumps(compile_program(*sys.argv[1:])))
