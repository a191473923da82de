"""A whole step in FP8: every mesh agrees with one device, it learns, and what is not finite is seen."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import create_state, weights_of
from tests.support import small

ONE, EIGHT = (1, 1, 1), (2, 1, 4)
# Rounding to BF16 differs by mesh (a token's partial sums are rounded on every device that has an expert for it), and
# flips E4M3's roundings, and routes whose scores are near ties. Measured on four batches: 8.3e-5 in the loss, and in
# gradients 0.101 (norms of the difference over that of the gradient), the median of all leaves 0.07. With sums in FP32
# on the wire, twice the bytes, these are 0.075 and 0.04.
LOSS, GRADIENT = 2e-4, 0.12


def arrays(seed=0):
    return small.put(small.batch(seed, length=128))


def take(sizes, seed=0, state=None):
    on = small.on_mesh(sizes, fp8=True)
    with jax.set_mesh(on.mesh):
        return jax.device_get(on.step(on.state if state is None else state, arrays(seed), small.RATES))


@pytest.mark.slow
@pytest.mark.xdist_group("mesh-2x1x4-fp8")
def test_a_mesh_equals_one_device():
    grads, _, _, _, metrics = take(EIGHT)
    want_grads, _, _, _, want = take(ONE)
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=LOSS)
    for path, got in jax.tree_util.tree_leaves_with_path(grads):
        expected = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, want_grads)
        assert np.linalg.norm(got - expected) <= GRADIENT * np.linalg.norm(expected), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.xdist_group("mesh-2x1x4-fp8")
def test_it_learns():
    on = small.on_mesh(ONE, fp8=True)
    losses = []
    with jax.set_mesh(on.mesh):
        state = on.state
        for i in range(16):
            *_, state, metrics = on.step(state, arrays(i % 4), small.RATES)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.xdist_group("mesh-2x1x4-fp8")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_seen(bad):
    """Not stored as 448: the loss says so, and the step changes nothing."""
    on = small.on_mesh(ONE, fp8=True)
    with jax.set_mesh(on.mesh):
        weight = on.state["params"]["moe_layers"]["moe"]["shared"]["gate_up_D2F"]
        poisoned = np.array(weight)
        poisoned[1, 3, 0, 5] = bad
        poisoned = jax.device_put(poisoned, weight.sharding)
        state = on.state | {"params": jax.tree.map(lambda w: poisoned if w is weight else w, on.state["params"])}
    *_, after, metrics = take(ONE, state=state)
    assert np.isnan(metrics["loss"]) and metrics["nonfinite"] > 0 and after["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after["params"], jax.device_get(state["params"]))


def assert_fp32(grads):
    """Require the bits of FP32: of numbers that were once BF16 the lower half is zero."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == np.float32
        # An embedding's gradient is a sum of few residual streams, which are BF16.
        if path[-1].key != "embed_VD":
            assert np.mean(leaf.view(np.uint32) & 0xFFFF == 0) < 0.01, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.xdist_group("mesh-2x1x4-fp8")
def test_every_gradient_is_fp32():
    assert_fp32(take(ONE)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("gather", "sizes"), [("step", ONE), ("layer", (2, 1, 2))])
def test_every_gradient_is_fp32_in_bf16(gather, sizes):
    """One micro-batch, so that no sum over several hides a rounding; MTP's merge included."""
    config = small.config(sizes).with_(
        model={"num_layers": 2},
        training={"micro_batch_size": 16},
        execution={"precision": "bf16", "gather": gather, "remat": "selective"},
    )
    mesh = make_mesh(config.mesh, jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(step_lib.gradients, step_lib.recipe_of(config, pretraining(config), mesh)))
        assert_fp32(jax.device_get(run(weights_of(create_state(config)), small.put(small.batch()), small.RATES)[0]))


@pytest.mark.slow
def test_kept_weights_give_the_bits_of_weights_gathered_twice():
    """On (data 2, expert 2), two layers, with and without experts. BF16 is equal in every bit, too."""

    def run(gather):
        config = small.config((2, 1, 2), fp8=True).with_(
            model={"num_layers": 2, "num_dense_layers": 1},
            training={"micro_batch_size": 16},
            execution={"gather": gather, "remat": "selective", "scan_unroll": 2},
        )
        mesh = make_mesh(config.mesh, jax.devices()[:4])
        with jax.set_mesh(mesh):
            step = functools.partial(step_lib.gradients, step_lib.recipe_of(config, pretraining(config), mesh))
            inputs = weights_of(create_state(config)), arrays(), small.RATES
            compiled = jax.jit(step).lower(*inputs).compile()
            grads, sums, _ = jax.device_get(compiled(*inputs))
            return grads, sums.terms.loss

    jax.tree.map(np.testing.assert_array_equal, run("kept"), run("layer"))
