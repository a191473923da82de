"""Abstract inputs of the train step: shapes, dtypes and shardings.

They serve programs that are lowered or compiled and never run.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.parameters import ROWS, P
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import Rates
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import jit_train_step

BATCH_DTYPES = {
    "tokens_BS": jnp.int32,
    "targets_BS": jnp.int32,
    "positions_BS": jnp.int32,
    "segment_ids_BS": jnp.int32,
    "loss_weights_BS": jnp.float32,
}


def inputs(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Rates]:
    """State, batch of the last batch size, and rates."""
    rows, everywhere = (jax.sharding.NamedSharding(mesh, spec) for spec in (P(ROWS, None), P()))
    shape = int(config.training.batch_size[-1][2]), config.data.sequence_length
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in BATCH_DTYPES.items()}
    return (
        abstract_state(config, mesh),
        batch,
        Rates(*(jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),) * 3),
    )


def trace(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """The traced train step. Lower it under `jax.set_mesh(mesh)`."""
    arrays = inputs(config, mesh)
    with jax.set_mesh(mesh):
        return jit_train_step(config, pretraining(config), mesh).trace(*arrays)
