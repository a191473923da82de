"""Kernels for Hopper in the interpreter of their machine."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

# The scales of A are read by ordinary loads and overwritten by the copy engine. The detector wants a proxy fence
# between the two, as for writes; a read that has returned needs none, the barrier orders it (PTX ISA, "async proxy";
# CUTLASS has none there either).
SCALE_READS = {("receive", "fill"), ("scale", "fill")}
# Sums that a block reads of another one behind a mark, which is PTX and not there in the interpreter.
MARKED_READS = {("add_part", "leave")}


@pytest.fixture
def card():
    """Skip where there is none; asked for here, because a module that is collected must not start JAX."""
    if not dispatch.on_hopper():
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def on_hopper():
    """Return `run(function, *args, **kwargs)`, which calls a function in the GPU interpreter and fails on a race."""

    def run(function, *args, **kwargs):
        try:
            with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
                result = jax.block_until_ready(function(*args, **kwargs))
            assert not gpu_callbacks.get_races().races_found
        finally:
            gpu_callbacks.reset_gpu_interpret_mode_state()
        return result

    return run


@pytest.fixture
def races(capfd, caplog):
    """Return a function that says which races were reported since the test began: printed by jax 0.11, logged from 0.12
    on.
    """
    return lambda: "".join([*capfd.readouterr(), caplog.text]).split("RACE DETECTED")[1:]


@pytest.fixture
def interpret(races):
    """Return `run(function, *operands)`, which runs in the interpreter and fails on any race but the known ones.

    The interpreter multiplies in FP32, so what a tensor core's short accumulator does is not seen; order, edges, groups
    and barriers are. Kernels are tuned with `interpreted=True`.
    """

    def run(function, *operands):
        fields = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
        quiet = {"on_race": "warn"} if "on_race" in fields else {}  # jax 0.12 would stop at the first
        interpreter = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **quiet))
        with interpreter:
            result = jax.block_until_ready(jax.jit(function)(*operands))
        for race in races():
            reads, writes = (re.findall(rf"{kind} of .*? \((\S*)\)", race) for kind in ("read", "write"))
            assert len(reads) == 1, race
            names = tuple(accesses[0].split(".")[-1] for accesses in (reads, writes))
            assert names in SCALE_READS | MARKED_READS, race
        return np.asarray(result, np.float64)

    return run
