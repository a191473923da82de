"""The training state: everything a step reads and writes, as one nested dict of arrays.

    params, router_bias   the model
    optimizer             Optax state: two BF16 moments per parameter
    ema                   average of the parameters, only where optimizer.ema_decay > 0; with optimizer.ema_memory =
                          "host" in host memory, beside the step (`training.average`)
    step                  optimizer steps taken, int32
    skipped               consecutive steps whose update was skipped because something was not finite, int32

The tokens seen are not here: they pass 2^31 on a cluster and are an exact Python int in the loop.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Optimizer
from deepseek_jax.model import transformer
from deepseek_jax.parallel.host_memory import HOST_KIND, to_host
from deepseek_jax.parameters import Weights
from deepseek_jax.training.optimizer import make_optimizer, on_host

State = dict[str, Any]


def create_state(config: Config) -> State:
    """Make the initial state from `config.seed`, every array born in its layout. Call under `jax.set_mesh`."""
    # It runs once, and XLA:CPU takes three times as long to compile it with optimisation (12 s for `tiny`).
    options = (
        {"xla_backend_optimization_level": 0} if jax.sharding.get_mesh().devices.flat[0].platform == "cpu" else None
    )
    return jax.jit(_initial_state, static_argnums=0, compiler_options=options)(config)


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> State:
    """Return shapes, dtypes and shardings of the state on `mesh`, without an array, to restore a checkpoint into."""
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: _initial_state(config))
    return on_mesh(config.optimizer, shapes, mesh)


def on_mesh(optimizer: Optimizer, shapes: State, mesh: jax.sharding.Mesh) -> State:
    """Return the shapes of a state, as `jax.eval_shape` returns them, with its shardings on `mesh`."""

    def place(leaf, kind):  # a scalar constant has no sharding yet: it will lie on every device
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        sharding = jax.sharding.NamedSharding(mesh, spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    kinds = {name: HOST_KIND if name == "ema" and on_host(optimizer) else None for name in shapes}
    return {name: jax.tree.map(functools.partial(place, kind=kinds[name]), shapes[name]) for name in shapes}


def _initial_state(config: Config) -> State:
    return state_around(config.optimizer, transformer.init(config.model, jax.random.key(config.seed)))


def weights_of(state: State) -> Weights:
    """Return the weights of a state."""
    return Weights(state["params"], state["router_bias"])


def state_around(optimizer: Optimizer, weights: Weights) -> State:
    """Make the state of step 0 around given FP32 weights; call it under `jax.jit` and `jax.set_mesh`."""
    params, router_bias = weights
    state = {"params": params, "router_bias": router_bias, "optimizer": make_optimizer(optimizer).init(params)}
    if optimizer.ema_decay > 0.0:
        state["ema"] = to_host(params) if on_host(optimizer) else jax.tree.map(jnp.copy, params)
    return state | {"step": jnp.zeros((), jnp.int32), "skipped": jnp.zeros((), jnp.int32)}


jit_state_around = jax.jit(state_around, static_argnums=0, donate_argnums=1)
