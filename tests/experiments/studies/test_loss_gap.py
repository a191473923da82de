"""`experiments.studies.loss_gap`: what it calls a gap is one, and what it writes is complete."""

import csv
import json

import numpy as np
import pytest

from configs import v3_300m
from deepseek_jax.config import from_config_dict
from experiments.studies import loss_gap


def test_smoothing_starts_at_the_first_loss():
    np.testing.assert_allclose(loss_gap.smooth(np.full(50, 3.0)), 3.0)
    np.testing.assert_allclose(loss_gap.smooth(np.array([1.0, 2.0])), [1.0, (0.9 * 0.1 + 0.2) / 0.19])


def test_a_known_gap_is_found():
    """0.5% above for good, and twice that before step 10: the warm-up hides the second, the mean has a sign."""
    yardstick = np.linspace(8.0, 4.0, 400)
    losses = yardstick * np.where(np.arange(400) < 10, 0.99, 0.995)
    gap, largest, mean = loss_gap.gaps(losses, yardstick, warmup_steps=200)
    assert gap[0] == pytest.approx(-1.0)
    assert largest == pytest.approx(0.5, abs=1e-3) and mean == pytest.approx(-0.5)


def test_losses_records_and_drawing(tmp_path):
    config = from_config_dict(v3_300m.get_config())
    rng = np.random.default_rng(0)
    losses = {(seed, arm): 5 + 0.1 * rng.random(300) for seed in (0, 1) for arm in loss_gap.ARMS}
    del losses[1, "fp8"]  # the second seed is on its way
    loss_gap.write(tmp_path, config, "1 x cpu", losses)
    records = json.loads((tmp_path / "loss_gap.json").read_text())
    assert [record["mode"].split(", ")[:2] for record in records] == [
        ["seed 0", f"{arm} against bf16"] for arm in ("bf16 noise", "fp8") for _ in range(2)
    ]
    with (tmp_path / "loss_gap.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 301 and rows[0] == ["step", *(f"seed {seed}, {arm}" for seed, arm in losses)]
    assert (tmp_path / "loss_gap.png").read_bytes().startswith(b"\x89PNG")
