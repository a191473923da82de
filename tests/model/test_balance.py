"""Goldens 6 and 7: the bias update is an exact integer comparison that balances; balance losses are 1 at balance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.balance import batch_balance, max_violation, router_stats, update_bias, update_biases
from deepseek_jax.model.router import route
from tests.support import small

GAMMA = np.float32(1e-3)
MODEL = small.config().model  # 16 experts in 4 groups, 2 kept, 4 per token
E, K = MODEL.num_experts, MODEL.experts_per_token

jit_update = jax.jit(update_bias)


def exact_signs(counts):
    """sign(mean - n) in Python's integers."""
    total, num = sum(map(int, counts)), len(counts)
    return [(total > num * int(n)) - (total < num * int(n)) for n in counts]


COUNTS = {
    "BF16 sees one number": [40_840, 41_000, 40_900, 41_001],
    "BF16 sees a spread of 256": [40_840, 40_840, 40_840, 41_216],
    "FP32 sees no surplus": [125_000_000, 125_000_000, 125_000_000, 125_000_001],
    "FP32 sees no deficit": [125_000_000, 125_000_000, 125_000_000, 124_999_999],
    "a whole V3 batch, one expert has it all": [15_360 * 4096 * 8] + [0] * 255,
    "a whole V3 batch, skewed by one": [15_360 * 4096 * 8 // 256] * 254 + [1_966_079, 1_966_081],
    "all int32 can hold": [2**31 - 1, 0],
    "idle layer": [0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_update_takes_the_exact_sign(counts):
    bias = jit_update(jnp.zeros((1, len(counts))), jnp.asarray([counts], jnp.int32), GAMMA)
    np.testing.assert_array_equal(bias[0], GAMMA * np.float32(exact_signs(counts)))


def test_update_of_random_counts_layer_by_layer():
    counts_LE = np.random.default_rng(0).multinomial(2_000, np.full(16, 1 / 16), size=200).astype(np.int32)
    counts_LE[::2] += np.random.default_rng(1).integers(0, 2, counts_LE[::2].shape).astype(np.int32) * 1_000_000
    before = np.random.default_rng(2).normal(size=counts_LE.shape).astype(np.float32)
    after = jit_update(before, counts_LE, GAMMA)
    signs = np.float32([exact_signs(counts) for counts in counts_LE])
    np.testing.assert_array_equal(after, before + GAMMA * signs)
    assert set(signs.ravel()) == {-1, 0, 1}
    change = np.abs(np.float64(after) - before).sum(-1)
    assert (change <= GAMMA * 16 * (1 + 1e-3)).all()  # the rest is rounding of biases near 1


def test_each_stack_of_biases_has_its_rows_of_the_counts():
    """Those of MoE layers come first; MTP layers that did not run have none, and keep their biases."""
    counts_LE = np.random.default_rng(3).integers(0, 9, (5, 4)).astype(np.int32)
    biases = {"moe_layers": np.ones((3, 4), np.float32), "mtp_layers": np.zeros((2, 4), np.float32)}
    want = GAMMA * np.float32([exact_signs(counts) for counts in counts_LE])
    found = update_biases(biases, counts_LE, GAMMA)
    np.testing.assert_array_equal(found["moe_layers"], 1 + want[:3])
    np.testing.assert_array_equal(found["mtp_layers"], want[3:])
    assert update_biases(biases, counts_LE[:3], GAMMA)["mtp_layers"] is biases["mtp_layers"]


def test_max_violation():
    counts_LE = jnp.asarray([[5, 5, 5, 5], [20, 0, 0, 0], [6, 5, 5, 4], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_allclose(max_violation(counts_LE), [0.0, 3.0, 0.2, 0.0], rtol=1e-6)


def test_updates_balance_a_skewed_router():
    """Scores prefer low indices, the same tokens every step: MaxVio falls by more than ten times and stays down."""
    skew_E = np.linspace(1.0, -1.0, E)
    logits_TE = (np.random.default_rng(0).normal(size=(2048, E)) + skew_E).astype(np.float32)
    scores_TE = jax.nn.sigmoid(logits_TE)

    def step(bias_E, _):
        experts_TK, _ = route(MODEL, scores_TE, bias_E)
        counts_E = (experts_TK[..., None] == jnp.arange(E)).sum((0, 1), dtype=jnp.int32)
        return update_bias(bias_E[None], counts_E[None], GAMMA)[0], max_violation(counts_E[None])[0]

    _, violation = jax.jit(lambda bias_E: jax.lax.scan(step, bias_E, length=800))(jnp.zeros(E))
    eighths = np.asarray(violation).reshape(8, 100).mean(1)
    assert eighths[0] > 0.5
    assert (np.diff(eighths[:4]) < 0).all()
    assert eighths[4:].max() < 0.1 * eighths[0]


def loss_config(frequency="unbiased", sequence=0.0, batch=0.0):
    config = small.config()
    weights = {"sequence_balance_weight": sequence, "batch_balance_weight": batch}
    return config.with_(loss={"balance_frequency": frequency} | weights)


def stats_of(config, scores_BSE, experts_BSK, valid_BS):
    return router_stats(config.loss, config.model, scores_BSE, experts_BSK, valid_BS)


def draw(rows=4, length=24, seed=0):
    """Scores, and a selection under a strong bias, so that the two definitions of f differ."""
    rng = np.random.default_rng(seed)
    scores_BSE = rng.uniform(0.05, 0.95, (rows, length, E)).astype(np.float32)
    experts_BSK, _ = route(MODEL, scores_BSE, rng.uniform(-1.0, 1.0, E).astype(np.float32))
    valid_BS = np.ones((rows, length), bool)
    valid_BS[1, 10:] = False
    valid_BS[3] = False
    return scores_BSE, np.asarray(experts_BSK), valid_BS


def balance(scores_TE, chosen_TK):
    """sum of f_i P_i over the given tokens, in double precision."""
    scores_TE = np.float64(scores_TE)
    f_E = np.bincount(np.ravel(chosen_TK), minlength=E) * E / (K * len(scores_TE))
    return (f_E * (scores_TE / scores_TE.sum(-1, keepdims=True)).mean(0)).sum()


def chosen_by(frequency, scores_BSE, experts_BSK):
    return experts_BSK if frequency == "selected" else np.argsort(-scores_BSE, axis=-1, kind="stable")[..., :K]


@pytest.mark.parametrize("frequency", ["unbiased", "selected"])
def test_statistics_equal_loops_and_exclude_padding(frequency):
    scores_BSE, experts_BSK, valid_BS = draw()
    poisoned = np.where(valid_BS[..., None], scores_BSE, np.nan)  # padding may hold anything
    stats = jax.jit(functools.partial(stats_of, loss_config(frequency, sequence=1e-4)))(poisoned, experts_BSK, valid_BS)
    np.testing.assert_array_equal(stats.counts_E, np.bincount(experts_BSK[valid_BS].ravel(), minlength=E))
    assert stats.counts_E.dtype == jnp.int32 and int(stats.counts_E.sum()) == K * valid_BS.sum()
    chosen_BSK = chosen_by(frequency, scores_BSE, experts_BSK)
    assert (np.sort(chosen_BSK) != np.sort(experts_BSK)).any() == (frequency == "unbiased"), "the frequencies differ"
    rows = [row for row in range(4) if valid_BS[row].any()]
    losses = [balance(scores_BSE[row][valid_BS[row]], chosen_BSK[row][valid_BS[row]]) for row in rows]
    np.testing.assert_allclose(stats.sequence_balance, sum(losses), rtol=1e-6)
    loads = [np.bincount(experts_BSK[row][valid_BS[row]].ravel(), minlength=E) for row in rows]
    np.testing.assert_allclose(stats.violation, sum(load.max() / load.mean() - 1 for load in loads), rtol=1e-6)


def test_frequencies_carry_no_gradient():
    scores_BSE, experts_BSK, valid_BS = draw()
    config = loss_config(sequence=1e-4)
    got = jax.grad(lambda scores: stats_of(config, scores, experts_BSK, valid_BS).sequence_balance)(scores_BSE)

    chosen_BSK = chosen_by("unbiased", scores_BSE, experts_BSK)
    counts_BE = ((chosen_BSK[..., None] == np.arange(E)) & valid_BS[..., None, None]).sum((1, 2))
    tokens_B = np.maximum(valid_BS.sum(1), 1)
    factor_BE = counts_BE * E / (K * tokens_B[:, None] ** 2)  # f_i / T
    share = jax.vjp(lambda scores: scores / scores.sum(-1, keepdims=True), jnp.asarray(scores_BSE))[1]
    want = share(jnp.asarray(np.where(valid_BS[..., None], factor_BE[:, None], 0.0), jnp.float32))[0]
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
    assert not np.asarray(got)[~valid_BS].any()


@pytest.mark.parametrize("frequency", ["unbiased", "selected"])
def test_batch_loss_is_the_formula_over_all_tokens_and_its_parts_add_up(frequency):
    """As if the batch were one sequence; a part of the shares with the choices of all gives that part of the loss."""
    config = loss_config(frequency, batch=1e-2)
    scores_BSE, experts_BSK, valid_BS = draw()
    stats = jax.jit(functools.partial(stats_of, config))
    whole, first, second = (stats(scores_BSE[i], experts_BSK[i], valid_BS[i]) for i in np.s_[:, :1, 1:])
    np.testing.assert_array_equal(whole.chosen_E, first.chosen_E + second.chosen_E)
    assert whole.chosen_E.dtype == jnp.int32 and float(whole.sequence_balance) == 0.0  # its weight is 0: not computed
    want = balance(scores_BSE[valid_BS], chosen_by(frequency, scores_BSE, experts_BSK)[valid_BS])
    parts = [
        batch_balance(MODEL, whole.chosen_E[None], part.share_E[None], valid_BS.sum())
        for part in (whole, first, second)
    ]
    np.testing.assert_allclose([parts[0], parts[1] + parts[2]], want, rtol=1e-6)
    two_layers = [jnp.stack([x, x]) for x in (whole.chosen_E, whole.share_E)]
    np.testing.assert_allclose(batch_balance(MODEL, *two_layers, valid_BS.sum()), 2 * want, rtol=1e-6)
