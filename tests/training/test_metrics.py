"""The metrics file: documented keys, strict JSON, and the same lines after an interruption as without one."""

import json
import math
import os
import struct
from contextlib import closing
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.training import metrics
from deepseek_jax.training.metrics import KEYS, MetricsLog, Speedometer, eval_row, read_rows, train_row
from deepseek_jax.training.optimizer import Rates

CONFIG = from_config_dict(tiny.get_config()).with_(model={"num_layers": 2})  # "layer 1" and "MTP 1" have a router
RATES = Rates(learning_rate=np.float32(1e-3), mtp_weight=np.float32(0.3), bias_update_rate=np.float32(1e-3))


def step_metrics(loss: float) -> dict[str, np.ndarray]:
    """What `train_step` returns for two routed layers of four experts, on the host."""
    scalars = ("balance_loss", "z_loss", "grad_norm", "update_norm", "param_norm")
    counts = ("nonfinite", "skipped", "dead_experts", "tokens")
    layers = ("max_vio_L", "max_vio_sequence_L", "bias_min_L", "bias_max_L")
    return (
        {
            "loss": np.float32(loss),
            "mtp_loss": np.float32([loss]),
            "counts_LE": np.arange(8, dtype=np.int32).reshape(2, 4),
        }
        | {name: np.float32(0.5) for name in scalars}
        | {name: np.int32(0) for name in counts}
        | {name: np.float32([0.1, 0.2]) for name in layers}
    )


def write(workdir, start: int, stop: int) -> None:
    log = MetricsLog(workdir, start, CONFIG)
    for step in range(start + 1, stop + 1):
        log.write({"step": step, "tokens_seen": 100 * step} | train_row(step_metrics(1.0 / step), RATES))
        if step % 2 == 0:
            log.write({"step": step, "tokens_seen": 100 * step} | eval_row(2.0, [2.0], 1.5, [0.1, 0.1]))
    log.close()


def test_every_key_is_documented_and_every_documented_key_written():
    speed = Speedometer(1e9, jax.devices())
    speed.count(10)
    evaluation = eval_row(1.0, [1.0], 1.0, [0.0], [1.0, None])
    written = train_row(step_metrics(1.0), RATES).keys() | evaluation.keys() | speed.row().keys()
    by_others = {"step", "tokens_seen", "speed/mfu", "speed/compile_seconds"} | {
        key for key in KEYS if key.startswith("yardstick/")
    }
    assert written | by_others == KEYS.keys()
    assert not written & by_others


def test_an_undocumented_key_is_refused(tmp_path):
    with closing(MetricsLog(tmp_path, 0, CONFIG)) as log, pytest.raises(AssertionError, match="undocumented"):
        log.write({"step": 1, "loss": 1.0})


