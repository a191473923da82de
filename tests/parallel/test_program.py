"""What a program is told of its platform: which compiler options, and which precision of its products."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.parallel import program
from tests.support import small

MOTION = "while-loop-all-reduce-code-motion"


@pytest.mark.parametrize(
    ("platform", "precision", "trains", "options"),
    [
        ("cpu", "fp32", True, None),
        ("gpu", "bf16", True, None),
        ("gpu", "fp32", True, {"xla_gpu_enable_triton_gemm": False}),
        ("tpu", "fp32", True, {"xla_disable_hlo_passes": MOTION}),
        ("tpu", "bf16", True, {"xla_disable_hlo_passes": MOTION}),  # with it compiling V3's step takes 8 GB
        ("tpu", "bf16", False, None),  # an evaluation, serving
    ],
)
def test_a_program_has_the_options_of_its_platform(monkeypatch, platform, precision, trains, options):
    assert told_options(monkeypatch, platform, precision, trains) == options


@pytest.mark.parametrize(("flag", "disabled"), [("", MOTION), ("a, b", f"a,b,{MOTION}"), (MOTION, MOTION)])
def test_passes_that_a_user_disables_stay_disabled(monkeypatch, flag, disabled):
    """An option of a program takes the place of what XLA_FLAGS says."""
    debug = SimpleNamespace(xla_disable_hlo_passes=flag)
    parsed = SimpleNamespace(executable_build_options=SimpleNamespace(debug_options=debug))
    monkeypatch.setattr(program.xla_client, "CompileOptions", lambda: parsed)
    assert told_options(monkeypatch, "tpu", "bf16", trains=True) == {"xla_disable_hlo_passes": disabled}


def told_options(monkeypatch, platform, precision, trains):
    """Return the compiler options of a program for a device that need not be there."""
    told = {}
    monkeypatch.setattr(program.jax, "jit", lambda run, **settings: told.update(settings))
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    execution = dataclasses.replace(small.config().execution, precision=precision)
    program.jit_on.__wrapped__(print, execution, mesh, trains=trains)
    return told["compiler_options"]
