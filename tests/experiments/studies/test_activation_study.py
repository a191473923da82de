"""`experiments.studies.activation_study` takes what the model computes; its emulated recipe is the kernels'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer
from deepseek_jax.model.precision import ATTENTION_OUTPUT, HIDDEN
from deepseek_jax.parallel.program import resolve
from experiments.studies import activation_study
from tests import small


@functools.cache
def taken():
    """The linears of a dense layer and a MoE layer, and the parameters."""
    tree = tiny.get_config()
    tree.model.update(small.fp8_config_dict().model)
    tree.model.update(
        {"num_layers": 2, "num_experts": 4, "experts_per_token": 2, "num_groups": 2, "num_kept_groups": 1}
    )
    config = resolve(from_config_dict(tree), "cpu", 1)
    params, bias = jax.device_get(transformer.init(config.model, jax.random.key(0)))
    return params, activation_study.take(config, params, bias, small.batch(rows=4, length=64))


def test_inputs_weights_and_gradients_belong_together():
    params, found = taken()
    assert [one.layer for one in found] == ["dense 0"] * 7 + ["moe 0"] * 7
    ways = {(one.layer, one.matrix): one for one in found}
    for one in found:
        assert one.x_TI.dtype == one.g_TO.dtype == jnp.bfloat16 and len(one.x_TI) == len(one.g_TO) == 256
        assert np.isfinite(one.g_TO.astype(np.float32)).all() and one.g_TO.any()
    for layer in ("dense 0", "moe 0"):
        q_a, kv_a = ways[layer, "q_a_DA"], ways[layer, "kv_a_DC"]
        np.testing.assert_array_equal(q_a.x_TI, kv_a.x_TI)  # both read one norm
        gate, up = np.split(
            ways[layer, "gate_up_D2F"].x_TI.astype(np.float32) @ ways[layer, "gate_up_D2F"].w_IO, 2, axis=1
        )
        act = ways[layer, "down_FD"].x_TI.astype(np.float32)
        assert np.linalg.norm(gate / (1 + np.exp(-gate)) * up - act) < 0.02 * np.linalg.norm(act)  # BF16
        dact = ways[layer, "down_FD"].g_TO.astype(np.float32) @ ways[layer, "down_FD"].w_IO.T
        sigmoid = 1 / (1 + np.exp(-gate))
        dup = ways[layer, "gate_up_D2F"].g_TO.astype(np.float32)[:, gate.shape[1] :]
        assert np.linalg.norm(dact * gate * sigmoid - dup) < 0.02 * np.linalg.norm(dup)
    np.testing.assert_array_equal(
        ways["moe 0", "o_NHD"].w_IO, params["moe_layers"]["attention"]["o_NHD"][0].reshape(-1, 128)
    )


@pytest.mark.parametrize("recipe", [HIDDEN, ATTENTION_OUTPUT], ids=["hidden", "attention output"])
def test_the_emulated_recipe_is_ours(recipe):
    """But for results in BF16 and ties that FP32 scales decide otherwise; with a partial block, outliers and a token of
    zeros.
    """
    rng = np.random.default_rng(0)
    x, g, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 128), (256, 144), (128, 144)))
    x[:, 7] *= 50
    g *= np.exp2(rng.integers(-3, 3, (256, 1)))
    g[5] = 0
    x, g = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    wide = x.astype(np.float32), g.astype(np.float32), w
    ways = (
        activation_study.exact(*wide),
        activation_study.ours(recipe, x, g, w),
        activation_study.emulated(recipe, *wide),
    )
    for want, got, emulation, least in zip(*ways, activation_study.LEAST_COSINE.values(), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - emulation) < 5e-3 * np.linalg.norm(want)
        assert activation_study._compare(emulation, want)["cosine"] > least


def test_a_known_error_is_found():
    want = np.array([3.0, 4.0])
    found = activation_study._compare(want * 1.01, want)
    assert found == pytest.approx(
        {"value": 1.0, "cosine": 1.0, "slope": 1.01, "mean_error": 0.035 * np.sqrt(2) / 5 * 100}
    )


def test_records_and_drawing():
    points = activation_study.measure(taken()[1][0])
    assert [point["op"] for point in points] == list(activation_study.PRODUCTS)
    batches = activation_study.medians(points)
    assert [record["value"] for record in batches] == [point["value"] for point in points[1:]]
    assert len(activation_study.draw(points, batches).axes) == 2
