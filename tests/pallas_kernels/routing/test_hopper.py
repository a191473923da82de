"""The routing kernel in the interpreter of their machine, where products are plain."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.routing import hopper, hopper_product, reference
from pallas_kernels.routing.rule import Rule
from tests.pallas_kernels.routing import cases

GROUPED = Rule(8, num_groups=8, num_kept_groups=4, scale=2.5)


@pytest.fixture
def run(races):
    """Return `run(operands, rule, num_experts)`, which fails on a race."""

    def run(operands, rule, num_experts):
        fields = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
        quiet: dict[str, Any] = {"on_race": "warn"} if "on_race" in fields else {}
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **quiet)):
            jitted = jax.jit(lambda *args: hopper.route(*args, rule=rule, num_experts=num_experts, interpreted=True))
            found = jax.block_until_ready(jitted(*operands))
        assert not races()
        return found

    return run


def compare(run, operands, rule, num_experts):
    want = reference.route(*operands, rule=rule, num_experts=num_experts)
    cases.check(run(operands, rule, num_experts), want, operands, rule, num_experts)


def test_groups_and_ties(run):
    """Two cuts, padding, an expert that everybody has; equal experts and equal groups."""
    compare(run, cases.make(3, 128, 64, tied=True), GROUPED, 65)


@pytest.mark.slow
def test_rows_in_blocks_of_their_own(run, monkeypatch):
    """Two blocks of rows, and two cuts of each."""
    for module in (hopper, hopper_product):
        monkeypatch.setattr(module, "MOST_ROWS", 8)
    compare(run, cases.make(11, 128, 64), GROUPED, 65)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize(
    ("rule", "num_routed", "num_experts"),
    [
        (Rule(6, gate="softmax", normalize=False), 64, 66),
        (Rule(6, num_groups=8, num_kept_groups=3, group_score="max", gate="softmax", scale=16.0), 128, 128),
        (GROUPED, 256, 257),
    ],
    ids=["V2-Lite", "V2", "V3"],
)
def test_other_rules(run, rule, num_routed, num_experts, num_tokens):
    compare(run, cases.make(num_tokens, 256, num_routed), rule, num_experts)


@pytest.mark.slow
def test_a_token_that_is_nan_spoils_itself_only(run):
    h, *rest = cases.make(4, 64, 64)
    operands = h.at[2].set(jax.numpy.nan), *rest
    found, want = run(operands, GROUPED, 65), run((h, *rest), GROUPED, 65)
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(found.experts[others], want.experts[others])
    np.testing.assert_array_equal(found.gates[others], want.gates[others])
    assert (np.asarray(found.experts[2]) <= 64).all() and (np.asarray(found.experts[2]) >= 0).all()
