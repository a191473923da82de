"""The report of a complete run never fails it: each part that cannot be made is a line."""

import json
import types

import jax
import numpy as np
import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.data.bpe import byte_tokenizer
from deepseek_jax.evaluation import report as module
from deepseek_jax.evaluation.report import first_words, report, sample
from deepseek_jax.training.curves import final_table
from deepseek_jax.training.sheet import draw_sheet
from tests.training.nano import get_config

pytestmark = pytest.mark.xdist_group("evaluation")  # what one worker made or compiled, its other tests use

PARTS = ("add_yardsticks", "Checkpoints", "draw_sheet", "final_table", "open_corpus", "sample")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"\n\n  Of the number {number} much is said, and more is not. " * 20)
    return folder


@pytest.fixture
def config(corpus):
    return from_config_dict(get_config(str(corpus)))


@pytest.fixture
def result():
    state = {"params": {"table": np.ones(4)}, "router_bias": {}}
    return types.SimpleNamespace(state=state, step=2, tokens_seen=512, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("error", [ValueError("too short\nand more"), ZeroDivisionError(), StopIteration()])
def test_whatever_fails_in_a_report_is_a_line(config, result, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    for part in PARTS:
        monkeypatch.setattr(module, part, fail)
    said = []
    report(config, tmp_path, result, "", said.append)
    reason = "too short" if str(error) else type(error).__name__
    assert said == [
        f"the run is complete and saved; its {part} cannot be made: {reason}"
        for part in ("yardsticks", "list of checkpoints", "sheet of curves", "final table", "sample")
    ]


def test_ctrl_c_in_a_report_is_not_a_line(config, result, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "add_yardsticks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(config, tmp_path, result, "", print)


def write_rows(workdir, *rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(text):
    return " ".join(text.split())


def evaluation(step, bits):
    return {"step": step, "tokens_seen": 256 * step, "eval/loss": bits, "eval/bits_per_byte": bits}


def test_a_table_without_training_lines(tmp_path):
    """`training.log_every` beyond the last step."""
    write_rows(tmp_path, evaluation(0, 8.0), evaluation(2, 7.5))
    table = words(final_table(tmp_path, "abc", [2]))
    assert "held-out bits per byte, after 7.500 bigram" in table
    assert "tokens/s (median) not measured step time (median), compile time not measured" in table


def training(step):
    row = {"step": step, "tokens_seen": 256 * step, "train/loss": None, "train/mtp_loss": [None]}
    row |= {"speed/tokens_per_second": 1e3, "speed/step_seconds": 0.1, "speed/compile_seconds": 2.0}
    row |= dict.fromkeys(("optimizer/learning_rate", "optimizer/bias_update_rate", "optimizer/grad_norm"), None)
    row |= {f"router/{key}": [None] * 4 for key in ("max_vio", "max_vio_sequence", "bias_min", "bias_max")}
    return row | {"router/load": [[1, 2]] * 4}


def test_a_table_and_a_sheet_of_values_that_are_not_finite(tmp_path):
    """They are null in the metrics; the run itself went on."""
    write_rows(tmp_path, evaluation(0, None), training(1), training(2), evaluation(2, None))
    assert "held-out bits per byte, after not measured" in words(final_table(tmp_path, "abc", [2]))
    tiny_config = from_config_dict(tiny.get_config())
    assert draw_sheet(tiny_config, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_prompt_is_the_beginning_of_a_held_out_document(config, result, tmp_path, corpus):
    config = config.with_(data={"sequence_length": 128})
    prompt = first_words(config, result.tokenizer, tmp_path)
    assert prompt.startswith("Of the number ") and prompt.endswith(" much")
    assert len(first_words(config.with_(data={"sequence_length": 32}), result.tokenizer, tmp_path).encode()) <= 8


def test_a_context_without_room_for_a_sample_is_named(config, result, tmp_path):
    config = config.with_(data={"sequence_length": 1})
    with pytest.raises(ValueError, match="data.sequence_length = 1 has no room"):
        sample(config, tmp_path, result)


def test_of_several_processes_a_sample_is_a_command(config, result, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("deepseek_jax.evaluation.report.first_words", lambda *_: "of\n  the\nnumber")
    *_, command = sample(config, tmp_path, result).splitlines()
    assert command.startswith("python -m experiments.generate --workdir=")
    assert command.endswith("'--prompt=of the number'")
