"""`experiments.studies.linears` takes what the model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from experiments.studies import linears
from tests.experiments.studies.taken import taken


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


def program(loss):
    """Trace a loss of x [3, 4] and of w [4, 2], named as a linear layer's."""
    x, w = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((3, 4), (4, 2)))
    return jax.make_jaxpr(lambda x, w: loss(x, checkpoint_name(w, "linear: dense 0, down_FD")))(x, w), x, w


def test_a_program_runs_as_it_is_and_shows_input_and_gradient():
    squares, x, w = program(lambda x, w: ((x @ w) ** 2).sum() + (x @ x.T).sum())
    assert {name: y.shape for name, y in linears.linear_layers(squares).items()} == {("dense 0", "down_FD"): (3, 2)}
    (loss, inputs), g = jax.value_and_grad(linears.run, argnums=1, has_aux=True)(squares, [jnp.zeros((3, 2))], x, w)
    np.testing.assert_allclose(loss, ((x @ w) ** 2).sum() + (x @ x.T).sum(), rtol=1e-6)
    np.testing.assert_array_equal(inputs[0], x)
    np.testing.assert_allclose(g[0], 2 * x @ w, rtol=1e-6)


def test_a_weight_that_is_multiplied_twice_is_refused():
    twice, _, _ = program(lambda x, w: (x @ w).sum() + (2 * x @ w).sum())
    with pytest.raises(ValueError, match="twice"):
        linears.linear_layers(twice)


def test_a_product_inside_a_loop_is_not_shown():
    looped, _, _ = program(lambda x, w: jax.lax.map(lambda row: row @ w, x).sum())
    assert not linears.linear_layers(looped)
