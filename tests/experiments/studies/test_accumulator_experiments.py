"""The commands `experiments.studies.accumulator_study` and `.accumulator_card`, as far as they need no card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.studies import accumulator_card, accumulator_study
from pallas_kernels.accumulator import Accumulator, multiply

ROOT = Path(__file__).parents[3]
POINTS = json.loads((ROOT / "experiments" / "results" / "accumulator" / "accumulator_study.json").read_text())


@pytest.mark.parametrize("case", accumulator_study.CASES, ids=lambda case: case.label)
def test_the_committed_points_are_what_the_study_computes(case):
    of_case = {
        (point["shape"]["k"], point["shape"]["promotion_interval"]): point
        for point in POINTS
        if point["mode"] == case.label
    }
    lengths, intervals = accumulator_study.LENGTHS, accumulator_study.INTERVALS
    assert set(of_case) == {(k, interval) for k in lengths for interval in (None, 128)} | {
        (4096, interval) for interval in intervals
    }
    for k, interval in ((256, None), (1024, 128)):
        assert accumulator_study.relative_error(case, k, interval) == pytest.approx(
            of_case[k, interval]["value"], rel=1e-6
        )
    assert of_case[1024, 128]["yardstick"]["value"] == of_case[1024, None]["value"]


def test_the_drawing_shows_every_point():
    figure = accumulator_study.draw(POINTS, quantisation=3.7)
    over_k, over_interval = figure.axes
    drawn = [
        value
        for axes in (over_k, over_interval)
        for line in axes.lines
        if line.get_marker() == "o"
        for value in line.get_ydata()
    ]
    assert set(drawn) == {point["value"] for point in POINTS}


def test_the_parameters_at_distance_zero_are_named(capsys):
    a, b = (x[:16] for x in accumulator_card.draw("standard_normal", 1024))
    card = Accumulator(14, "floor", None)
    (record,) = accumulator_card.compare("N(0, 1)", a, b, {"pretended card": lambda a, b: multiply(a, b, card)})
    assert record["yardstick"] == {
        "name": "emulated, 14 bits, floor, never promoted",
        "version": None,
        "value": record["value"],
    }
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(record["yardstick"]["name"]))
    assert line.endswith(" 0.0000")


def test_the_card_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.studies.accumulator_card"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2 and "needs a Hopper GPU" in done.stderr
