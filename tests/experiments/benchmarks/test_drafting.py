"""The command `experiments.benchmarks.drafting`: its records belong together."""

import pytest

from tests.experiments.benchmarks import command


@pytest.mark.slow
def test_records_of_a_small_model(tmp_path):
    arguments = [
        "--config=configs/tiny.py",
        "--config.model.num_layers=1",
        "--config.model.num_dense_layers=0",
        "--config.model.vocab_size=300",
    ]
    arguments += ["--batch=1,3", "--context=20", "--steps=6", "--num_drafts=2", "--acceptance=1"]
    records, printed = command.run("experiments.benchmarks.drafting", arguments, tmp_path / "drafting.json")
    for batch in (1, 3):
        found = {record["mode"]: record["value"] for record in records if record["shape"]["batch"] == batch}
        assert found["a: drafts accepted"] == 2
        assert found["speed-up"] == pytest.approx(found["drafting"] / found["plain"])
        assert found["speed-up"] == pytest.approx(3 / (1 + found["c of the step"]))
        assert found["plain"] == pytest.approx(batch / (found["step, plain"] / 1e3))
    assert all(record["shape"]["num_drafts"] == 2 and record["precision"] == "fp32" for record in records)
    assert "batch 3" in printed
