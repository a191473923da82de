"""One MoE layer by itself: every weight and input has a gradient; the command
`experiments.benchmarks.layer_benchmark` and its records.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.program import resolve
from experiments.benchmarks.layer import PROFILED, Load, flops, make_inputs, make_step, make_weights, yardstick
from tests.experiments.benchmarks import command

SMALL = {"width": 128, "num_heads": 1, "query_latent": 128, "kv_latent": 128, "expert_hidden": 128, "num_experts": 16}
LOAD = Load(tokens=128, rows=100, local_experts=2)


def make_config(model):
    tree = deepseek_v3.get_config()
    tree.model.update(model)
    tree.execution.precision = "fp8"
    return resolve(from_config_dict(tree), "cpu", expert_devices=1)


@pytest.mark.slow
def test_every_weight_and_input_has_a_gradient():
    config = make_config(SMALL)
    arguments = *make_weights(config, LOAD), *make_inputs(config, LOAD)
    outputs, (weights, inputs) = jax.jit(make_step(config, LOAD))(*arguments)
    shapes = jax.tree.map(jnp.shape, (arguments[0], arguments[2], arguments[3]))
    assert jax.tree.map(jnp.shape, (weights, inputs, outputs)) == shapes
    assert len(jax.tree.leaves(weights)) == 14 and {g.dtype for g in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    for path, gradient in jax.tree_util.tree_leaves_with_path((weights, inputs)):
        gradient = np.asarray(gradient, np.float32)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
    per_expert = [np.abs(weights[name]).max(axis=(1, 2)) for name in ("gate_up_ED2F", "down_EFD")]
    assert all((largest > 0).all() for largest in per_expert), "an expert without rows"


def test_the_profiled_layer_and_its_arithmetic():
    """6 x 4,096 tokens x (187.1M of attention, 44.0M shared, 1.8M router), 6 x 8,192 rows x 4 x 44.0M, and 128 heads'
    causal pairs.
    """
    config = make_config({})
    weights, quantized = jax.eval_shape(lambda: make_weights(config, PROFILED))
    assert flops(config, PROFILED, weights) == pytest.approx(16.45e12, rel=1e-3)
    assert len(jax.tree.leaves(quantized)) == 2 * 9  # values and scales of all matrices but the router's
    assert yardstick(config, PROFILED)["value"] == 20.0
    assert (
        yardstick(config, dataclasses.replace(PROFILED, rows=4096)) is None
        and yardstick(make_config(SMALL), PROFILED) is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 200}, "tokens = 200 must be a multiple of 128"), ({"rows": 0}, "rows = 0 must be positive")],
)
def test_impossible_loads_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LOAD, **change)


@pytest.mark.slow
def test_records_of_a_small_layer(tmp_path):
    results = tmp_path / "results" / "layer.json"
    sizes = [f"--{name}={value}" for name, value in dataclasses.asdict(LOAD).items()]
    arguments = [*(f"--config.model.{name}={value}" for name, value in SMALL.items()), *sizes]
    records, printed = command.run("experiments.benchmarks.layer_benchmark", arguments, results)
    assert all(record["shape"] == dataclasses.asdict(LOAD) and record["precision"] == "fp8" for record in records)
    values = {record["mode"]: record["value"] for record in records}
    assert records[0]["mode"] == "layer, median" and records[0]["yardstick"] is None
    assert values["layer, fastest"] <= values["layer, median"]
    assert values["results not finite"] == 0
    scopes = {
        mode: value for mode, value in values.items() if mode.startswith("time in ") and mode != "time in kernels"
    }
    assert values["time in kernels"] == pytest.approx(sum(scopes.values()))
    assert {"time in attention", "time in experts", "time in ffn", "time in route"} <= set(scopes)
    assert "remat selective" in printed and "recomputed" in printed and " x  " in printed
