"""The blocked grouped matmul against every expert computed for every row: values and every derivative; golden 20."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.model import experts_blocks
from deepseek_jax.model.balance import router_stats
from deepseek_jax.model.exchange import exchange
from deepseek_jax.model.layers import rms_norm
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel.program import resolve
from tests.support import small

T, K, E, D, F = 37, 3, 6, 8, 5
SIZES = [(1, 1), (4, 3), (16, 2), (64, 100)]  # block and wave: many waves, several, few, one without a loop
RTOL = 2e-6  # of the largest value: FP32 sums of at most T terms in another order; measured 4e-7


def draw_ids(case):
    """Expert ids [T, K] of a case; E and -1 are experts that are not here."""
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    if case == "one expert":
        ids[:] = 2
    if case == "last expert":
        ids[:] = E - 1
    if case == "empty experts":
        ids = np.array([1, 4, 1])[np.newaxis].repeat(T, 0)
    if case == "padding":
        ids[5:9], ids[-1], ids[20, 1], ids[21, 2] = E, -1, E, -1
    if case == "nothing":
        ids[:] = E
    return ids.astype(np.int32)


CASES = ("random", "one expert", "last expert", "empty experts", "padding", "nothing")


@functools.cache
def draw_inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "gate_up_ED2F": jax.random.normal(keys[0], (E, D, 2, F)),
        "down_EFD": jax.random.normal(keys[1], (E, F, D)),
    }
    cotangent_TD = jax.random.normal(keys[4], (T, D))
    return weights, jax.random.normal(keys[2], (T, D)), jax.random.uniform(keys[3], (T, K), minval=0.1), cotangent_TD


def dense(weights, x_TD, gates_TK, experts_TK):
    """Each expert for each row, then the gated sum: the specification."""
    gate_TE = jnp.where(experts_TK[..., None] == jnp.arange(E), gates_TK[..., None], 0.0).sum(1)
    y_TD = jnp.zeros_like(x_TD)
    for expert in range(E):
        gate_up_D2F, down_FD = weights["gate_up_ED2F"][expert], weights["down_EFD"][expert]
        y_TD += gate_TE[:, expert, None] * (
            (jax.nn.silu(x_TD @ gate_up_D2F[:, 0]) * (x_TD @ gate_up_D2F[:, 1])) @ down_FD
        )
    return y_TD


def value_and_pullback(function, weights, x_TD, gates_TK, experts_TK, cotangent_TD):
    y_TD, pull = jax.vjp(lambda *args: function(*args, experts_TK), weights, x_TD, gates_TK)
    return y_TD, pull(cotangent_TD)


def apply_local(block, wave, weights, x_TD, gates_TK, experts_TK):
    experts = experts_blocks.BlockedExperts(block, wave)
    return exchange(x_TD, experts_TK, gates_TK, weights, experts, transport="local", num_experts=E, slack=1.0)


@functools.cache
def compiled(block, wave):
    return jax.jit(functools.partial(value_and_pullback, functools.partial(apply_local, block, wave)))


compiled_dense = jax.jit(functools.partial(value_and_pullback, dense))


def assert_close(got, want):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=RTOL * max(1.0, np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("block", "wave"), SIZES)
def test_equals_dense_in_value_and_every_gradient(block, wave, case):
    weights, x_TD, gates_TK, cotangent_TD = draw_inputs()
    ids = draw_ids(case)
    want = compiled_dense(weights, x_TD, gates_TK, ids, cotangent_TD)
    assert_close(compiled(block, wave)(weights, x_TD, gates_TK, ids, cotangent_TD), want)
    assert bool(np.any(want[0])) == (case != "nothing")


@pytest.mark.parametrize(("block", "wave"), SIZES)
def test_rows_without_an_expert_do_not_leak(block, wave):
    """NaN in such a row, its gates and its incoming gradient is never read, not even to fill a block."""
    weights, x_TD, gates_TK, cotangent_TD = draw_inputs()
    ids = draw_ids("padding")
    nowhere_TK = (ids < 0) | (ids >= E)
    nowhere_T = nowhere_TK.all(-1)
    assert 0 < nowhere_T.sum() < nowhere_TK.any(-1).sum()
    run = compiled(block, wave)
    poisoned = run(
        weights,
        jnp.where(nowhere_T[:, None], jnp.nan, x_TD),
        jnp.where(nowhere_TK, jnp.nan, gates_TK),
        ids,
        jnp.where(nowhere_T[:, None], jnp.nan, cotangent_TD),
    )
    jax.tree.map(np.testing.assert_array_equal, poisoned, run(weights, x_TD, gates_TK, ids, cotangent_TD))
    y_TD, (_, dx_TD, dgates_TK) = poisoned
    assert (
        not np.asarray(y_TD)[nowhere_T].any()
        and not np.asarray(dx_TD)[nowhere_T].any()
        and not np.asarray(dgates_TK)[nowhere_TK].any()
    )


def test_bf16_is_near_fp32_and_keeps_its_dtypes():
    weights, x_TD, gates_TK, cotangent_TD = draw_inputs()
    ids = draw_ids("random")
    weights16, x16_TD, cotangent16_TD = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (weights, x_TD, cotangent_TD))
    got = compiled(16, 2)(weights16, x16_TD, gates_TK, ids, cotangent16_TD)
    y_TD, (dweights, dx_TD, dgates_TK) = got
    assert {a.dtype for a in jax.tree.leaves((y_TD, dx_TD, dweights))} == {
        jnp.dtype(jnp.bfloat16)
    } and dgates_TK.dtype == jnp.float32
    want = compiled_dense(
        *jax.tree.map(lambda a: a.astype(jnp.float32), (weights16, x16_TD)),
        gates_TK,
        ids,
        cotangent16_TD.astype(jnp.float32),
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.float32(a) - b) <= 1e-2 * np.linalg.norm(b)  # measured 5e-3: a few roundings of 2^-9


@pytest.mark.parametrize("case", ["random", "one expert", "nothing"])
def test_work_follows_the_assignments(case, monkeypatch):
    """The loops run over the blocks that exist, forward and backward; the buffers are sized for the worst case."""
    block, wave, ran = 4, 3, []
    original = experts_blocks._wave

    def counted(sizes, i, *args):
        jax.debug.callback(lambda i: ran.append(int(i)), i)
        return original(sizes, i, *args)

    monkeypatch.setattr(experts_blocks, "_wave", counted)
    ids = draw_ids(case)
    weights, x_TD, gates_TK, cotangent_TD = draw_inputs()
    function = functools.partial(apply_local, block, wave)
    jax.block_until_ready(
        jax.jit(functools.partial(value_and_pullback, function))(weights, x_TD, gates_TK, ids, cotangent_TD)
    )
    jax.effects_barrier()
    blocks = sum(-(-int((ids == expert).sum()) // block) for expert in range(E))
    assert sorted(ran) == sorted(2 * list(range(-(-blocks // wave))))
    assert -(-blocks // wave) <= -(-(ids.size // block + E) // wave)


def test_no_token_is_dropped_when_all_want_the_same_experts():
    """Golden 20 on the whole layer: a bias sends every token to the same experts; all experts for all tokens agree."""
    config = resolve(small.config(), "cpu", 1)
    model, layer = config.model, MoE(config.model, nnx.Rngs(params=0))
    layer.bias_E[...] = jnp.zeros(model.num_experts).at[jnp.asarray([4, 5, 6, 7])].set(9.0)
    x_BSD = jax.random.normal(jax.random.key(1), (2, 48, model.width))
    valid_BS = np.arange(48) < np.array([[48], [40]])
    observe = functools.partial(router_stats, config.loss)
    run = nnx.jit(lambda layer, x, valid: layer(config.execution, x, valid, observe))
    y_BSD, stats = run(layer, x_BSD, valid_BS)
    np.testing.assert_array_equal(stats.counts_E, 88 * np.isin(np.arange(16), [4, 5, 6, 7]))

    h_TD = rms_norm(x_BSD, layer.norm_D[...], model.norm_eps).reshape(-1, model.width)
    scores_TE = jax.nn.sigmoid(h_TD @ layer.router_DE[...])
    routed_TD = jnp.zeros_like(h_TD)
    for expert in (4, 5, 6, 7):
        hidden = jnp.einsum("td,dgf->tgf", h_TD, layer.gate_up_ED2F[expert])
        gate_T = model.routed_scale * scores_TE[:, expert] / scores_TE[:, 4:8].sum(-1)
        routed_TD += gate_T[:, None] * ((jax.nn.silu(hidden[:, 0]) * hidden[:, 1]) @ layer.down_EFD[expert])
    shared_BSD = layer.shared(h_TD.reshape(x_BSD.shape))
    # padding has no routed expert
    want_BSD = shared_BSD + jnp.where(valid_BS[..., None], routed_TD.reshape(x_BSD.shape), 0.0)
    np.testing.assert_allclose(y_BSD, want_BSD, rtol=0, atol=1e-6 * np.abs(want_BSD).max())
