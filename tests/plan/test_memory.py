"""What a compiled step needs, as XLA says it, and what a person reads of it. `tests.test_aot_tpu` compiles for TPUs."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from configs import deepseek_v3, v3_5b
from deepseek_jax.config import from_config_dict
from deepseek_jax.plan import chips, memory
from deepseek_jax.plan.report import advice, lines, record
from deepseek_jax.plan.run import make_plan, signs_of_life

MIB = 2**20
# libtpu 0.0.48.1, for V3's shape on 256 devices of v5p, one sequence on each
REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (101.73G) exceeds"
    " available HBM (95.73G). HLO module: jit_run."
)


def test_memory_counts_donated_arrays_once():
    x = jax.ShapeDtypeStruct((MIB,), jnp.float32)

    def compiled(donate):
        return memory.memory_of(jax.jit(lambda x, y: (x + y.sum(), y[0]), donate_argnums=donate).lower(x, x).compile())

    assert compiled(donate=()).total - compiled(donate=0).total == 4 * MIB
    assert compiled(donate=0).arguments == 8 * MIB


def test_a_refusal_for_memory_becomes_a_figure():
    found = memory.refused(jax.errors.JaxRuntimeError(REFUSAL))
    assert found.total == int(101.73 * 2**30)
    assert found.capacity == chips.CHIPS["v5p"].memory
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory.refused(jax.errors.JaxRuntimeError("INTERNAL: something else"))


@functools.cache
def planned():
    tree = deepseek_v3.get_config()
    tree.training.micro_batch_size = 256
    tree.execution.precision = "bf16"
    return make_plan(from_config_dict(tree), 256)


def plan_of_v3(step):
    placement = dataclasses.replace(planned().placement, chip=chips.CHIPS["v5p"], step=step)
    return dataclasses.replace(planned(), placement=placement)


def test_a_person_reads_that_v3_does_not_fit_and_what_helps():
    refused = memory.refused(jax.errors.JaxRuntimeError(REFUSAL))
    plan = plan_of_v3(dataclasses.replace(refused, seconds=25.0))
    text = "\n".join(lines(plan))
    for part in (
        "682.636B",
        "37.552B",
        "247,184 steps",
        " 9.94 GiB  computed",
        "101.73 GiB  compiled in 25 s",
        "95.73 GiB",
    ):
        assert part in text
    assert "It does not fit. Beside what is listed, 71.92 GiB are activations" in text
    assert advice(plan, plan.placement.fit) == [
        "--config.execution.remat=full",
        "--devices=512 --config.training.micro_batch_size=512",
    ]
    by_topology = dataclasses.replace(plan, by_topology=True)
    assert advice(by_topology, plan.placement.fit)[1] == "--topology=v5p:512 --config.training.micro_batch_size=512"
    values = json.loads(json.dumps(record(plan)))
    assert values["does_fit"] is False
    assert values["mesh"] == {"pipe": 1, "data": 4, "context": 1, "node": 8, "expert": 8, "tensor": 1}


def test_a_person_reads_that_a_step_fits():
    plan = plan_of_v3(memory.StepMemory(total=48 * 2**30, arguments=20 * 2**30, temporaries=28 * 2**30, seconds=9.0))
    assert record(plan)["does_fit"]
    assert "It fits: 50% of the memory." in lines(plan)
    assert "compiled in 9 s" in "\n".join(lines(plan))


def assigned(total, capacity=None):
    step = memory.StepMemory(total, 20 * 2**30, total - 20 * 2**30, capacity=capacity, source="assigned", seconds=9.0)
    return plan_of_v3(step)


def test_an_assignment_is_not_called_compiled_and_its_verdict_keeps_the_caveat():
    plan = assigned(48 * 2**30)
    assert "It fits: 50% of the memory by its buffer assignment; code and some scratch memory come on top." in lines(
        plan
    )
    text = "\n".join(lines(plan))
    assert "48.00 GiB  assigned in 9 s; code and some scratch memory come on top" in text and "compiled" not in text
    assert record(plan)["step_memory"]["source"] == "assigned"


def test_a_step_that_is_larger_by_its_assignment_does_not_fit():
    chip = chips.CHIPS["v5p"]
    plan = assigned(int(1.3 * chip.memory), chip.memory)
    told = "\n".join(lines(plan))
    assert (
        "It does not fit by its buffer assignment, 130% of the memory, which the compiler had not refused yet" in told
    )
    assert "It fits" not in told and record(plan)["does_fit"] is False


def test_the_update_of_an_average_may_be_what_does_not_fit():
    plan = assigned(48 * 2**30)
    plan = dataclasses.replace(plan, placement=dataclasses.replace(plan.placement, update=96 * 2**30))
    told = "\n".join(lines(plan))
    assert "It does not fit: the update of the average, between two steps, needs 96.00 GiB" in told
    assert "It fits" not in told and record(plan)["does_fit"] is False


def test_a_card_is_computed_and_says_so():
    tree = v3_5b.get_config()
    tree.execution.precision = "bf16"
    config, card = from_config_dict(tree), chips.find_chip("h100")
    plan = make_plan(config, chip=card)
    assert plan.placement.fit.num_devices == 2  # as docs/memory.md has it
    assert "does_fit" not in record(plan)
    assert "It fits: that is" in lines(plan)[-3] and "at most 80% may be state" in lines(plan)[-3]
    told = lines(make_plan(config, 1, card))
    assert "It does not fit: that is 85% of the card; at most 80% may be state" in told[-3]
    assert told[-2] == "  less memory, perhaps: --devices=2"


def test_the_advice_is_a_number_of_cards_that_hold_the_state():
    """64 H100s lack the room for V3, and so do 128, which would be the next."""
    told = lines(make_plan(from_config_dict(deepseek_v3.get_config()), 64, chips.find_chip("h100")))
    advised = [line for line in told if "--devices=" in line]
    assert advised == ["  less memory, perhaps: --devices=256 --config.training.micro_batch_size=256"]


def test_a_chip_that_is_too_small_is_told_with_what_would_hold_the_state():
    config = from_config_dict(deepseek_v3.get_config())
    told = lines(make_plan(config, chip=chips.find_chip("h100")))
    assert "h100 is too small" in told[-5] and "no number that works as written (64, 128); at most 80%" in told[-5]
    assert told[-4] == "  --chip=h100 --devices=256 --config.training.micro_batch_size=256"
    assert "; on another neither: use a larger chip" in lines(make_plan(config, chip=chips.find_chip("v5e")))[-1]


def test_chips():
    assert [chips.topology(chips.CHIPS["v5p"], count) for count in (1, 8, 16, 256)] == [
        "v5p:2x2x1",
        "v5p:2x2x2",
        "v5p:4x2x2",
        "v5p:8x8x4",
    ]
    assert chips.topology(chips.CHIPS["tpu7x"], 8) == "tpu7x:2x2x1"
    with pytest.raises(ValueError, match="192 devices fill no torus of v5p .* choose 128 or 256"):
        chips.topology(chips.CHIPS["v5p"], 192)
    with pytest.raises(ValueError, match="512 devices are more than a pod of v6e has: 256 chips"):
        chips.topology(chips.CHIPS["v6e"], 512)
    with pytest.raises(ValueError, match="'v5' is unknown; choose one of v5e, v5p"):
        chips.find_chip("v5")
    with pytest.raises(ValueError, match="h200 is not a TPU"):
        chips.absent_devices(chips.CHIPS["h200"], 8)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="libtpu.*not installed.*pip install"):
        chips.prepare()


def test_a_long_compilation_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr("deepseek_jax.plan.run.SECONDS_BETWEEN_SIGNS", 0.01)
    said = []
    with signs_of_life("compiling", said.append):
        while len(said) < 3:
            pass
    assert said[0].startswith("compiling ...") and said[-1].endswith(" s")
