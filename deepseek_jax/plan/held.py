"""What the weights of a whole model are on a device without a pipeline, of which a pipeline's devices have stages."""

import functools
from typing import Any, NamedTuple

import jax

from deepseek_jax.config import Config
from deepseek_jax.plan.counts import STAGES, beside_state, state_of
from deepseek_jax.plan.sums import Gradients, gradients_of
from deepseek_jax.plan.wire import weights_of


class Held(NamedTuple):
    """What the weights of a whole model are on a device without a pipeline.

    Attributes:
        parameters: of the model.
        stored: FP32 bytes, by the first name of a parameter.
        gradients: that a micro-batch makes of all stages, by `execution.gather` of a pipeline, then likewise.
        sent: bytes of one gather and of one sum of gradients (`wire.weights_of`).
    """

    parameters: int
    stored: dict[str, float]
    gradients: dict[str, dict[str, Gradients]]
    sent: dict[tuple[str, str, str], float]


@functools.lru_cache(maxsize=128)  # a search asks for each mesh once per schedule, remat and micro-batch
def held_of(config: Config, mesh: jax.sharding.AbstractMesh) -> Held:
    """Return what a device of `mesh` has; of configs that differ elsewhere only `plain` makes the key the same."""
    state = _state(config)
    stored = {top: sizes[STAGES] for top, sizes in beside_state(config, state, mesh).items()}
    gradients = {
        gather: gradients_of(config.with_(execution={"gather": gather}), state, mesh, pipe=True)
        for gather in ("layer", "step")
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    return Held(parameters, stored, gradients, weights_of(config, mesh, state))


@functools.lru_cache(maxsize=4)
def _state(config: Config) -> Any:
    return state_of(config)


def plain(config: Config) -> Config:
    """Return a config that is the same for all of whose weights lie and travel alike."""
    mesh = {"pipe": 1, "data": -1, "context": 1, "node": 1, "expert": 1}
    execution = {"remat": "none", "schedule": "1f1b", "gather": "layer"}
    return config.with_(mesh=mesh, execution=execution, training={"micro_batch_size": 1})
