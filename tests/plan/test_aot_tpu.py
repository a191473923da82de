"""What libtpu says of the chips that a plan knows: their memory, and whether the meshes that it offers can be laid out.

It runs in a process of its own, `python -m tests.plan.test_aot_tpu`: libtpu reads its environment once.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from configs import deepseek_v2, deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan.chips import CHIPS, absent_devices, prepare
from deepseek_jax.plan.memory import refused
from deepseek_jax.plan.meshes import find_fits
from tests.support.tpu import compile_elsewhere

TPUS = [chip for chip in CHIPS.values() if chip.compiles]


def compiler_memory(chip):
    """Return the memory that the compiler gives a program, from its refusal of one that adds 1 to 400 GiB."""
    sharding = jax.sharding.SingleDeviceSharding(absent_devices(chip, 1)[0])
    x = jax.ShapeDtypeStruct((400, 2**30), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).trace(x).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = refused(error)
        return found.capacity, found.total


def meshes_of(config, chip):
    """Return the shapes of all meshes that a plan offers on a pod, made of the pod's devices."""
    fits = [fit for fit in find_fits(config, 512) if chip.has(fit.num_devices)]
    return [list(make_mesh(fit.config.mesh, absent_devices(chip, fit.num_devices)).shape.values()) for fit in fits]


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
def test_chips_are_as_libtpu_has_them():
    memory, shapes = json.loads(compile_elsewhere(__file__).splitlines()[-1])
    # argument and result: a refusal names the whole need of a program
    assert memory == {chip.name: [chip.memory, 800 * 2**30] for chip in TPUS}
    assert [1, 2, 1, 8, 8, 1] in shapes["v5p"]  # V3 on 128 chips, a torus of 8 x 4 x 4


if __name__ == "__main__":
    prepare()
    configs = [from_config_dict(module.get_config()) for module in (deepseek_v2, deepseek_v3)]
    laid_out = {chip.name: [shape for config in configs for shape in meshes_of(config, chip)] for chip in TPUS}
    print(json.dumps(({chip.name: compiler_memory(chip) for chip in TPUS}, laid_out)))
