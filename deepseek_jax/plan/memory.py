"""The memory of a training step, from the step itself, compiled for devices that need not be there.

Inputs are shapes, dtypes and shardings; nothing runs. Per device a step holds

    arguments + outputs - outputs that share memory with arguments + temporaries + its own code

The state is donated, so its new values lie where its old ones did. A compiler refuses a program that needs more than
the chip has, and says how much it would need. That number has the same parts (checked with programs of known size).
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.parameters import ROWS, P
from deepseek_jax.plan.counts import largest_batch
from deepseek_jax.training.average import beside
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
# What libtpu's compiler says of a program that is too large, in GiB: all of it, although it says "temporaries".
TOO_LARGE = re.compile(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What one device holds while a step runs, in bytes.

    Attributes:
        total: all of it.
        arguments: state and batch; None if the compiler refused the program, as the next one.
        temporaries: room for gradients, activations, gathered weights, and all else that lives within the step.
        peak: what lives at once, at most. It is less than `total` where the compiler cannot place arrays without gaps.
        capacity: what the compiler said that a program may have, or what the device has if the buffers that were
            assigned are larger and the compiler had neither taken nor refused them yet; None if the program fits.
        source: "compiled"; "assigned": the compiler was ended, or not asked, after its buffer assignment. Code and some
            scratch memory are not in `total` then.
        seconds: time of tracing and compiling, where it was measured.
        on_host: bytes in pinned memory of the host, by the compiler, beside `total`; None: it was not asked.
    """

    total: int
    arguments: int | None
    temporaries: int | None
    peak: int | None = None
    capacity: int | None = None
    source: str = "compiled"
    seconds: float | None = None
    on_host: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted the step, or assigned its buffers within the memory of a device.

        It counts a little otherwise than `memory_analysis`: it accepted V3's step on 512 devices of v5p, whose parts
        add up to 95.97 of 95.73 GiB, and refused another that needs 95.82.
        """
        return self.capacity is None


def compile_step(config: Config, mesh: jax.sharding.Mesh, options: dict[str, Any] | None = None) -> StepMemory:
    """Compile the train step at the largest batch size of `config` for the devices of `mesh`; return its memory.

    Args:
        config: whose step it is.
        mesh: of devices that need not be there.
        options: of the compiler.

    Raises:
        ValueError: the mesh does not fit the config.
    """
    start = time.perf_counter()
    traced = trace_step(config, mesh)
    try:
        with jax.set_mesh(mesh):
            found = memory_of(traced.lower().compile(options))
    except jax.errors.JaxRuntimeError as error:
        found = refused(error)
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def memory_of(compiled: jax.stages.Compiled) -> StepMemory:
    """Return the memory of a compiled step."""
    found: Any = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    beside = found.output_size_in_bytes - found.alias_size_in_bytes + found.generated_code_size_in_bytes
    on_host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    return StepMemory(
        arguments + beside + temporaries, arguments, temporaries, found.peak_memory_in_bytes, on_host=on_host
    )


def refused(error: Exception) -> StepMemory:
    """Return the memory of a program that the compiler refused as too large; any other refusal goes on."""
    found = TOO_LARGE.search(str(error))
    if not found:
        raise error
    need, unit, capacity, capacity_unit = found.groups()
    need, capacity = float(need) * UNITS[unit], float(capacity) * UNITS[capacity_unit]
    return StepMemory(int(need), None, None, capacity=int(capacity))


def trace_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """Return the traced train step of `config`. Lower it under `jax.set_mesh(mesh)`."""
    inputs = abstract_inputs(config, mesh)
    with jax.set_mesh(mesh):
        step: Any = jit_train_step(config, pretraining(config), mesh)
        return step.trace(*inputs)


def abstract_inputs(config: Config, mesh: jax.sharding.Mesh) -> tuple[Any, dict[str, Any], Rates]:
    """Return state, batch of the largest step, and rates, as shapes, dtypes and shardings."""
    rows, everywhere = (jax.sharding.NamedSharding(mesh, spec) for spec in (P(ROWS, None), P()))
    shape = largest_batch(config), config.data.sequence_length
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in BATCH_DTYPES.items()}
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return beside(config.optimizer, abstract_state(config, mesh)), batch, Rates(scalar, scalar, scalar)
