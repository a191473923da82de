"""Kernels for Hopper in the interpreter of their machine."""

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


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
