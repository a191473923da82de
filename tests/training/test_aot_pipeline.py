"""A pipeline compiled for GPUs and TPUs that are not there: what its ticks do not copy."""

import re

import jax
import pytest
from jax.experimental import topologies

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.stages import program_of
from deepseek_jax.plan.memory import abstract_inputs
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.step import jit_train_step
from tests.pallas_kernels.h100 import H100
from tests.support.tpu import compile_elsewhere
from tests.training.pipeline_cells import DENSE, config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
pytest.importorskip("jax_cuda13_plugin", reason="the extra `dev` brings it on Linux")


def compiled(platform, devices):
    """DualPipeV has every kind of cell: pairs, which read one slot and write another, and B and W apart."""
    cfg = config(2, num_cuts=8, model=DENSE, execution={"schedule": "dualpipev", "gather": "step", "remat": "full"})
    mesh = make_mesh(cfg.mesh, list(devices)[:2])
    with jax.set_mesh(mesh):
        step = jit_train_step(cfg, pretraining(cfg), mesh)
        return cfg, step.trace(*abstract_inputs(cfg, mesh)).lower(lowering_platforms=(platform,)).compile().as_text()


def check_slots(text):
    """No line of the program makes an array of the size of all slots by copying one."""
    slots = program_of("dualpipev", 2, 8).num_slots
    buffers = set(re.findall(rf"\b\w+\[{slots},\d{{3,}}\]", text))
    assert buffers  # one for each dtype
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = \(?(\S+?\])\S* (copy|copy-start|slice|dynamic-slice)\(", line)
        assert not found or found[1] not in buffers, line


def test_slots_are_written_in_place_and_weights_are_read_as_they_lie():
    devices = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x2").devices
    cfg, text = compiled("cuda", devices)
    check_slots(text)
    weight = rf"f32\[(?:1,)?{cfg.model.width},2,{cfg.model.dense_hidden}\]"
    assert re.search(weight, text)
    branches = [part for part in re.split(r"\n(?=\S)", text) if "/cond/branch_" in part]
    assert branches
    for line in (line for part in branches for line in part.splitlines()):
        assert not re.match(rf"\s*(?:ROOT )?%\S+ = {weight}\S* (copy|slice|dynamic-slice)\(", line), line


def test_slots_are_written_in_place_on_tpus():
    check_slots(compile_elsewhere(__file__))


if __name__ == "__main__":
    tpus = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    print(compiled("tpu", tpus)[1])
