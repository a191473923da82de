"""The update compiled for an absent GPU: what XLA fuses decides how often the parameters are read and written.

The floor, per parameter: gradients once for their norm, then parameters, gradients and moments once, 16 bytes read and
8 written.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from configs import v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.model.balance import RouterStats
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import P, partition_specs
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import Normalisers, Terms, pretraining
from deepseek_jax.training.optimizer import Rates, make_optimizer
from tests.pallas_kernels.h100 import H100

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aot_hopper")]
LAYERS, EXPERTS = 11, 64
LEAVES = {
    "gate_up_ED2F": (LAYERS, EXPERTS, 2048, 2, 1024),
    "down_EFD": (LAYERS, EXPERTS, 1024, 2048),
    "norm_D": (LAYERS, 2048),
}


def arguments(config, mesh):
    """What `update` takes for a model of `LEAVES` alone, without an array."""

    def place(tree, specs):
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)), tree, specs
        )

    def zeros(dtype, *shapes):
        return (place(jax.ShapeDtypeStruct(shape, dtype), P()) for shape in shapes)

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LEAVES.items()}
    specs = partition_specs(params)
    optimizer = jax.eval_shape(make_optimizer(config.optimizer).init, params)
    moments = [s._replace(count=P(), mu=specs, nu=specs) if hasattr(s, "mu") else s for s in optimizer]
    params, optimizer = place(params, specs), place(optimizer, tuple(moments))
    scalar, per_layer, none = zeros(jnp.float32, (), (LAYERS,), (0,))
    integer, counts = zeros(jnp.int32, (), (LAYERS, EXPERTS))
    (bias,) = zeros(jnp.float32, (LAYERS, EXPERTS))
    state = {
        "params": params,
        "router_bias": {"bias_E": bias},
        "optimizer": optimizer,
        "step": integer,
        "skipped": integer,
    }
    sums = step_lib.Sums(Terms(scalar, scalar, none), RouterStats(counts, per_layer, per_layer))
    return state, params, sums, Normalisers(scalar, integer, integer), Rates(scalar, scalar, scalar)


def test_update_passes_over_the_parameters_once_and_in_place():
    """The direction is never an array in memory. 1%: partial sums, and all that is not a parameter."""
    config = from_config_dict(v3_5b.get_config())
    # an H200's, for all of it to fit
    target = H100.replace("device_memory_size: 84978434048", "device_memory_size: 150754820096")
    mesh = make_mesh(
        config.mesh, topologies.get_topology_desc("h200", "cuda", target_config=target, topology="1x1x1").devices
    )
    with jax.set_mesh(mesh):
        recipe = step_lib.recipe_of(config, pretraining(config), mesh)
        update = jax.jit(functools.partial(step_lib.update, recipe), donate_argnums=0)
        compiled = update.trace(*arguments(config, mesh)).lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    kernels = [line for line in text[text.index("ENTRY ") :].splitlines() if " fusion(" in line or " copy(" in line]
    for name in ("gate_up_ED2F", "down_EFD"):
        passes = {
            part: sum(bool(re.search(f"{part}_+{name}", line)) for line in kernels)
            for part in ("grads", "params", "mu", "nu")
        }
        assert passes == {"grads": 2, "params": 1, "mu": 1, "nu": 1}, name
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * memory.alias_size_in_bytes
