"""What a program is told of its platform: which compiler options, and which precision of its products."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.parallel import program
from tests.support import small

WITHOUT_MOTION = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}


@pytest.mark.parametrize(
    ("platform", "precision", "options"),
    [
        ("cpu", "fp32", None),
        ("gpu", "bf16", None),
        ("gpu", "fp32", {"xla_gpu_enable_triton_gemm": False}),
        ("tpu", "fp32", WITHOUT_MOTION),
        ("tpu", "bf16", WITHOUT_MOTION),  # with it V3's step needs more of a device, and 8 GB to compile
    ],
)
def test_a_program_has_the_options_of_its_platform(monkeypatch, platform, precision, options):
    told = {}
    monkeypatch.setattr(program.jax, "jit", lambda run, **settings: told.update(settings))
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    execution = dataclasses.replace(small.config().execution, precision=precision)
    program.jit_on.__wrapped__(print, execution, mesh)
    assert told["compiler_options"] == options
