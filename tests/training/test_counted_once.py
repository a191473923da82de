"""Each parameter counts once in norm and clipping, and each token once in the counts, on any mesh. Goldens of reports.

The whole step on every mesh is in `tests.parallel.test_meshes`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from deepseek_jax.model.balance import update_bias
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import ROWS, P, Weights, partition_specs
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.optimizer import global_norms, make_optimizer
from deepseek_jax.training.state import abstract_state
from tests.support import small

MESHES = [(1, 1, 2), (2, 1, 1), (1, 1, 4), (2, 1, 4), (2, 2, 2), (4, 2, 1)]
CLIP = 1.0


def mesh_of(sizes):
    return make_mesh(small.config(sizes).mesh, jax.devices()[: np.prod(sizes)])


def placed(tree):
    """The tree in the layout of the parameters, on the current mesh."""
    return jax.tree.map(lambda leaf, spec: jax.device_put(jnp.asarray(leaf), spec), tree, partition_specs(tree))


@functools.cache
def golden():
    """Four experts, two on each of two ranks: each gradient's square is 4, 16, 36 and 64, together 120."""
    return {"down_EFD": np.stack([np.full((1, 8, 8), 2.0 * (e + 1) / 8) for e in range(4)]).reshape(4, 8, 8)}


@pytest.mark.parametrize("sizes", MESHES[:3], ids=small.mesh_name)
def test_four_experts_on_two_ranks_have_a_norm_of_root_120(sizes):
    """DeepSpeed's #8475 gave 7.236, the mean of the ranks' norms; root 240 would count each expert twice."""
    with jax.set_mesh(mesh_of(sizes)):
        grads = placed(jax.tree.map(np.float32, golden()))
        norms = jax.jit(lambda g: (optax.tree.norm(g), *global_norms(g, g)))(grads)
    np.testing.assert_allclose(norms, 120**0.5, rtol=1e-6)


@functools.cache
def gradients():
    """Experts that differ, beside weights that are split, replicated and stacked."""
    rng = np.random.default_rng(0)
    shapes = {"down_EFD": (8, 8, 16), "gate_up_ED2F": (8, 16, 2, 8), "embed_VD": (32, 16), "norm_D": (16,)}
    return {name: (10.0 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("sizes", MESHES, ids=small.mesh_name)
def test_all_ranks_clip_by_the_one_norm(sizes):
    """Of what the optimizer makes of a gradient, seen in its first moment: (1 - b1) g / norm (Automodel #3816)."""
    recipe = small.config(sizes).optimizer
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradients().values()))
    assert norm > 100 * CLIP and recipe.clip_norm == CLIP
    optimizer = make_optimizer(recipe)

    def update(grads):
        return optimizer.update(grads, optimizer.init(grads), grads)[1], optax.tree.norm(grads)

    with jax.set_mesh(mesh_of(sizes)):
        state, got = jax.device_get(jax.jit(update)(placed(gradients())))
    np.testing.assert_allclose(got, norm, rtol=1e-6)
    for name, g in gradients().items():
        want = (1 - recipe.b1) * np.float64(g) / norm
        np.testing.assert_allclose(np.float32(state[1].mu[name]), want, rtol=2**-8, atol=1e-9)  # stored in BF16


@functools.cache
def shards():
    """64 shards of 608 to 676 tokens for the first expert, 40,840 in all; four experts have 40,960 on average."""
    rng = np.random.default_rng(0)
    first = rng.integers(608, 669, 64)
    while first.sum() != 40_840:
        first[rng.integers(64)] += np.sign(40_840 - first.sum())
        first = np.clip(first, 608, 676)
    counts = np.stack([first, np.full(64, 640), np.full(64, 642), np.full(64, 640)], axis=1)
    counts[:, 3] += 2560 - counts.sum(1)  # each shard has 2,560 assignments
    return counts.astype(np.int32)


@pytest.mark.parametrize("sizes", MESHES, ids=small.mesh_name)
def test_the_exact_sum_of_64_shards_raises_the_bias(sizes):
    """40,840 is below the mean. In BF16 the sum was 41,216 or 40,704, by the order (Megatron-LM #7081)."""
    counts = shards()
    assert counts[:, 0].sum() == 40_840 and counts.sum() == 4 * 40_960
    assert (counts[:, 0].min(), counts[:, 0].max()) >= (608, 608) and counts[:, 0].max() <= 676

    def local(counts_WE):
        return lax.psum(counts_WE.sum(0), ROWS)

    with jax.set_mesh(mesh_of(sizes)):
        total = jax.jit(jax.shard_map(local, in_specs=P(ROWS), out_specs=P()))(jax.device_put(counts, P(ROWS)))
        bias = jax.jit(update_bias)(jnp.zeros((1, 4)), total[None], np.float32(1e-3))
    assert total.dtype == jnp.int32 and int(total[0]) == 40_840
    assert np.asarray(bias)[0, 0] == np.float32(1e-3)


def test_counts_of_the_step_are_integers_summed_once():
    """One sum of integers [layers, experts] leaves the step's shard_map; no count is a float on the way."""
    config = small.config((2, 1, 4))
    mesh = mesh_of((2, 1, 4))
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        recipe = step_lib.recipe_of(config, pretraining(config), mesh)
        batch = small.put(small.batch())
        jaxpr = jax.make_jaxpr(functools.partial(step_lib.gradients, recipe))(
            Weights(state["params"], state["router_bias"]), batch, small.RATES
        )
    model = config.model
    shape = (model.num_moe_layers + model.num_mtp_layers, model.num_experts)
    sums = [
        v.aval.dtype
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name.startswith("psum")
        for v in equation.invars
        if getattr(v.aval, "shape", ()) == shape
    ]
    assert sums == [jnp.int32]


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
