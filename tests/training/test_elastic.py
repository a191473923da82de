"""A run whose devices become fewer: it goes on from its last checkpoint with the same batches, in more parts."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.loop import Trainer
from deepseek_jax.training.pretrain import train
from deepseek_jax.training.record import read_sealed
from tests.training.nano import get_config
from tests.training.runs import metrics_without_times, write_corpus

STEPS, BATCH = 6, 8
STARTS = ((8, 3), (4, 5), (2, STEPS))  # (devices, the step before which some of them are lost)


class Lost(RuntimeError):
    """Devices are gone."""


def start_on(devices: int, corpus: Path, workdir: Path):
    """Train with one sequence of a micro-batch on a device, evaluated on eight; experts would compile three times."""
    tree = get_config(str(corpus))
    tree.model.update({"num_layers": 1, "num_dense_layers": 1, "num_mtp_layers": 0})
    tree.optimizer.warmup_steps = 1
    tree.training.update({"num_tokens": float(STEPS * BATCH * tree.data.sequence_length), "checkpoint_every": 2})
    tree.training.update({"eval_every": 3, "eval_batches": BATCH // devices, "micro_batch_size": devices})
    config = from_config_dict(tree)
    return train(config, workdir, make_mesh(config.mesh, jax.devices()[:devices]))


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(tmp_path, monkeypatch):
    """From eight to four to two: losses and norms to rounding (measured 2e-7), and the same place in the data."""
    corpus, whole, elastic = write_corpus(tmp_path / "corpus"), tmp_path / "whole", tmp_path / "elastic"
    want = start_on(8, corpus, whole)
    take_step = Trainer._take_step
    for devices, end in STARTS:

        def take_or_lose(trainer, end=end):
            if trainer.step == end:
                raise Lost
            take_step(trainer)

        monkeypatch.setattr(Trainer, "_take_step", take_or_lose)
        with contextlib.nullcontext() if end == STEPS else pytest.raises(Lost):
            got = start_on(devices, corpus, elastic)
    assert (got.step, got.tokens_seen) == (want.step, want.tokens_seen) and got.mesh.size == 2

    rows_of_both = [metrics_without_times(workdir) for workdir in (elastic, whole)]
    assert len(rows_of_both[1]) == STEPS + 3
    for mine, other in zip(*rows_of_both, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            np.testing.assert_allclose(mine[key], value, rtol=2e-6, err_msg=f"{other['step']} {key}")
    states = map(jax.device_get, (got.state, want.state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *states)
    positions = [read_sealed(workdir / "checkpoints" / str(STEPS) / "run")["data"] for workdir in (elastic, whole)]
    assert positions[0] == positions[1]
