"""A model without experts, all layers dense: a baseline that trains, is evaluated, decodes and converts like others."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.huggingface.contents import check
from deepseek_jax.huggingface.load import load
from deepseek_jax.huggingface.save import save
from deepseek_jax.inference import generate
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.safetensors.folder import Shards
from deepseek_jax.training import metrics
from deepseek_jax.training import step as step_lib
from deepseek_jax.training.objective import pretraining
from deepseek_jax.training.sheet import draw_sheet
from deepseek_jax.training.state import create_state, weights_of
from tests.support import small
from tests.support.checkpoints import hashes

CONFIG = small.config().with_(
    model={"num_layers": 1, "num_dense_layers": 1, "num_mtp_layers": 0, "vocab_size": 64, "dense_hidden": 64},
    loss={"batch_balance_weight": 1.0},  # of no router
    training={"batch_size": (("constant", 1.0, 8),), "micro_batch_size": 4},
)

SPEED = {"speed/tokens_per_second": 1.0, "speed/step_seconds": 1.0, "speed/teraflops": 1.0}


@functools.cache
def trained():
    """The mesh, the state after one step, its metrics and the sums of evaluation."""
    mesh, objective = make_mesh(CONFIG.mesh, jax.devices()[:1]), pretraining(CONFIG)
    with jax.set_mesh(mesh):
        batch = small.put(small.batch(rows=8, length=32, vocab=64))
        before = create_state(CONFIG)
        sums = step_lib.jit_eval_step(CONFIG, objective, mesh)(weights_of(before), batch)
        state, row = step_lib.jit_train_step(CONFIG, objective, mesh)(before, batch, small.RATES)
    return mesh, state, jax.device_get(row), jax.device_get(sums)


def test_it_trains_and_is_evaluated():
    _, state, row, sums = trained()
    assert "moe_layers" not in state["params"] and not state["router_bias"]
    assert int(state["step"]) == 1 and not row["nonfinite"] and row["update_norm"] > 0
    np.testing.assert_allclose(sums["loss_sum"] / sums["weight_sum"], row["loss"], rtol=1e-6)
    assert row["balance_loss"] == 0.0 and row["dead_experts"] == 0
    assert sums["counts_LE"].shape == row["counts_LE"].shape == (0, CONFIG.model.num_experts)


def test_its_metrics_are_written_and_drawn(tmp_path):
    row = trained()[2]
    log = metrics.MetricsLog(tmp_path, 0, CONFIG)
    for step in (1, 2):
        log.write({"step": step, "tokens_seen": 128 * step} | metrics.train_row(row, small.RATES) | SPEED)
    log.close()
    assert metrics.read_rows(tmp_path)[0]["router/load"] == []
    assert draw_sheet(CONFIG, tmp_path).stat().st_size > 5_000


@pytest.mark.slow
def test_it_decodes_and_converts(tmp_path):
    mesh, state, *_ = trained()
    weights = weights_of(state)
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)
    tokens = np.concatenate(list(generate.stream_ids(CONFIG, weights, np.ones((1, 3), np.int32), 4, greedy, 0, -1)), 1)
    assert tokens.shape == (1, 4) and (tokens < 64).all()
    save(weights, CONFIG.model, tmp_path / "hf", fp8=False)
    shards = Shards(tmp_path / "hf")
    check(shards, CONFIG.model, fp8=False)
    save(load(shards, CONFIG, mesh, "fp32"), CONFIG.model, tmp_path / "back", fp8=False)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
