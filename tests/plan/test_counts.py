"""The size of a run, against counts that share no code with it."""

import functools
import importlib
import math

import jax
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import EXPERTS, PARAMETERS, leaf_name
from deepseek_jax.plan import counts
from deepseek_jax.plan.meshes import fit_as_written
from deepseek_jax.training.flops import flops_per_token
from deepseek_jax.training.optimizer import batch_size
from deepseek_jax.training.state import abstract_state
from tests.support import small


@functools.cache
def planned(name):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    state = counts.state_of(config)
    return config, state, counts.count(config, state)


def test_size_of_v3():
    """Published: 671B and 37B active; spec section 1.3 to the million, without the 58 x 256 router biases."""
    config, _, found = planned("deepseek_v3")
    assert found.parameters - found.mtp_parameters == pytest.approx(671.026e9, abs=0.5e6)
    assert found.mtp_parameters == pytest.approx(11.610e9, abs=0.5e6)
    assert found.active == pytest.approx(37.552e9, abs=0.5e6)
    assert found.flops_per_token == flops_per_token(config.model, 4096, causal=True, mtp=True)
    assert (found.batch_size, found.tokens_per_step, found.tokens) == (15360, 15360 * 4096, 14_800_000_000_000)


@pytest.mark.parametrize("ramp", [((1.0, 8),), ((0.1, 8), (0.35, 16), (1.0, 24)), ((0.001, 8), (0.002, 800), (1.0, 8))])
def test_steps_are_those_of_the_loop(ramp):
    """A piece may be shorter than a step of the piece before it."""
    tree = tiny.get_config()
    tree.training.batch_size = tuple(("constant", until, size) for until, size in ramp)
    config = from_config_dict(tree)
    seen = steps = 0
    while seen < config.training.num_tokens:
        seen, steps = seen + batch_size(config, seen) * config.data.sequence_length, steps + 1
    assert counts.num_steps(config) == steps


RUNS = [("fp32", "layer"), ("bf16", "step"), ("fp8", "layer"), ("fp8", "step"), ("fp8", "kept"), ("bf16", "kept")]


@pytest.mark.parametrize(("precision", "gather"), RUNS)
def test_bytes_of_a_device(precision, gather):
    tree = small.fp8_config_dict() if precision == "fp8" else small.config_dict()
    tree.mesh.update({"data": 2, "node": 1, "expert": 4})
    tree.optimizer.ema_decay = 0.9
    tree.execution.update({"precision": precision, "gather": gather, "remat": "selective"})
    config = from_config_dict(tree)
    held = counts.bytes_per_device(config, counts.state_of(config), fit_as_written(config, 8).mesh)
    state = abstract_state(config, make_mesh(config.mesh))  # on eight devices that are there

    def local(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert held["weights"] == local((state["params"], state["router_bias"]))
    assert held["moments"] == local(state["optimizer"])
    assert held["average"] == local(state["ema"])
    on_host = config.with_(optimizer={"ema_memory": "host"}, execution={"remat": "offload"})
    mesh = fit_as_written(config, 8).mesh
    assert "average" not in counts.bytes_per_device(on_host, counts.state_of(on_host), mesh)
    tokens = config.training.micro_batch_size * config.data.sequence_length // 8
    row = (4 if precision == "fp32" else 2) * config.model.width
    inputs = (config.model.num_layers + config.model.num_mtp_layers) * tokens * row
    want = {"average": held["average"], "layer inputs": inputs}
    assert counts.host_bytes_per_device(on_host, counts.state_of(on_host), mesh) == want
    in_use, copies = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        row = PARAMETERS[leaf_name(path)]
        whole = leaf.size // (4 if EXPERTS in row.layout else 1)
        is_fp8 = precision == "fp8" and row.precision == "fp8"
        size = 1 if is_fp8 else 4 if row.precision == "fp32" or precision == "fp32" else 2
        in_use += whole
        if gather == "step":
            copies += size * whole
        else:
            gathered = gather == "kept" and len(path) > 1 and 4 * whole > local(leaf)  # of a layer
            copies += (local(leaf) // 4 if is_fp8 else 0) + (size * whole if gathered else 0)
    assert held["gradients"] == (4 * in_use if gather == "step" else local(state["params"]))
    assert held.get("copies", 0) == copies


def test_one_device_in_fp32_keeps_no_copies():
    config, state, found = planned("tiny")
    held = counts.bytes_per_device(config, state, fit_as_written(config, 1).mesh)
    assert set(held) == {"weights", "moments", "gradients"}
    assert sum(held.values()) == pytest.approx(12 * found.parameters, rel=1e-4)  # biases and counters besides


def test_the_update_of_an_average_on_the_host_may_need_more_than_the_step():
    """Weights and moments are 8 bytes a parameter, the average that comes and the one that goes are 8 more."""
    config = small.config().with_(optimizer={"ema_decay": 0.9})
    state, mesh = counts.state_of(config), fit_as_written(config, 1).mesh
    assert counts.update_bytes(config, state, mesh) == 0
    on_host = config.with_(optimizer={"ema_memory": "host"})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    beside = counts.local_bytes(counts.laid_out(state["router_bias"], mesh), mesh) + 4  # and the optimizer's counter
    update = counts.update_bytes(on_host, state, mesh)
    moments = counts.bytes_per_device(config, state, mesh)["moments"] - 4
    assert update == (4 + 8) * parameters + moments + beside
