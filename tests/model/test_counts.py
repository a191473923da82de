"""Parameter counts of spec section 1.3 (golden 1), from shapes alone: no array of these models is ever made.

The spec's items leave out norm gains and router biases; its totals contain them. Printed numbers are rounded to 1e3
(items) and 1e6 (totals), so each test asks for half a unit in the last place.
"""

import functools
import importlib
import math

import jax
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.model import transformer

MILLION, BILLION = 10**6, 10**9

# Millions of parameters: attention, dense FFN, one expert, MoE layer, its active part, embedding.
ITEMS = {
    "deepseek_v3": (187.105, 396.362, 44.040, 11320.164, 398.197, 926.679),
    "deepseek_v2": (149.225, 188.744, 23.593, 3822.879, 189.563, 524.288),
    "deepseek_v2_lite": (13.763, 67.240, 8.651, 571.081, 69.337, 209.715),
}
# Billions: total without MTP; active with and without the input embedding.
TOTALS = {
    "deepseek_v3": (671.026, 37.552, 36.626),
    "deepseek_v2": (235.741, 21.376, 20.852),
    "deepseek_v2_lite": (15.706, 2.661, 2.451),
    # Moonlight's model card: 15.29 in all and 2.24 active, embedding and head not counted (0.336 each)
    "moonlight_16b": (15.960, 2.915, 2.579),
}


@functools.cache
def shapes(name):
    """Config, and the abstract `init` of it."""
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    return config, *jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def matrices(tree):
    """Parameters that are not gains of norms (`norm_D`, `q_norm_A`, ...)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if "norm" not in path[-1].key)


def main_model(params):
    return {name: part for name, part in params.items() if name != "mtp_layers"}


def idle(config, params):
    """Routed experts of the main model that one token does not use."""
    moe = params["moe_layers"]["moe"]
    experts = count((moe["gate_up_ED2F"], moe["down_EFD"]))
    return experts * (config.model.num_experts - config.model.experts_per_token) // config.model.num_experts


@pytest.mark.parametrize("name", ITEMS)
def test_items(name):
    config, params, _ = shapes(name)
    model, dense, moe = config.model, params["dense_layers"], params["moe_layers"]["moe"]
    expert = count((moe["gate_up_ED2F"], moe["down_EFD"])) / model.num_moe_layers / model.num_experts
    layer = matrices(moe) / model.num_moe_layers
    items = (
        matrices(dense["attention"]) / model.num_dense_layers,
        matrices(dense["ffn"]) / model.num_dense_layers,
        expert,
        layer,
        layer - expert * (model.num_experts - model.experts_per_token),
        count(params["embed_VD"]),
    )
    assert [item / MILLION for item in items] == pytest.approx(ITEMS[name], rel=0, abs=0.5e-3)
    assert count(params["embed_VD"]) == count(params["head_DV"])
    assert matrices(params["moe_layers"]["attention"]) / model.num_moe_layers == items[0]


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    config, params, bias = shapes(name)
    total = count(main_model(params)) + count(bias.get("moe_layers", ()))
    active = total - idle(config, params)
    got = (total / BILLION, active / BILLION, (active - count(params["embed_VD"])) / BILLION)
    assert got == pytest.approx(TOTALS[name], rel=0, abs=0.5e-3)


def test_mtp_of_the_671b_model():
    config, params, bias = shapes("deepseek_v3")
    assert config.model.num_mtp_layers == 1
    unique = count(params["mtp_layers"]) + count(bias["mtp_layers"])
    ends = count((params["embed_VD"], params["head_DV"]))
    active = unique - idle(config, params) // config.model.num_moe_layers + ends
    assert [n / BILLION for n in (unique, unique + ends, active)] == pytest.approx(
        (11.610, 13.463, 2.541), rel=0, abs=0.5e-3
    )
    # The released checkpoint repeats embedding and head for its MTP layer; here they are the main model's.
    released = count(params) + count(bias) + ends
    assert released / BILLION == pytest.approx(684.490, rel=0, abs=0.5e-3)


def test_comparison_shape():
    config, params, bias = shapes("v3_5b")
    assert (count(params) + count(bias)) / BILLION == pytest.approx(4.87, rel=0, abs=0.5e-2)
    assert "mtp_layers" not in params
    assert (config.model.num_experts, config.model.experts_per_token, config.data.sequence_length) == (64, 8, 4096)


def test_small_configs_are_as_large_as_they_say():
    """The first lines of `configs/moe_1b.py` and `configs/tiny.py`."""
    config, params, _ = shapes("moe_1b")
    total = count(main_model(params))
    assert [round(n / BILLION, 1) for n in (total, total - idle(config, params))] == [1.3, 0.3]
    assert round(count(shapes("tiny")[1]) / MILLION) == 10


def test_biases_are_outside_the_parameters():
    """Optax, decay, clipping and averaging see `params` only."""
    config, params, bias = shapes("deepseek_v3")
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    assert [leaf.shape for leaf in jax.tree.leaves(bias)] == [(58, 256), (1, 256)]
    assert {leaf.dtype for leaf in jax.tree.leaves((params, bias))} == {jax.numpy.dtype("float32")}
    assert config.optimizer.ema_decay == 0.0
