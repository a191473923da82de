"""Replayed routes: the experts that a token had before, with gates of today's scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import layer, transformer
from deepseek_jax.model.moe import MoE, chosen_experts
from deepseek_jax.model.router import Replay, replaying
from tests.inference.test_decode import make_config

CONFIG = make_config(num_groups=4, num_kept_groups=2, experts_per_token=3)
MODEL = CONFIG.model
EXPERTS, K = MODEL.num_experts, MODEL.experts_per_token
VALID = np.ones((2, 6), bool)


@functools.cache
def inputs():
    """Weights of an MoE, its bias, tokens, and what its output is multiplied by."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, MODEL), jax.eval_shape(lambda: jax.random.key(0)))
    params = jax.tree.map(
        lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape[1:])), shapes.params["moe_layers"]["moe"]
    )
    tokens, cotangent = (np.float32(rng.normal(size=(*VALID.shape, MODEL.width))) for _ in range(2))
    return params, np.float32(0.2 * rng.normal(size=EXPERTS)), tokens, cotangent


@functools.cache
def compiled():
    @jax.jit
    def run(params, bias_E, x_BSD, cotangent_BSD, experts_BSK):
        """(loss, (output, experts that were taken, what the router would choose)), and gradients."""

        def loss(params, x_BSD):
            outs = []
            for watches in (False, True):
                moe = layer.merge(MoE, MODEL, params, {"bias_E": Replay(experts_BSK, watches, bias_E)})
                outs.append(moe(CONFIG.execution, x_BSD, VALID, chosen_experts))
            (out, taken), (_, own) = outs
            return (out * cotangent_BSD).sum(), (out, taken, own)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BSD)

    return run


def replayed(experts_BSK):
    return jax.device_get(compiled()(*inputs(), experts_BSK))


def restated(params, x_BSD, cotangent_BSD, experts_BSK):
    """The loss token by token, in FP64 (DeepSeek-V3, eq. 12 to 15, for experts that are given)."""
    p = jax.tree.map(np.float64, params)

    def ffn(gate_up, down, h):
        gate, up = np.einsum("d,dhf->hf", h, gate_up)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    total = 0.0
    for at in np.ndindex(VALID.shape):
        x = x_BSD[at]
        h = x / np.sqrt((x * x).mean() + MODEL.norm_eps) * p["norm_D"]
        scores = 1 / (1 + np.exp(-h @ p["router_DE"]))[experts_BSK[at]]
        gates = MODEL.routed_scale * scores / scores.sum()
        out = sum(
            g * ffn(p["gate_up_ED2F"][e], p["down_EFD"][e], h) for g, e in zip(gates, experts_BSK[at], strict=True)
        )
        total += cotangent_BSD[at] @ (out + ffn(p["shared"]["gate_up_D2F"], p["shared"]["down_FD"], h))
    return total


def test_own_routes_change_nothing_and_others_what_they_must():
    """In value and gradients, which are those of an independent restatement, by a difference along a direction."""
    params, _, x_BSD, cotangent_BSD = inputs()
    nothing = np.full((*VALID.shape, K), -1, np.int16)
    (_, (out, own, watched)), grads = replayed(nothing)
    assert (own == watched).all()
    again = replayed(own.astype(np.int16))
    assert again[0][1][0].tobytes() == out.tobytes()
    for a, b in zip(jax.tree.leaves(again[1]), jax.tree.leaves(grads), strict=True):
        assert a.tobytes() == b.tobytes()

    other = ((own - own.max()) % EXPERTS).astype(np.int16)  # expert 0 is among them, which is not below 0
    other[0, 2:4] = -1  # the router chooses for these
    (loss, (out_other, taken, watched)), grads = replayed(other)
    assert (taken == np.where(other < 0, own, other)).all() and (watched == own).all()
    differs = np.abs(out_other - out).max(-1) > 1e-3
    assert (differs == (other >= 0).all(-1)).all()

    rng = np.random.default_rng(1)
    step = jax.tree.map(lambda x: rng.normal(size=x.shape), (params, x_BSD))
    ends = [
        restated(*jax.tree.map(lambda x, d, s=s: x + s * 1e-6 * d, (params, x_BSD), step), cotangent_BSD, taken)
        for s in (-1, 1)
    ]
    slope = sum((np.float64(g) * d).sum() for g, d in zip(*map(jax.tree.leaves, (grads, step)), strict=True))
    assert loss == pytest.approx(sum(ends) / 2, rel=1e-5) and slope == pytest.approx(
        (ends[1] - ends[0]) / 2e-6, rel=1e-5
    )


def test_routes_reach_the_layers_of_the_main_model_only():
    biases = {"moe_layers": {"moe": {"bias_E": jnp.zeros((5, EXPERTS))}}, "mtp_layers": {"block": "as it was"}}
    found = replaying(biases, Replay(np.arange(30).reshape(1, 2, 5, 3)), 1)
    assert found["mtp_layers"] is biases["mtp_layers"]
    assert found["moe_layers"]["moe"]["bias_E"].experts[4].tolist() == [[[12, 13, 14], [27, 28, 29]]]
    assert replaying(biases, None, 2) is biases
    with pytest.raises(ValueError, match="execution.interleave = 2: routes are replayed for rows that pass"):
        replaying(biases, Replay(np.zeros((1, 2, 5, 3))), 2)
