"""What a decoding step reads is what the records' weights are, and the expected times stay near the measured ones."""

import importlib
from pathlib import Path

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import mesh_shape
from deepseek_jax.plan import decode
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import state_of
from experiments.benchmarks import plan_calibration

ROOT = Path(__file__).parents[2]


def plan_of(name, devices, chip="h200", **changes):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config()).with_(**changes)
    return decode.decoding(config, devices, CHIPS[chip], state_of(config))


def test_bytes_and_times_are_near_the_records():
    """Bytes are those of the arrays; LAYER and SEQUENCE come from BF16 at 1 and 128 sequences, and no other row."""
    rows = plan_calibration.decoded()
    assert len(rows) == 7
    assert plan_calibration.decoded_table(rows) in (ROOT / "docs" / "planning.md").read_text()
    for row in rows:
        recorded, planned = row.read
        assert planned == pytest.approx(recorded, rel=3e-3), row
        measured, expected = row.seconds
        is_set = row.precision == "bf16" and row.batch in (1, 128) and row.context == 512
        assert abs(expected / measured - 1) < (0.01 if is_set else 0.13), row


def test_experts_are_spread_and_all_else_is_whole():
    one, eight = plan_of("deepseek_v3", 64), plan_of("deepseek_v3", 8)
    assert eight.experts == pytest.approx(8 * one.experts)
    assert (one.always, one.cache) == (eight.always, 70272)
    assert dict(eight.mesh.shape) == {"pipe": 1, "data": 1, "context": 1, "node": 1, "expert": 8, "tensor": 1}
    assert "with --config.mesh.node=1" in "\n".join(decode.lines(eight, 4096))


def test_the_largest_batch_and_context_fill_the_memory():
    plan = plan_of("deepseek_v3", 8)
    for batch in decode.BATCHES:
        used = plan.weights + batch * (plan.most_context(batch) * plan.cache + 4 * plan.config.model.vocab_size)
        assert used <= plan.chip.memory < used + 2 * batch * plan.cache
    assert plan.most_sequences(4096) * 4096 <= plan.room(1)


def test_weights_that_do_not_fit_are_refused_with_a_number_that_does():
    with pytest.raises(ValueError, match=r"on 1 h100 .* needs 676 GB for .* has 80; h100:16 does"):
        plan_of("deepseek_v3", 1, "h100")
    with pytest.raises(ValueError, match=r"config\.mesh\.pipe = 2: decoding has all layers on every device"):
        plan_of("v3_5b", 2, mesh={"pipe": 2, "node": 1, "expert": 1})


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"pipe": 3}, r"config\.mesh\.pipe = 3: decoding"),
        ({"context": 3}, r"config\.mesh\.context = 3: decoding"),
        ({"expert": 5, "data": 1}, r"config\.model\.num_experts = 64 cannot be split over 5 devices"),
    ],
)
def test_a_mesh_that_decoding_cannot_have_is_not_replaced(sizes, says):
    """By the one that is taken where the config's is of another number of devices."""
    with pytest.raises(ValueError, match=says):
        plan_of("v3_5b", 5 if "expert" in sizes else 8, mesh=sizes)


@pytest.mark.parametrize("sizes", [{"data": 16}, {"data": 2, "node": 3}, {"expert": 16}])
def test_the_flags_of_another_mesh_make_it(sizes):
    plan = plan_of("v3_5b", 8, mesh=sizes)
    flags = dict(flag.split("=") for flag in decode.flags_of(plan.config, plan.mesh).split())
    named = {name.removeprefix("--config.mesh."): int(size) for name, size in flags.items()}
    assert mesh_shape(plan.config.with_(mesh=named).mesh, 8) == dict(plan.mesh.shape)


def test_a_record_says_which_batches_fit():
    plan = plan_of("deepseek_v3", 8)
    fits = {batch: step["fits"] for batch, step in decode.record(plan, 131072)["steps"].items()}
    assert fits == {"1": True, "32": False, "128": False}
    assert "\n".join(decode.lines(plan, 131072)).count("does not fit") == 2
