"""The average of the parameters in host memory, as the report keeps it (DeepSeek-V3 section 3.2.2).

    step       (state without the average, batch) -> state without the average, metrics
    average    average <- average + (1 - decay) (parameters - average),  after the step, by a program of its own

In this program the average comes to the device, is updated there and goes back: 8 bytes a parameter, and only between
two steps, when activations and gradients are gone. A step has 4 bytes less for each parameter that a device holds. The
larger of the two is what a device needs (`plan.counts.update_bytes`). It is never more than a step with the average
beside it, which has 4 bytes a parameter of that and 4 of FP32 gradients.

The host does not wait: it dispatches the average and then the next step. The device runs them one after another,
because the next step writes over the parameters. 4 bytes a parameter go each way, one way after the other: 0.347 s for
2.3B parameters of one H200, whose link has 53.5 GB/s each way (experiments/log.md). By that rate it is 49 ms of the
19.9 s of V3's step on 2,048 cards, 0.25%: all that an update inside the next step could hide. That would average the
parameters that the step begins with, one step late, which each checkpoint would have to make up for. On a card that
holds all of a model it takes longer than the step: there the average belongs on the device.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, Optimizer
from deepseek_jax.parallel.host_memory import to_device, to_host
from deepseek_jax.parallel.program import jit_on
from deepseek_jax.training.optimizer import ema_update, on_host
from deepseek_jax.training.state import State


def beside(optimizer: Optimizer, state: State) -> State:
    """Return the part of a state that the step takes: all of it but an average in host memory."""
    return {name: part for name, part in state.items() if name != "ema" or not on_host(optimizer)}


def averaged(config: Config, mesh: jax.sharding.Mesh, before: State, after: State) -> State:
    """Return the whole state after a step, of which the average in host memory is updated and donated.

    Args:
        config: of the run.
        mesh: of the state; call it under `jax.set_mesh(mesh)`.
        before: the whole state before the step.
        after: what the step made of `beside(config.optimizer, before)`. A step that was skipped changes no average.
    """
    if not on_host(config.optimizer):
        return after
    update = jit_on(_update, config.execution, mesh, config.optimizer.ema_decay, donate=(0,))
    return after | {"ema": update(before["ema"], after["params"], after["skipped"])}


def _update(decay: float, average: Any, params: Any, skipped: jax.Array) -> Any:
    average = to_device(average)
    new = ema_update(average, params, decay)
    return to_host(jax.tree.map(lambda new, old: jnp.where(skipped == 0, new, old), new, average))
