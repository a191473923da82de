"""Time of a step: bubbles are the report's, predictions stay near what is known, the search's choice is the fastest."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import check_fit
from deepseek_jax.pipeline.schedules import SCHEDULES
from deepseek_jax.plan import bubble, calibration, estimate, search, timing
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.counts import state_of
from deepseek_jax.plan.liveness import Living
from deepseek_jax.plan.meshes import require_fit
from experiments.benchmarks import plan_calibration
from tests.support import small

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("schedule", "stages", "micro_batches", "idle"),
    [
        ("1f1b", 16, 32, 45),
        ("gpipe", 16, 32, 45),
        ("zb1p", 16, 32, 15),
        ("dualpipe", 16, 32, 14),
        ("dualpipe", 8, 20, 6),
    ],
)
def test_schedules_wait_as_the_reports_table_says(schedule, stages, micro_batches, idle):
    """DeepSeek-V3, table 2, with F = B = W = 1 and F&B = F + B + W; B of the table is B + W here."""
    assert bubble.waiting(schedule, stages, micro_batches, bubble.Stage(1, 1, 1, 3)).seconds == idle


def test_chunks_divide_the_wait_and_dualpipe_pairs_most():
    stage = bubble.Stage(1.0, 1.0, 1.0, 3.0)
    plain, chunked = (bubble.waiting("interleaved", 8, 128, stage, n).seconds for n in (2, 4))
    assert (plain, chunked) == (pytest.approx(10.5), pytest.approx(5.25))
    assert 97 <= 120 - bubble.waiting("dualpipe", 16, 120, stage).apart <= 103


def test_bad_schedules_are_refused():
    stage = bubble.Stage(1, 1, 1, 3)
    with pytest.raises(ValueError, match="there is no schedule '2f2b'"):
        bubble.waiting("2f2b", 2, 4, stage)
    with pytest.raises(ValueError, match="4 stages need a schedule"):
        bubble.waiting("none", 4, 4, stage)


def test_the_table_of_calibration_is_what_the_code_gives_and_each_miss_has_its_reason():
    rows = plan_calibration.rows()
    assert plan_calibration.table(rows) in (ROOT / "docs" / "planning.md").read_text()
    for row in rows:
        assert abs(row.off) <= calibration.CLOSE or row.reason, row.name
        assert abs(row.off) < 0.4, row.name
    ours = rows[len(calibration.RUNS) :]
    assert all(-0.18 < row.off < 0 for row in ours)


def test_our_own_times_are_those_of_the_records():
    """The median over all records of a layout; those of before `gather` was recorded have the config's."""
    for own in calibration.OWN:
        records = json.loads((ROOT / "experiments" / "results" / own.record).read_text())
        split = {axis: size for axis, size in own.mesh.items() if size > 1}
        found = [
            r["value"] / 1e3
            for r in records
            if r["mode"] == "train step, median"
            and r["precision"] == own.execution["precision"]
            and r.get("mesh", {}) == split
            and r.get("order", "the plain order") == "the plain order"
            and r.get("gather", "step") == own.execution.get("gather", "step")
            and r.get("schedule") == own.execution.get("schedule")
            and own.micro_batches * r["shape"].get("micro_batch_size", own.batch) == own.batch
            and r["shape"].get("layers", 0) == own.layers
        ]
        assert statistics.median(found) == pytest.approx(own.seconds, rel=2e-3), own.name


def test_the_pauses_that_rows_tell_are_those_of_the_records():
    """In whole ms, one record each."""
    records = json.loads((ROOT / "experiments" / "results" / calibration.SCHEDULES).read_text())
    found = [r for r in records if r["mode"] == "pauses of a traced step"]
    pauses = {(r.get("schedule", ""), r["precision"]): round(r["value"]) for r in found}
    told = {
        (schedule, precision): round(1e3 * seconds)
        for schedule, of in calibration.SHORT_STEPS.items()
        for precision, (_, seconds) in of.items()
    }
    assert pauses == told and len(found) == len(told)


def on(devices, chip="h200", **changes):
    """The predicted step of the small model."""
    tree = small.config_dict()
    tree.mesh.update({"data": -1, "node": 1, "expert": min(devices, 4)})
    config = from_config_dict(tree).with_(**changes)
    fit = require_fit(config, devices)
    layout = timing.layout_of(fit.config, fit.mesh, state_of(config), CHIPS[chip])
    return fit.config, layout, timing.step_time(fit.config, layout, CHIPS[chip])


def test_what_is_hidden_costs_no_more_and_slower_links_cost_more():
    config, layout, alone = on(8)
    hidden = timing.step_time(config, dataclasses.replace(layout, hides=("exchange", "weights")), CHIPS["h200"])
    assert hidden.total < alone.total
    assert hidden.travel == alone.travel == pytest.approx(alone.exchange + alone.other)
    slow = dataclasses.replace(CHIPS["h200"], link_in=CHIPS["h200"].link_in / 2)
    assert timing.step_time(config, layout, slow).travel == pytest.approx(2 * alone.travel)


def test_half_the_work_a_device_takes_half_the_time():
    """And a little more: experts get fewer rows, of which tiles waste more."""
    _, _, four = on(4, execution={"precision": "bf16"})
    _, _, eight = on(8, execution={"precision": "bf16"})
    assert four.forward / 2 < eight.forward < 1.03 * four.forward / 2


def test_a_search_takes_the_fastest_that_fits(monkeypatch):
    """Memory is 1 GB a sequence, or half with full recomputation: on a card of 3 GB only small micro-batches fit."""

    def living(config, mesh):
        sequences = config.training.micro_batch_size // mesh.size
        return Living(int(1e9) * sequences // (2 if config.execution.remat == "full" else 1), 10**6)

    monkeypatch.setattr(estimate, "living", living)
    monkeypatch.setattr(search, "MOST_MICRO_BATCHES", 16)
    tree = small.config_dict()
    tree.mesh.update({"data": -1, "node": 1, "expert": 1})
    tree.training.batch_size = (("constant", 1.0, 128),)
    config = from_config_dict(tree)
    chip = dataclasses.replace(CHIPS["h200"], memory=int(4.5e9))
    said = []
    found = search.search(config, 8, chip, state_of(config), said.append)
    assert [choice.time.total for choice in found] == sorted(choice.time.total for choice in found)
    flat = [c.fit.config for c in found if c.fit.mesh.shape["pipe"] == 1]
    sizes = {(config.execution.remat, config.training.micro_batch_size) for config in flat}
    assert sizes == {("selective", 8), ("selective", 16), ("selective", 32), *(("full", n) for n in (8, 16, 32, 64))}
    assert len(said) == 5  # of each recomputation one sequence; two and eight of "full"; one with MTP
    tables = {(c.fit.mesh.shape["pipe"], c.fit.config.execution.schedule) for c in found} - {(1, "1f1b")}
    assert {name for _, name in tables} == set(SCHEDULES)
    for choice in found:
        check_fit(choice.fit.config, choice.fit.mesh)
    tight = dataclasses.replace(chip, memory=int(0.4e9))
    with pytest.raises(ValueError, match="nothing fits on 8 h200: the least is 1 of 0 GB"):
        search.search(config, 8, tight, state_of(config), said.append)
