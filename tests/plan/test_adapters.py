"""The plan of a run of adapters, against counts by hand; and in tests.training.test_adapted a compiled step."""

import dataclasses

import jax
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import adapters
from deepseek_jax.plan.chips import find_chip
from tests.support import small

RANK, DEVICES = 4, 8
MODEL = {"num_layers": 2, "num_dense_layers": 1, "num_mtp_layers": 0}


def config(gather="layer", **mesh):
    tree = small.fp8_config_dict()
    tree.model.update(MODEL)
    tree.execution.gather = gather
    tree.mesh.update({"data": 2, "node": 2, "expert": 2} | mesh)
    return from_config_dict(tree)


@pytest.mark.parametrize("gather", ["layer", "step"])
def test_experts_and_their_adapters_are_shared_and_others_lie_on_every_device(gather):
    cfg = config(gather)
    model, size = cfg.model, cfg.model.width
    found = adapters.plan_adapters(cfg, adapters.parse(f"{RANK}:ffn,experts"), DEVICES, find_chip("h200"))
    dense = RANK * (size + 2 * model.dense_hidden + model.dense_hidden + size)
    experts = RANK * model.num_experts * (size + 2 * model.expert_hidden + model.expert_hidden + size)
    assert found.trained == dense + experts
    own, in_use = dense + experts // DEVICES, dense + experts // 4  # stored over data, too; used over node and expert
    assert found.held["adapters"] == 4 * own
    assert found.held["gradients"] == 4 * (in_use if gather == "step" else own)
    counters = 3 * 4  # of the optimizer, of steps and of those skipped; the optimizer's alone is among the moments
    assert 0 <= found.held["moments"] - 4 * own <= counters
    # weights in E4M3, one byte each, and their scales; embedding, head, router and gains in FP32 or BF16
    values = 3 * size * (model.dense_hidden + model.expert_hidden * (model.num_experts + 1)) // DEVICES
    others = 4 * 512 * size // DEVICES + 2 * 512 * size // DEVICES
    assert values + others < found.held["base"] < 1.2 * (values + others)
    copies = found.held.get("copies", 0)
    assert (copies > 7 * found.held["base"] // 3) == (gather == "step") and bool(copies) == (gather == "step")
    assert sum(found.held.values()) < found.all_weights / 3
    text = "\n".join(adapters.lines(found))
    assert f"{found.trained:,} parameters" in text and "one of 8 devices of h200" in text
    assert adapters.record(found)["held_computed"] == found.held


def test_a_base_that_is_larger_than_the_device_leaves_no_negative_room():
    found = adapters.plan_adapters(config(), adapters.parse("4:ffn"), DEVICES, find_chip("h200"))
    assert "that leaves 131." in adapters.lines(found)[-1]
    tiny = dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=1000))
    told = adapters.lines(tiny)[-1]
    assert told.startswith("It does not fit: a device has 0.98 KiB, ") and "-" not in told


def test_what_cannot_be_planned_is_refused():
    for text in ("16", "0:attention", "-1:attention", "16:", "16:ffn,ffn", "x:ffn"):
        with pytest.raises(ValueError, match="write --adapters=16:attention,experts"):
            adapters.parse(text)
    with pytest.raises(ValueError, match="the model has no target 'router'; choose of"):
        adapters.plan_adapters(config(), adapters.parse("4:router"), None, None)
    with pytest.raises(ValueError, match=r"rank = 9999, and .* is \d+ x \d+, whose rank is at most \d+; give no more"):
        adapters.plan_adapters(config(), adapters.parse("9999:ffn"), None, None)
    with pytest.raises(ValueError, match="without a pipeline; set it to 1"):
        adapters.plan_adapters(config(pipe=2, data=1), adapters.parse("4:ffn"), None, None)
    assert jax.tree.leaves(adapters.plan_adapters(config(), adapters.parse("4:ffn"), None, None).held) == []
