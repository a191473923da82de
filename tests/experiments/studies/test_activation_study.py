"""`experiments.studies.activation_study`: its errors, records and drawing."""

import numpy as np
import pytest

from experiments.studies import activation_study
from tests.experiments.studies.taken import taken


def test_a_known_error_is_found():
    want = np.array([3.0, 4.0])
    found = activation_study._compare(want * 1.01, want)
    assert found == pytest.approx(
        {"value": 1.0, "cosine": 1.0, "slope": 1.01, "mean_error": 0.035 * np.sqrt(2) / 5 * 100}
    )


@pytest.mark.slow
def test_records_and_drawing():
    points = activation_study.measure(taken()[1][0])
    assert [point["op"] for point in points] == list(activation_study.PRODUCTS)
    batches = activation_study.medians(points)
    assert [record["value"] for record in batches] == [point["value"] for point in points[1:]]
    assert len(activation_study.draw(points, batches).axes) == 2
