"""docs/pipeline.md has the table that `experiments.benchmarks.pipeline_table` makes of the records."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import pipeline_table as made


def records(schedule, losses, rate, idle=()):
    shape = {"batch": 8, "micro_batch_size": 1, "layers": 4}
    values = {made.SPEED: rate, made.LOSSES: losses} | dict(idle)
    one = {"precision": "bf16", "shape": shape} | ({"schedule": schedule} if schedule else {})
    return [one | {"mode": mode, "value": value} for mode, value in values.items()]


def test_a_row_has_both_sides_of_the_idle_time():
    """gpipe of eight micro-batches on two equal stages idles a ninth; with a head and a dense layer more."""
    found = made.rows([*records("", [9.0, 8.0], 100.0), *records("gpipe", [9.0, 8.001], 150.0, {made.IDLE: 0.2})])
    (row,) = found
    assert row.idle["table"] == pytest.approx(1 / 9) and row.idle["measured"] == 0.2
    assert row.idle["plan"] > row.idle["table"] and row.apart == pytest.approx(1e-3)
    assert made.table(found).splitlines()[-1].startswith("| BF16 | gpipe | 150 | 1.50 | 11.1% | ")


def test_docs_have_the_table_and_the_plan_is_near_what_was_measured():
    """0.3 to 6 points off; interleaved, whose pauses between kernels count as work in what was measured, the most."""
    page = (Path(__file__).parents[3] / "docs" / "pipeline.md").read_text()
    rows = made.rows(json.loads(made.RECORDS.read_text()))
    assert made.table(rows) in page
    for row in rows:
        assert abs(row.idle["plan"] - row.idle["measured"]) < (0.065 if row.schedule == "interleaved" else 0.035), row
