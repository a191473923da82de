"""The command `experiments.benchmarks.training_step`: its records are complete and agree with each other."""

import re

import numpy as np
import pytest

from experiments.benchmarks import batches
from tests.experiments.benchmarks import command
from tests.parallel.test_context import fake_mesh
from tests.support import small

SMALL = {
    "model": {
        "vocab_size": 300,
        "width": 32,
        "num_layers": 1,
        "num_dense_layers": 0,
        "num_heads": 2,
        "dense_hidden": 32,
        "expert_hidden": 16,
        "num_mtp_layers": 0,
    },
    "data": {"sequence_length": 32, "tokenizer": "byte"},
    "execution": {"expert_block": 8, "scan_unroll": 1},
}


def test_the_batches_of_several_processes_are_those_of_one():
    """Processes that share rows (`context`, `pipe`) read the same ones; the others read different ones."""
    config = small.config()
    whole = batches.random_batches(config, 8)
    parts = [batches.random_batches(config, 8, index, 4) for index in range(4)]
    for _ in range(2):
        batch, shares = next(whole), [next(part) for part in parts]
        for name, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), rows)
    assert len(np.unique(batch["tokens_BS"][:, 0])) > 6


@pytest.mark.parametrize(("sizes", "part"), [((2, 1, 1, 1, 2, 1), 1), ((1, 1, 2, 1, 2, 1), 1), ((1, 2, 1, 1, 2, 1), 2)])
def test_processes_that_share_rows_read_the_same(sizes, part):
    """The first of two processes: along `pipe` and `context` it has all rows, along `data` half of them."""
    batch = next(batches.batches_on(fake_mesh(sizes, (0, 0, 1, 1)), None, small.config(), 8))
    whole = next(batches.random_batches(small.config(), 8))
    np.testing.assert_array_equal(batch["tokens_BS"], whole["tokens_BS"][: 8 // part])


@pytest.mark.slow
def test_records_of_a_small_model(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"text number {i}\n" * 50)
    results = tmp_path / "results" / "step.json"
    overrides = [
        f"--config.{section}.{key}={value}" for section, values in SMALL.items() for key, value in values.items()
    ]
    overrides.append(f"--config.data.sources=({{'path': '{corpus}', 'weight': 1.0}},)")
    arguments = ["--config=configs/tiny.py", *overrides, "--cpu_devices=2", "--batch_size=16"]
    records, printed = command.run("experiments.benchmarks.training_step", arguments, results)
    values = {record["mode"]: record["value"] for record in records}
    assert values["train step"] == pytest.approx(16 * 32 / (values["train step, median"] / 1e3))
    assert values["train step, fastest"] <= values["train step, median"]
    assert values["loss of step 23"] < values["loss of step 1"], "four batches over and over are learnt"
    assert records[0]["shape"] == {"batch": 16, "sequence": 32, "mtp_layers": 0} and records[0]["device"].startswith(
        "2 x cpu"
    )
    assert all(record["mesh"] == {"data": 2} for record in records if record["mode"] != "loader alone")
    each = next(record for record in records if record["mode"] == "train step, per device")
    assert each["value"] == pytest.approx(values["train step"] / 2)
    assert values["scaling"] == pytest.approx(100 * each["value"] / each["yardstick"]["value"])
    line = rf"2 devices: [\d,]+ tokens/s, [\d,]+ per device, {values['scaling']:.1f} % of one device's [\d,]+"
    assert re.search(line, printed)
    loader = next(record for record in records if record["mode"] == "loader alone")
    assert loader["yardstick"]["value"] == values["train step"] and "loader alone" in printed
