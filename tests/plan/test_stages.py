"""A pipeline's time is that of its table, and what crosses `pipe` is in the program."""

import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.collectives import PERMUTE, sent_bytes
from deepseek_jax.parallel.stages import program_of
from deepseek_jax.pipeline.simulation import Durations, run
from deepseek_jax.plan import estimate, stages, ticks, traffic
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import IN_GRADIENT, bytes_per_device, state_of
from deepseek_jax.plan.liveness import gradient_bytes
from deepseek_jax.plan.meshes import as_fit, require_fit
from tests.support import small

FORWARD, INPUTS, WEIGHTS = 1.0, 1.25, 0.5


def makespan(name, weights=WEIGHTS):
    """Of equal stages, with four devices and eight micro-batches."""
    program = program_of(name, 4, 8)
    equal = (np.full(program.table.placement.num_stages, time) for time in (FORWARD, INPUTS, weights))
    return ticks.makespan(program, ticks.cell_times(program, *equal))


def simulated(name, weights):
    return run(program_of(name, 4, 8).table, Durations(FORWARD, INPUTS, weights), in_step=True).makespan


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_equal_stages_take_what_the_simulator_says(name):
    assert makespan(name) == pytest.approx(simulated(name, WEIGHTS))


def test_a_weight_pass_apart_costs_a_pass_of_inputs_more():
    assert makespan("zb1p") == pytest.approx(simulated("zb1p", WEIGHTS + INPUTS))
    for name in ("dualpipe", "dualpipev"):
        assert simulated(name, WEIGHTS) < makespan(name) < simulated(name, WEIGHTS + INPUTS)


def test_a_slower_stage_makes_all_devices_wait():
    program = program_of("gpipe", 4, 8)
    times = [np.ones(4) for _ in range(3)]
    equal = ticks.makespan(program, ticks.cell_times(program, *times))
    assert ticks.idle_share(program, ticks.of_equal_stages(program)) == pytest.approx(3 / 11)  # (P - 1) / (M + P - 1)
    times[0][2] = 2.0
    assert equal + 8 <= ticks.makespan(program, ticks.cell_times(program, *times)) <= 2 * equal


def fit_of(**execution):
    tree = small.config_dict()
    tree.mesh.update({"pipe": 2, "data": 1, "node": 1, "expert": 2})
    tree.training.update({"micro_batch_size": 4, "batch_size": (("constant", 1.0, 16),)})
    tree.execution.update({"precision": "bf16"} | execution)
    return require_fit(from_config_dict(tree), 4)


@pytest.mark.slow
def test_what_crosses_pipe_once_a_step_is_in_the_program():
    """All-to-alls and gathers of FP32 weights, outside of any branch; gains, which are summed whole, are left out.
    Activations go to neighbours in every tick.
    """
    fit = fit_of(schedule="dualpipev")
    crossing = [c for c in traffic.trace(fit.config, fit.mesh) if c.axes == ("pipe",)]
    once = [c for c in crossing if not c.loops]
    sent = sum(sent_bytes(c, dict(fit.mesh.shape))["pipe"] * c.times for c in once)
    planned = {s.kind: s.bytes for s in stages.sent_of(fit.config, fit.mesh, None, CHIPS["h200"]) if s.axis == "pipe"}
    assert planned["weights"] + planned["gradients"] == pytest.approx(sent, rel=0.02)
    ticks = [sent_bytes(c, dict(fit.mesh.shape))["pipe"] * c.times for c in crossing if c.kind == PERMUTE]
    assert planned["activations"] == sum(ticks)


def test_the_ends_of_a_chain_send_one_way():
    """Of two devices in gpipe the first sends activations, the second gradients, each in every tick."""
    fit = fit_of(schedule="gpipe")
    sent = stages.sent_of(fit.config, fit.mesh, None, CHIPS["h200"])
    row = 4 // 2 * 64 * fit.config.model.width * 2  # two sequences of 64 tokens in BF16
    ticks = program_of("gpipe", 2, 4).table.num_ticks
    assert [s.bytes for s in sent if (s.axis, s.kind) == ("pipe", "activations")] == [ticks * row]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "close"), [("1f1b", 0.01), ("dualpipev", 0.065)])
def test_the_estimate_of_a_search_is_near_the_traced_program(schedule, close):
    """Less than 1% off, and 6.1% too much; the second sum of gradients alone is 14 and 17%."""
    fit = fit_of(schedule=schedule, remat="full")
    state = state_of(fit.config)
    memory = estimate.Memory(state, lambda text: None)
    held = bytes_per_device(fit.config, state, fit.mesh)
    traced = gradient_bytes(fit.config, fit.mesh) + sum(v for k, v in held.items() if k not in IN_GRADIENT)
    assert memory.of(fit) == pytest.approx(traced, rel=close)


def test_longer_steps_wait_a_smaller_share():
    """The bubble of filling and draining stays; what the slower stage makes the other wait grows."""
    few, many = (
        as_fit(fit_of(schedule="gpipe").config, 4, {"training.batch_size": (("constant", 1.0, n),)}) for n in (16, 64)
    )
    times = [stages.time_of(fit.config, fit.mesh, None, CHIPS["h200"]) for fit in (few, many)]
    assert times[0].idle < times[1].idle < 3 * times[0].idle
    assert times[1].forward == pytest.approx(4 * times[0].forward)
