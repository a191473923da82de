"""An evaluation of several sources: each alone, and the mean by weight; and how it is written and printed."""

import json

import jax
import numpy as np
import pytest

from deepseek_jax.config import Source, from_config_dict
from deepseek_jax.data.heldout import heldout_batches
from deepseek_jax.data.pipeline import open_tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.curves import final_table
from deepseek_jax.training.evaluation import evaluate
from deepseek_jax.training.metrics import eval_row
from deepseek_jax.training.pretrain import held_out_row
from tests.training.nano import get_config


@pytest.fixture
def config(tmp_path):
    """Three sources: few documents of "a", many of "b", and one of "c"."""
    for letter, count in (("a", 20), ("b", 400), ("c", 1)):
        (tmp_path / letter).mkdir()
        for i in range(count):
            (tmp_path / letter / f"{i}.txt").write_text(letter * (100 + i))
    config = from_config_dict(get_config("stdlib"))
    weights = {"a": 3.0, "b": 1.0, "c": 4.0}
    sources = tuple(Source(path=str(tmp_path / letter), weight=weight) for letter, weight in weights.items())
    return config.with_(data={"sources": sources})


def step_of_letters(weights, batch):
    """A model that knows "a" to 1 nat and "b" to 3 nats per target, and sends "a" to expert 0 and "b" to expert 1."""
    kept = np.asarray(batch["loss_weights_BS"])
    is_b = (np.asarray(batch["targets_BS"])[kept > 0] == 6 + ord("b")).any()
    return {
        "loss_sum": jax.numpy.float32(kept.sum() * (3 if is_b else 1)),
        "weight_sum": jax.numpy.float32(kept.sum()),
        "mtp_loss_sum": jax.numpy.float32([kept.sum() * (5 if is_b else 2)]),
        "counts_LE": jax.numpy.int32([[4 * (not is_b), 4 * is_b]]),
    }


def test_sources_are_measured_alone_and_averaged_by_weight(config, tmp_path):
    held_out = heldout_batches(config, open_tokenizer(config, tmp_path / "run"), tmp_path / "run", 8)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    result = evaluate(step_of_letters, None, held_out, mesh)
    bits = [
        nats * part.num_tokens / np.log(2) / part.num_bytes for nats, part in zip((1, 3), held_out.parts, strict=False)
    ]
    assert result.source_bits_per_byte == [pytest.approx(bits[0]), pytest.approx(bits[1]), None]
    assert result.bits_per_byte == pytest.approx(0.75 * bits[0] + 0.25 * bits[1])
    assert result.loss == pytest.approx(1.5) and result.mtp_loss == pytest.approx([2.75])
    assert result.counts_LE.tolist() == [[4 * len(held_out.parts[0]), 4 * len(held_out.parts[1])]]
    assert (
        held_out_row(step_of_letters, held_out, mesh, None)["eval/source_bits_per_byte"] == result.source_bits_per_byte
    )


def test_one_source_has_the_same_figures_as_ever(config, tmp_path):
    one = config.with_(data={"sources": config.data.sources[1:2]})
    held_out = heldout_batches(one, open_tokenizer(one, tmp_path / "run"), tmp_path / "run", 8)
    result = evaluate(step_of_letters, None, held_out, make_mesh(config.mesh, jax.devices()[:1]))
    assert result.bits_per_byte == float(np.float64(3 * held_out.num_tokens) / np.log(2.0) / held_out.num_bytes)
    assert "eval/source_bits_per_byte" not in eval_row(1.0, [], result.bits_per_byte, [], result.source_bits_per_byte)


def test_the_final_table_has_a_line_for_each_source(config, tmp_path):
    training = {"train/loss": 1.0, "speed/tokens_per_second": 1.0, "speed/step_seconds": 1.0}
    yardsticks = {
        f"yardstick/{name}_bits_per_byte": 2.0 for name in ("bigram", "gzip_pieces", "gzip_files", "xz_files")
    }
    rows = [training, eval_row(1.0, [], 1.5, [], [1.25, 2.25, None]), yardsticks]
    lines = [json.dumps({"step": 1, "tokens_seen": 1} | row) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    table = final_table(tmp_path, "0" * 64, [1], config.data.sources).splitlines()
    (after,) = (i for i, line in enumerate(table) if line.startswith("held-out bits per byte, after"))
    assert [line.split()[1:] for line in table[after + 1 : after + 4]] == [
        ["(0.375)", "1.250"],
        ["(0.125)", "2.250"],
        ["(0.5)", "nothing", "held", "out"],
    ]
    assert any(line.startswith("  gzip -9 of each document ") for line in table)
