"""The router against loops in NumPy, and golden 5: the bias only selects, groups stay closed, FP32 throughout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import deepseek_v2, deepseek_v2_lite, deepseek_v3, tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.router import _sum_of_best_two, route, router_scores, rule_of
from pallas_kernels.routing.reference import choose, rank

V3, V2, LITE, TINY = (
    from_config_dict(c.get_config()).model for c in (deepseek_v3, deepseek_v2, deepseek_v2_lite, tiny)
)
MODELS = {"V3": V3, "V2": V2, "V2-Lite": LITE, "tiny": TINY}
BIASES = {"zero": (0.0, 0.0), "both signs": (-0.3, 0.3), "negative": (-1.5, -1.1), "as released": (2.0, 6.0)}
NUM_TOKENS = 40
DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}

jit_route = jax.jit(route, static_argnums=0)


def draw_scores(model, seed=0):
    """Scores as the gate makes them: sigmoid or softmax of logits of unit deviation."""
    logits = np.random.default_rng(seed).normal(size=(NUM_TOKENS, model.num_experts)).astype(np.float32)
    return np.asarray(jax.nn.sigmoid(logits) if model.gate == "sigmoid" else jax.nn.softmax(logits, axis=-1))


def draw_bias(model, name):
    return np.random.default_rng(7).uniform(*BIASES[name], model.num_experts).astype(np.float32)


def reference(model, scores_E, bias_E):
    """One token by loops: kept groups, experts best first (ties to the lowest index), gates in double precision."""
    biased = scores_E + bias_E  # FP32, as the router
    size = model.num_experts // model.num_groups

    def group_score(group):
        best = sorted(biased[group * size : (group + 1) * size], reverse=True)
        return best[0] + best[1] if model.group_score == "top2" else best[0]

    groups = sorted(range(model.num_groups), key=lambda group: (-group_score(group), group))[: model.num_kept_groups]
    candidates = [expert for expert in range(model.num_experts) if expert // size in groups]
    experts = sorted(candidates, key=lambda expert: (-biased[expert], expert))[: model.experts_per_token]
    gates = np.float64(scores_E)[experts]
    if model.normalize_gates:
        gates = gates / gates.sum()
    return groups, experts, gates * model.routed_scale


@pytest.mark.parametrize("bias_name", BIASES)
@pytest.mark.parametrize("name", MODELS)
def test_router_equals_loops(name, bias_name):
    """Indices exactly. A bias of any sign moves the choice and never a gate."""
    model = MODELS[name]
    scores_TE, bias_E = draw_scores(model), draw_bias(model, bias_name)
    experts_TK, gates_TK = jit_route(model, scores_TE, bias_E)
    want = [reference(model, scores_E, bias_E) for scores_E in scores_TE]
    np.testing.assert_array_equal(experts_TK, [experts for _, experts, _ in want])
    np.testing.assert_allclose(gates_TK, [gates for _, _, gates in want], rtol=1e-6)
    assert experts_TK.dtype == jnp.int32 and gates_TK.dtype == jnp.float32


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_few_tokens_choose_as_many_do(name, tied):
    """The experts in their order, the gates, and behind them what every token has; padding has nothing."""
    model = MODELS[name]
    scores_TE, bias_E = draw_scores(model), draw_bias(model, "both signs")
    if tied:
        scores_TE, bias_E = np.float32(np.round(scores_TE, 1)), 0 * bias_E
    want_TK, want_gates_TK = jit_route(model, scores_TE, bias_E)
    valid_T = np.arange(NUM_TOKENS) != 1
    run = jax.jit(choose, static_argnums=(0, 4))
    experts_TK, gates_TK = run(rule_of(model), scores_TE, bias_E, valid_T, model.num_experts + 2)
    k = model.experts_per_token
    np.testing.assert_array_equal(experts_TK[valid_T, :k], want_TK[valid_T])
    np.testing.assert_allclose(gates_TK[valid_T, :k], want_gates_TK[valid_T], rtol=5e-7)
    assert (experts_TK[valid_T, k:] == model.num_experts + np.arange(2)).all() and (gates_TK[valid_T, k:] == 1).all()
    assert (experts_TK[1] == model.num_experts + 2).all() and (gates_TK[1] == 0).all()
    assert experts_TK.dtype == jnp.int32 and gates_TK.dtype == jnp.float32


@pytest.mark.parametrize("name", MODELS)
def test_ties_go_to_the_lowest_index(name):
    model = MODELS[name]
    scores_TE = np.full((3, model.num_experts), 0.5, np.float32)
    experts_TK, _ = jit_route(model, scores_TE, np.zeros(model.num_experts, np.float32))
    np.testing.assert_array_equal(experts_TK, np.tile(np.arange(model.experts_per_token), (3, 1)))


@pytest.mark.parametrize("name", ["V3", "V2"])
def test_gradient_flows_through_chosen_scores_only(name):
    model = MODELS[name]
    scores_TE, bias_E = draw_scores(model), draw_bias(model, "both signs")
    weight_TK = np.random.default_rng(1).normal(size=(NUM_TOKENS, model.experts_per_token)).astype(np.float32)

    def loss(scores_TE, bias_E):
        experts_TK, gates_TK = route(model, scores_TE, bias_E)
        return (gates_TK * weight_TK).sum(), experts_TK

    (dscores_TE, dbias_E), experts_TK = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(scores_TE, bias_E)
    chosen_TE = (np.asarray(experts_TK)[..., None] == np.arange(model.num_experts)).any(1)
    assert (np.asarray(dscores_TE)[~chosen_TE] == 0).all()
    assert (np.asarray(dscores_TE)[chosen_TE] != 0).all()
    assert (np.asarray(dbias_E) == 0).all()
    if (
        model.normalize_gates
    ):  # gates do not change when a token's scores are all multiplied: the gradient is orthogonal to them
        np.testing.assert_allclose((dscores_TE * scores_TE).sum(-1), 0.0, atol=1e-5)
    else:
        np.testing.assert_allclose(
            np.asarray(dscores_TE)[chosen_TE].sum(), model.routed_scale * weight_TK.sum(), rtol=1e-4
        )


@functools.cache
def moe_layer(precision):
    tree = tiny.get_config()
    tree.execution.update({"precision": precision, "exchange": "local", "expert_block": 8})
    config = from_config_dict(tree)
    layer = MoE(config.model, nnx.Rngs(params=0))
    for weight in (layer.gate_up_ED2F, layer.down_EFD):  # the router keeps FP32, as `gather` leaves it
        weight.set_value(weight[...].astype(DTYPES[precision]))
    return layer, functools.partial(layer, config.execution, observe=chosen)


def chosen(model, scores_BSE, experts_BSK, valid_BS):
    return experts_BSK


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bias_step_of_a_thousandth_survives(precision):
    """0.6 + 0.001 == 0.6 in BF16: balancing would never move."""
    assert jnp.bfloat16(0.6) + jnp.bfloat16(0.001) == jnp.bfloat16(0.6)
    (layer, run), model = moe_layer(precision), TINY
    # score 0.6, for an input of ones
    layer.router_DE[...] = jnp.full((model.width, model.num_experts), np.log(0.6 / 0.4) / model.width)
    x_BSD = jnp.ones((1, 8, model.width), DTYPES[precision])
    bias_E = jnp.zeros(model.num_experts).at[13].set(0.001)
    counts = []
    for bias in (jnp.zeros(model.num_experts), bias_E):
        layer.bias_E[...] = bias
        _, experts_BSK = run(x_BSD, jnp.ones((1, 8), bool))
        counts.append(np.bincount(np.ravel(experts_BSK), minlength=16))
    np.testing.assert_array_equal(counts[0], [8] * 4 + [0] * 12)
    np.testing.assert_array_equal(np.flatnonzero(counts[1]), [0, 1, 2, 13])


def test_logits_are_fp32_for_bf16_inputs():
    """Two experts whose weights differ by 2^-12 of themselves: BF16 sees a tie, and would take the lower index."""
    (layer, run), model = moe_layer("bf16"), TINY
    column = np.full((model.width, 1), 2.0 / model.width, np.float32)
    layer.router_DE[...] = jnp.asarray(np.tile(column, (1, model.num_experts))).at[:, 9].multiply(1 + 2.0**-12)
    layer.bias_E[...] = jnp.zeros(model.num_experts)
    _, experts_BSK = run(jnp.ones((1, 1, model.width), jnp.bfloat16), jnp.ones((1, 1), bool))
    assert int(experts_BSK[0, 0, 0]) == 9


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def test_bf16_activations_are_scored_as_in_fp32():
    """Three BF16 products are an FP32 one: logits and the router's gradient are as exact as in FP32.

    The gradient of the activations is that of FP64, rounded to BF16, but for values near the middle of two.
    """
    rng = np.random.default_rng(5)
    h, router, g = rng.normal(size=(1, 64, 512)), rng.normal(size=(512, 64)), rng.normal(size=(1, 64, 64))
    h, router, g = jnp.asarray(h, jnp.bfloat16), jnp.asarray(router, jnp.float32), jnp.asarray(g, jnp.float32)
    exact_h, exact_router = np.asarray(h[0], np.float64), np.asarray(router, np.float64)
    scores, pull = jax.vjp(lambda h, router: router_scores(V3, h, router), h, router)
    logits = exact_h @ exact_router
    wanted = 1 / (1 + np.exp(-logits))
    dlogits = np.asarray(g[0], np.float64) * wanted * (1 - wanted)
    dh, drouter = pull(g)
    assert scores.dtype == drouter.dtype == jnp.float32 and dh.dtype == jnp.bfloat16
    assert relative_error(scores[0], wanted) < 1e-6
    assert relative_error(drouter, exact_h.T @ dlogits) < 2e-6
    rounded = jnp.asarray(dlogits @ exact_router.T, jnp.bfloat16)
    assert (dh[0] != rounded).mean() < 0.01  # measured 0.002; without one of three products 0.4


@pytest.mark.parametrize("values", [[3.0, 3.0, 1.0], [-1.0, -2.0, -3.0], [0.5, 0.25, 0.5]])
def test_best_two_and_ranks_with_ties(values):
    x = jnp.asarray(values)
    assert _sum_of_best_two(x) == sum(sorted(values)[-2:])
    assert rank(x).tolist() == [sorted(range(3), key=lambda i: (-values[i], i)).index(i) for i in range(3)]
