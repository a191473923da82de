"""The whole step is the same on every mesh, by every transport, and however the batch is cut into micro-batches.

Loss, every gradient, norms, counts and biases equal those of one device with one micro-batch, after one step and after
three. The model is a small one with a router in its layer and one in its MTP layer; the batch is packed and padded, and
no two devices or micro-batches have as many tokens. The full model of the tests is in `tests.parallel.test_meshes`.
"""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import Weights
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.state import abstract_state, create_state
from tests.support import small

pytestmark = pytest.mark.xdist_group("equal_steps")

ROWS, LENGTH, VOCAB = 16, 32, 128
ONE = (1, 1, 1)
STEPS = 3
# Dims that eight devices do not divide. On 2x2x2 they lie in four, two and one parts; of twelve experts 27 wide, two
# devices store the same three.
UNEVEN = ("width", 28), ("query_latent", 18), ("kv_latent", 15), ("vocab_size", 100), ("num_mtp_layers", 0)
UNEVEN_EXPERTS = ("width", 27), ("query_latent", 18), ("kv_latent", 15), ("num_experts", 12)


def config(sizes: small.Sizes, num_cuts: int, exchange: str, remat: str, interleave: int, dims=()):
    """One MoE layer and one MTP layer; a balance loss that is not lost in rounding."""
    return small.config(sizes).with_(
        model={"num_layers": 1, "num_dense_layers": 0, "width": 32, "vocab_size": VOCAB} | dict(dims),
        data={"sequence_length": LENGTH},
        loss={"sequence_balance_weight": 0.01},
        training={"micro_batch_size": ROWS // num_cuts},
        execution={"exchange": exchange, "remat": remat, "interleave": interleave},
    )


def batch(seed: int, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """Two documents in most rows; row i ends with (5 i) mod 29 places of padding, row 7 and half of row 9 count not."""
    arrays = small.batch(seed, rows=ROWS, length=LENGTH, vocab=vocab)
    valid_BS = np.arange(LENGTH) < LENGTH - (5 * np.arange(ROWS)[:, None]) % 29
    segments = np.where(np.arange(LENGTH) < 20, 1, 2) * valid_BS
    segments[7] = 0
    weights = (segments > 0).astype(np.float32)
    weights[:, 19] = 0.0
    weights[9, :8] = 0.0
    return arrays | {"segment_ids_BS": segments.astype(np.int32), "loss_weights_BS": weights}


@functools.cache
def initial_state(dims=()):
    """The initial state on the host."""
    mesh = make_mesh(small.config(ONE).mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(create_state(config(ONE, 1, "auto", "none", 1, dims)))


@functools.cache
def run(
    sizes: small.Sizes,
    num_cuts: int,
    exchange: str = "auto",
    remat: str = "none",
    interleave: int = 1,
    dims=(),
    **changes,
):
    """Take three steps; return (gradients, sums, state, metrics) of the first and of the last."""
    cfg = config(sizes, num_cuts, exchange, remat, interleave, dims).with_(execution=changes)
    mesh = make_mesh(cfg.mesh, jax.devices()[: np.prod(sizes)])
    recipe = step_lib.recipe_of(cfg, pretraining(cfg), mesh)

    def step(state, arrays, rates):
        weights = Weights(state["params"], state["router_bias"])
        grads, sums, norms = step_lib.gradients(recipe, weights, arrays, rates)
        return grads, sums, *step_lib.update(recipe, state, grads, sums, norms, rates)

    taken = []
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
        state = jax.device_put(initial_state(dims), shardings)
        compiled = jax.jit(step).lower(state, small.put(batch(0, cfg.model.vocab_size)), small.RATES).compile()
        for i in range(STEPS):
            taken.append(compiled(state, small.put(batch(i, cfg.model.vocab_size)), small.RATES))
            state = taken[-1][2]
        return jax.device_get((taken[0], taken[-1]))


def assert_equal_steps(got, want, tolerance):
    """Counts and biases exactly, sums in FP32 up to the order of their terms."""
    grads, sums, state, metrics = got
    want_grads, want_sums, want_state, want_metrics = want
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "update_norm", "param_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(sums.router.counts_E, want_sums.router.counts_E)
    jax.tree.map(np.testing.assert_array_equal, state["router_bias"], want_state["router_bias"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(want_grads):
        other = jax.tree_util.tree_reduce(lambda tree, entry: tree[entry.key], path, grads)
        assert np.linalg.norm(leaf) > 0, jax.tree_util.keystr(path)
        assert np.linalg.norm(other - leaf) <= tolerance * np.linalg.norm(leaf), jax.tree_util.keystr(path)


RECOMPUTED = ((1, 2, 4), 2, "two_hop", "full")
CUTS = [((1, 1, 1), 2), ((1, 1, 1), 4), ((2, 1, 1), 2), ((4, 1, 1), 4)]  # one cut on many devices: below
TRANSPORTS = [  # two hops on (2, 2, 2), one on (2, 1, 4): tests.parallel.test_meshes
    ((1, 1, 8), 1, "dense"),
    ((1, 2, 4), 1, "dense"),
    RECOMPUTED,
    ((2, 2, 2), 2, "dense"),
    ((1, 4, 2), 1, "two_hop"),
    ((1, 4, 2), 1, "dense", "selective", 2),  # two parts side by side
    ((1, 2, 4), 1, "two_hop", "none", 2),
]
CELLS = [pytest.param(cell, id=" ".join(map(str, (small.mesh_name(cell[0]), *cell[1:])))) for cell in CUTS + TRANSPORTS]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_is_that_of_one_device_and_one_micro_batch(cell):
    """Measured: gradients 6e-7 apart in the first step, and 6e-6 in the third, as Adam divides rounding by rounding."""
    for got, want, tolerance in zip(run(*cell), run(ONE, 1), (5e-6, 5e-5), strict=True):
        assert_equal_steps(got, want, tolerance)


@pytest.mark.slow
def test_a_step_with_dims_that_do_not_divide_is_that_of_one_device():
    """Devices that store the same part of a weight sum their gradients, once. Gathered once a step; without MTP."""
    for got, want, tolerance in zip(
        run((2, 2, 2), 1, dims=UNEVEN, gather="step"), run(ONE, 1, dims=UNEVEN), (5e-6, 5e-5), strict=True
    ):
        assert_equal_steps(got, want, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "gather"), [((2, 2, 2), "layer"), ((4, 1, 2), "step")])
def test_experts_that_do_not_divide(sizes, gather):
    """12 on four and two devices, with a data axis that divides nothing."""
    for got, want, tolerance in zip(
        run(sizes, 2, dims=UNEVEN_EXPERTS, gather=gather), run(ONE, 1, dims=UNEVEN_EXPERTS), (5e-6, 5e-5), strict=True
    ):
        assert_equal_steps(got, want, tolerance)


@pytest.mark.slow
def test_recomputation_counts_no_token_again():
    """Each valid token K times in each layer with a router, as often as the step says (prime-rl #2953)."""
    model = small.config().model
    for seed, (_, _, _, metrics) in zip((0, STEPS - 1), run(*RECOMPUTED), strict=True):
        valid = (batch(seed)["segment_ids_BS"] > 0).sum()
        np.testing.assert_array_equal(metrics["counts_LE"].sum(1), model.experts_per_token * valid)


def test_micro_batches_and_devices_have_unequal_tokens():
    """So a mean of means would show. One row has none at all."""
    for arrays in map(batch, range(STEPS)):
        tokens_B = (arrays["segment_ids_BS"] > 0).sum(1)
        for parts in (2, 4):
            assert len(set(tokens_B.reshape(parts, -1).sum(1))) == parts
        assert tokens_B.min() == 0 and tokens_B.max() == LENGTH
