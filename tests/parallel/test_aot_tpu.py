"""The real compiler for TPUs leaves out the pass that train steps disable: its name is no option that XLA checks."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies

from deepseek_jax.parallel.program import jit_on
from deepseek_jax.parameters import P
from tests.support import small, tpu


def summed(x_TBD, w_DD):
    """Add up, over four steps of a loop, what is reduced over devices."""

    def local(x_TBD, w_DD):
        def add(sums, x_BD):
            return sums + lax.psum(x_BD.T @ jnp.tanh(x_BD @ w_DD), "data"), None

        return lax.scan(add, jnp.zeros(w_DD.shape), x_TBD)[0]

    return jax.shard_map(local, in_specs=(P(None, "data"), P()), out_specs=P())(x_TBD, w_DD)


def reduces_in_loop(devices, trains):
    """Return whether the compiled loop of `summed` reduces over devices, rather than what follows it."""
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec in (((4, 32, 128), P(None, "data")), ((128, 128), P()))
    )
    with jax.set_mesh(mesh):
        text = jit_on(summed, small.config().execution, mesh, trains=trains).lower(x, w).compile().as_text()
    before_entry, _, entry = text.partition("ENTRY")
    assert ("all-reduce(" in before_entry) != ("all-reduce(" in entry), text
    return "all-reduce(" in before_entry


@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
def test_a_train_step_reduces_in_its_loop_and_other_programs_after_it():
    tpu.compile_elsewhere(__file__, "v5p:2x2x1")


if __name__ == "__main__":
    found = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
    assert reduces_in_loop(found, trains=True) and not reduces_in_loop(found, trains=False)
