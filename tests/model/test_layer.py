"""The loop over layers: a stage of a pipeline is a slice of the parameters, and how one attends is a value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.model.attention import expanded
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.layer import Part, run_layers
from deepseek_jax.model.rope import rotary_table
from deepseek_jax.parallel.program import resolve
from deepseek_jax.parameters import Weights
from tests.support import small

pytestmark = pytest.mark.xdist_group("layer")  # one compiled program per way of cutting serves all tests of this file
ROWS, LENGTH = 2, 32


@functools.cache
def config():
    tree = small.config_dict()
    tree.model.update({"width": 32, "num_layers": 5, "num_dense_layers": 2, "num_mtp_layers": 0, "init_std": 0.1})
    return resolve(from_config_dict(tree), "cpu", 1)


@functools.cache
def weights():
    params, bias = transformer.init(config().model, jax.random.key(0))
    return Weights(params, jax.tree.map(lambda b: 0.1 * jax.random.normal(jax.random.key(1), b.shape), bias))


def stage(whole, dense, moe):
    """The layers of one stage; a stack without a layer is absent."""
    params = {"dense_layers": dense, "moe_layers": moe}
    params = {name: layers for name, layers in params.items() if layers.start < layers.stop}
    cut = {name: jax.tree.map(lambda a, at=at: a[at], whole.params[name]) for name, at in params.items()}
    bias = {
        name: jax.tree.map(lambda a, at=at: a[at], whole.router_bias[name])
        for name, at in params.items()
        if name == "moe_layers"
    }
    return Weights(cut, bias)


CUTS = {
    "whole": [(slice(0, 2), slice(0, 3))],
    "between the kinds": [(slice(0, 2), slice(0, 0)), (slice(0, 0), slice(0, 3))],
    "among the experts": [(slice(0, 2), slice(0, 1)), (slice(0, 0), slice(1, 3))],
    "three stages": [(slice(0, 1), slice(0, 0)), (slice(1, 2), slice(0, 2)), (slice(0, 0), slice(2, 3))],
}


@functools.cache
def run(cut, num_parts=1):
    """The residual stream after the stages, what each router reported, and the gradient of the weights."""
    model, execution, loss = config().model, config().execution, config().loss
    batch = {name: array[:ROWS, -LENGTH:] for name, array in small.batch().items()}
    segments_BS = batch["segment_ids_BS"]
    rows = np.split(np.arange(ROWS), num_parts)
    parts = [
        Part(expanded(execution, rotary_table(model, batch["positions_BS"][r]), segments_BS[r]), segments_BS[r] > 0)
        for r in rows
    ]
    observe = functools.partial(router_stats, loss)

    def objective(params):
        whole = weights()._replace(params=params)
        streams, observed = tuple(params["embed_VD"][batch["tokens_BS"][r]] for r in rows), []
        for dense, moe in CUTS[cut]:
            streams, stats = run_layers(model, execution, stage(whole, dense, moe), streams, parts, observe=observe)
            observed += stats
        counts_LE = jnp.concatenate([stats.counts_E for stats in observed])
        x_BSD = jnp.concatenate(streams)
        return jnp.tanh(x_BSD).sum(), (x_BSD, counts_LE)

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, outputs), gradient = run(weights().params)
    return jax.device_get((*outputs, gradient))


STAGES = [("whole", 2), ("three stages", 1), ("between the kinds", 1), ("among the experts", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "num_parts"), STAGES)
def test_stages_one_after_the_other_and_parts_side_by_side_are_the_whole(cut, num_parts):
    x_BSD, counts_LE, gradient = run(cut, num_parts)
    want_BSD, want_LE, want = run("whole")
    np.testing.assert_allclose(x_BSD, want_BSD, rtol=0, atol=2e-6 * np.abs(want_BSD).max())  # fused differently
    np.testing.assert_array_equal(counts_LE, want_LE)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, gradient)
        assert np.linalg.norm(got - leaf) <= 5e-6 * np.linalg.norm(leaf), jax.tree_util.keystr(path)
    assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(want["moe_layers"]))


def test_every_layer_of_a_stage_runs():
    """Each router of the whole counts every token, and a stage without experts reports none and is not the identity."""
    x_BSD, counts_LE, _ = run("whole")
    assert counts_LE.shape == (3, config().model.num_experts)
    assert counts_LE.sum(-1).tolist() == [int((small.batch()["segment_ids_BS"][:ROWS, -LENGTH:] > 0).sum()) * 4] * 3
    attend = expanded(config().execution, rotary_table(config().model, np.arange(8)[None]), None)
    part, weights_of_stage = Part(attend, np.ones((1, 8), bool)), stage(weights(), slice(0, 2), slice(0, 0))
    (y_BSD,), stats = run_layers(config().model, config().execution, weights_of_stage, (x_BSD[:1, :8],), [part])
    assert stats == [] and y_BSD.shape == (1, 8, 32) and not np.array_equal(y_BSD, x_BSD[:1, :8])
