"""A compiled training step with its state: what a benchmark times, and the same work of one device beside it.

Scaling is the rate of a device of a mesh as a share of the rate of one device alone that has the same work: the same
sequences, and all experts instead of its part of them. Both are timed in one process, one step of each in turn, so that
clocks, temperature and other programs are the same for both.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.data.packing import Batch
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.average import averaged, beside
from deepseek_jax.training.evaluation import place_batch
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import rates
from deepseek_jax.training.state import create_state
from deepseek_jax.training.step import jit_train_step

WARMUP_STEPS = 3  # the first steps touch fresh memory, and the clocks still rise
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # how the message of XLA's error begins


class Stepper:
    """A compiled step on a mesh.

    Attributes:
        lowered, step: the program.
        trace_seconds: cold, lowering included.
        compile_seconds: cold, if there is no persistent cache.
        seconds: of each step that has run, in order.
        losses: of each step, nats per token.
        tokens: of a step, over all devices.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, batches: Iterator[Batch]):
        self.config, self.mesh, self._batches = config, mesh, batches
        self.seconds: list[float] = []
        self.losses: list[float] = []
        with jax.set_mesh(mesh):
            self.state: Any = create_state(config)
            batch = place_batch(next(batches), mesh)
            self.tokens = batch["tokens_BS"].size
            start = time.perf_counter()
            step: Any = jit_train_step(config, pretraining(config), mesh)
            self.lowered = step.lower(beside(config.optimizer, self.state), batch, rates(config, 0, 0))
            traced = time.perf_counter()
            self.step = self.lowered.compile()
            self.trace_seconds, self.compile_seconds = traced - start, time.perf_counter() - traced

    def run(self, step: jax.stages.Compiled | None = None) -> None:
        """Take one step, by another compilation of the program if one is given, and wait for its results."""
        with jax.set_mesh(self.mesh):
            taken = len(self.losses)
            arguments = place_batch(next(self._batches), self.mesh), rates(self.config, taken, taken * self.tokens)
            begin = time.perf_counter()
            state, metrics = (step or self.step)(beside(self.config.optimizer, self.state), *arguments)
            self.state, metrics = jax.block_until_ready((averaged(self.config, self.mesh, self.state, state), metrics))
            self.seconds.append(time.perf_counter() - begin)
            self.losses.append(float(metrics["loss"]))


def one_device(config: Config, num_devices: int, size: int) -> tuple[Config, int]:
    """Return the config and the sequences of a step that give one device what each of `num_devices` has."""
    share = size // num_devices
    training = dataclasses.replace(
        config.training,
        batch_size=(("constant", 1.0, share),),
        micro_batch_size=config.training.micro_batch_size // num_devices,
    )
    alone = dataclasses.replace(config, training=training).with_(
        mesh={"pipe": 1, "data": 1, "context": 1, "node": 1, "expert": 1}, execution={"exchange": "auto"}
    )
    return from_config_dict(to_dict(alone)), share


def open_alone(
    config: Config, size: int, mesh: jax.sharding.Mesh, batches: Callable[[Config, int], Iterator[Batch]]
) -> Stepper | str:
    """Return the step of one device of `mesh` alone, warmed up; or why there is none.

    Args:
        config: of the mesh.
        size: sequences of a step of the mesh.
        mesh: of several devices.
        batches: makes the batches of a config and a number of sequences.
    """
    if jax.process_count() > 1:
        return "a device alone is not measured in a run of several processes; start one process for all devices"
    alone, share = one_device(config, mesh.size, size)
    try:
        stepper = Stepper(alone, make_mesh(alone.mesh, mesh.devices.flat[:1].tolist()), batches(alone, share))
        for _ in range(WARMUP_STEPS):
            stepper.run()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(OUT_OF_MEMORY):
            raise
        return f"a device alone does not hold {config.name} and its {share} sequences beside the step of the mesh"
    return stepper


def time_in_turn(stepper: Stepper, alone: Stepper | None, num_steps: int) -> None:
    """Take `num_steps` steps of both, one of each in turn."""
    for _ in range(num_steps):
        stepper.run()
        if alone is not None:
            alone.run()


def scaling(num_devices: int, tokens_per_second: float, alone_tokens_per_second: float) -> tuple[float, str]:
    """Return the rate per device in % of one device's, and the line that says it."""
    each = tokens_per_second / num_devices
    percent = 100 * each / alone_tokens_per_second
    return percent, (
        f"{num_devices} devices: {tokens_per_second:,.0f} tokens/s, {each:,.0f} per device,"
        f" {percent:.1f} % of one device's {alone_tokens_per_second:,.0f}"
    )


def rate(stepper: Stepper, num_steps: int) -> float:
    """Return tokens per second by the median of the last `num_steps` steps."""
    return stepper.tokens / statistics.median(stepper.seconds[-num_steps:])