def test_lines_are_strict_json_and_nothing_is_rounded(tmp_path):
    loss = np.float32(0.1)
    with closing(MetricsLog(tmp_path, 0, CONFIG)) as log:
        log.write(
            {"step": 1, "tokens_seen": 2**60 + 1}
            | train_row(step_metrics(loss) | {"grad_norm": np.float32(np.nan)}, RATES)
        )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["tokens_seen"] == 2**60 + 1
    assert np.float32(row["train/loss"]) == loss
    assert row["train/perplexity"] == pytest.approx(math.exp(0.1))
    assert row["optimizer/grad_norm"] is None
    assert row["router/load"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_huge_loss_has_no_perplexity(tmp_path):
    assert train_row(step_metrics(1e4), RATES)["train/perplexity"] == math.inf


def test_continuing_gives_the_lines_of_an_uninterrupted_run(tmp_path):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for folder in (whole, interrupted):
        folder.mkdir()
    write(whole, 0, 9)
    write(interrupted, 0, 7)  # the checkpoint was of step 4, lines up to 7 had been written,
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # and the kill cut off the next
    write(interrupted, 4, 9)
    assert read_rows(interrupted) == read_rows(whole)
    assert (interrupted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_broken_line_inside_is_named(tmp_path):
    write(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2', '{"step" 2', 1))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        MetricsLog(tmp_path, 3, CONFIG)


BAD_METRICS = {
    "line 1 is not JSON": b'{"step": 1, "train/loss": "\xe9"}\n',
    "line 2 is not JSON": b'{"step": 1, "tokens_seen": 1}\n' + b"[" * 200_000 + b"\n",
    "line 1 has no step": b'{"tokens_seen": 1}\n',
    "line 1 has no tokens_seen": b'{"step": 1, "tokens_seen": null}\n',
    "line 2 has no step": b'{"step": 1, "tokens_seen": 1}\n[1]\n',
    "line 3 has no step": b'{"step": 1, "tokens_seen": 1}\n' * 2 + b'{"step": "3", "tokens_seen": 1}\n',
    "is a folder": None,
    "is a FIFO": os.mkfifo,
}


@pytest.mark.parametrize("message", BAD_METRICS)
def test_damaged_metrics_are_refused_and_kept(tmp_path, message):
    path, content = tmp_path / "metrics.jsonl", BAD_METRICS[message]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (content or os.mkdir)(path)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl.*{message}"):
        MetricsLog(tmp_path, 3, CONFIG)
    assert not isinstance(content, bytes) or path.read_bytes() == content


def test_a_full_disk_is_a_clear_error(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(tmp_path, 0, CONFIG)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="metrics.jsonl .*failed.*ulimit -f"):
            log.write({"step": 1, "tokens_seen": 1} | train_row(step_metrics(1.0), RATES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close()


def read_events(workdir) -> list[Event]:
    """Every event of a workdir: records are length, checksum, event, checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (size,) = struct.unpack_from("<Q", content, offset)
            events.append(Event.FromString(content[offset + 12 : offset + 12 + size]))
            offset += 12 + size + 4
    return events


def test_tensorboard_gets_a_curve_per_layer_and_drops_what_was_repeated(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 2, 4)
    curve, starts = [], []
    for event in read_events(tmp_path):
        values = {value.tag: value.simple_value for value in event.summary.value}
        if "train/loss" in values:
            curve.append((event.step, values["train/loss"]))
            assert values["router/max_vio/layer_1"] == np.float32(0.1)
            assert values["router/max_vio/MTP_1"] == np.float32(0.2)
            assert values["train/mtp_loss/depth_1"] == values["train/loss"]
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
    assert [step for step, _ in curve] == [1, 2, 3, 3, 4] and curve[2] == curve[3]
    assert starts == [1, 3]  # a reader drops the first file's step 3


def test_events_survive_a_kill_after_a_flush(tmp_path):
    log = MetricsLog(tmp_path, 0, CONFIG)
    log.write({"step": 1, "tokens_seen": 1} | train_row(step_metrics(1.0), RATES))
    log.flush()
    assert b"train/loss" in next((tmp_path / "tensorboard").iterdir()).read_bytes()
    log.close()


def test_speed_counts_training_time_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    speed = Speedometer(flops_per_token=2e9, devices=jax.devices()[:1])
    for _ in range(2):
        now[0] += 0.5
        speed.count(1000)
        with speed.paused():
            now[0] += 100.0
    row = speed.row()
    assert row == {"speed/tokens_per_second": 2000.0, "speed/step_seconds": 0.5, "speed/teraflops": 4.0}
    now[0] += 2.0
    speed.count(1000)
    assert speed.row()["speed/tokens_per_second"] == 500.0


def test_utilisation_is_measured_against_all_devices(monkeypatch):
    class Card:
        device_kind = "NVIDIA H200"  # 989 TFLOP/s

    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    speed = Speedometer(flops_per_token=1e12, devices=[Card(), Card()])
    now[0] = 1.0
    speed.count(1000)
    assert speed.row()["speed/mfu"] == pytest.approx(1000 / (2 * 989))
