"""Losses and the gradient of every weight against torch autograd in float64, through the losses the trainer uses.

The objective is the main cross entropy plus MTP_WEIGHT times the mean MTP loss over two depths, divided by the main
loss's token count. Biases of both signs are in place, so a gradient that leaked through the selection, or gates taken
from biased scores, would show.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.head import cross_entropy
from deepseek_jax.training.objective import mtp_targets
from tests.golden import hf_checkpoint
from tests.support.network import apply

pytestmark = pytest.mark.xdist_group("golden_gradients")  # what one worker compiled, its other tests use

MTP_WEIGHT = json.loads((hf_checkpoint.FOLDER / "versions.json").read_text())["mtp_weight"]
LOSS_RTOL = 1e-6
GRADIENT_RTOL = 6e-6  # of each leaf (layers stacked), in norm: five times the largest measured
REMATS = ("selective", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("none", "full")))


def training_losses(config, params, router_bias, batch):
    """Return (objective, (main loss, MTP loss per depth, counts)), losses in nats per token."""
    output = apply(config, params, router_bias, batch)

    def loss(hidden_BSD, targets_BS, weights_BS):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        chunk = config.execution.loss_chunk
        return (
            cross_entropy(hidden_TD, params["head_DV"], targets_BS.ravel(), weights_BS.ravel(), chunk, 0.0)[0]
            / targets_BS.size
        )

    main = loss(output.hidden_BSD, batch["targets_BS"], batch["loss_weights_BS"])
    mtp = [loss(hidden_BSD, *mtp_targets(batch, depth)) for depth, hidden_BSD in enumerate(output.mtp_hidden, start=1)]
    return main + MTP_WEIGHT * sum(mtp) / len(mtp), (main, jnp.stack(mtp), output.observed.counts_E)


@functools.cache
def differentiate(remat):
    """Return the golden, auxiliary values, and gradients of parameters and biases, under one recomputation policy."""
    golden = hf_checkpoint.read("base")
    config = golden.config.with_(execution={"remat": remat})
    function = jax.value_and_grad(functools.partial(training_losses, config), argnums=(0, 1), has_aux=True)
    objective = jax.jit(function)
    (_, parts), gradients = objective(golden.params, golden.router_bias, hf_checkpoint.batch(golden.expected))
    return golden, parts, gradients


@pytest.mark.parametrize("remat", REMATS)
def test_losses_and_counts(remat):
    golden, (main, mtp, counts_LE), _ = differentiate(remat)
    np.testing.assert_allclose(main, golden.expected["loss"], rtol=LOSS_RTOL)
    np.testing.assert_allclose(mtp, golden.expected["mtp_loss_K"], rtol=LOSS_RTOL)
    chosen_LTKE = golden.expected["experts_LTK"][..., None] == np.arange(golden.config.model.num_experts)
    np.testing.assert_array_equal(counts_LE, chosen_LTKE.sum((1, 2)))


@pytest.mark.parametrize("remat", REMATS)
def test_gradient_of_every_weight(remat):
    golden, _, (gradients, _) = differentiate(remat)
    expected = hf_checkpoint.read_gradients("base", golden.config.model)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        name, norm = jax.tree_util.keystr(path), np.linalg.norm(theirs)
        assert norm > 1e-4, f"{name}: a golden of zeros shows nothing"
        assert np.linalg.norm(ours - theirs) < GRADIENT_RTOL * norm, name


def test_selection_bias_has_no_gradient():
    _, _, (_, bias_gradients) = differentiate("selective")
    assert not any(leaf.any() for leaf in jax.tree.leaves(bias_gradients))
