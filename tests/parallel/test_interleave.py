"""Two parts of a micro-batch side by side are the step in plain order: loss, each gradient, counts, norm and biases."""

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import check_fit, make_mesh
from tests.support import small

ONE = small.MESHES[0]
CASES = [
    pytest.param(
        sizes,
        fp8,
        id=f"{small.mesh_name(sizes)}{'-fp8' * fp8}",
        marks=[pytest.mark.xdist_group(small.mesh_name(sizes)), pytest.mark.slow],  # quick: `tests/model/test_layer.py`
    )
    for sizes, fp8 in ((ONE, True),)  # other meshes: `tests/training/test_equal_steps.py`
]


def run(sizes, fp8, interleave, steps):
    """Take `steps` steps; return what the first gave, and the losses of all."""
    on, losses, first = small.on_mesh(sizes, fp8, interleave), [], None
    length = on.config.data.sequence_length
    with jax.set_mesh(on.mesh):
        state = on.state
        for i in range(steps):
            batch = small.put(small.batch(i, length=length))
            grads, sums, _, state, metrics = on.step(state, batch, small.RATES)
            first = first or jax.device_get((grads, sums.router.counts_E, metrics, state["router_bias"]))
            losses.append(float(metrics["loss"]))
    return first, losses


@pytest.mark.parametrize(("sizes", "fp8"), CASES)
def test_parts_side_by_side_are_the_plain_order(sizes, fp8):
    """MTP (FP32), packing, padding; a micro-batch of 16 rows in two parts against two micro-batches of 8 rows."""
    (grads, counts_LE, metrics, bias), losses = run(sizes, fp8, 2, 3)
    (want_grads, want_LE, want_metrics, want_bias), want_losses = run(ONE, fp8, 1, 3)
    np.testing.assert_allclose(losses[0], want_losses[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses, want_losses, rtol=0, atol=5e-4)  # near-tied routes may flip after a step
    for name in ("mtp_loss", "balance_loss", "grad_norm"):
        if name in want_metrics:
            np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(counts_LE, want_LE)
    jax.tree.map(np.testing.assert_array_equal, bias, want_bias)
    for path, got in jax.tree_util.tree_leaves_with_path(grads):
        want = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, want_grads)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), jax.tree_util.keystr(path)


def test_a_part_of_a_row_is_refused():
    config = small.config((1, 1, 8)).with_(execution={"interleave": 2})
    with pytest.raises(ValueError, match=r"interleave = 2 does not divide the 1 rows .* nearest that can be is 16"):
        check_fit(config, make_mesh(config.mesh, jax.devices()))
