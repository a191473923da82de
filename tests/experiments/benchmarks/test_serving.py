"""The command `experiments.benchmarks.serving`, and an engine of this process as its target."""

import asyncio
import subprocess
import sys

import pytest

from deepseek_jax.inference.engine import Engine
from experiments.benchmarks import engine_target, load
from experiments.benchmarks.load import Asked
from tests.experiments.benchmarks import command
from tests.support.fake_batch import FakeBatch


def test_an_engine_of_this_process_is_a_target():
    tokenizer = engine_target.tokenizer_of(262)
    with Engine(FakeBatch(num_positions=256), tokenizer, most_waiting=10) as engine:
        target = engine_target.target(engine, temperature=0.0)
        prompts = [[7, 8, 9], [7] * 100, [7] * 300]
        samples = asyncio.run(load.run(target, [Asked(0.01 * i, p, 5) for i, p in enumerate(prompts)], 10.0))
        assert [sample.tokens for sample in samples] == [5, 5, 0]
        assert all(len(sample.arrivals) == 5 and sample.error is None for sample in samples[:2])
        assert "300" in samples[2].error
        (late,) = asyncio.run(load.run(target, [Asked(0.0, [7], 10**9)], 10.0))
        assert late.error
        assert engine.stats().running == 0


def test_every_id_has_a_word():
    tokenizer = engine_target.tokenizer_of(3000)
    assert tokenizer.vocab_size == 3000 and (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.decode([3, 2999]) == "aaaaaelg"


@pytest.mark.slow
def test_records_of_a_small_model(tmp_path):
    small = {"num_layers": 2, "vocab_size": 600, "num_mtp_layers": 0, "width": 64}
    arguments = ["--config=configs/tiny.py", *(f"--config.model.{key}={value}" for key, value in small.items())]
    arguments += ["--rate=2,10", "--seconds=2", "--prompt_tokens=uniform:5,30", "--output_tokens=8", "--batch_size=4"]
    plot = tmp_path / "load.png"
    records, printed = command.run(
        "experiments.benchmarks.serving", [*arguments, f"--plot={plot}"], tmp_path / "load.json"
    )
    for rate in (2.0, 10.0):
        found = {record["mode"]: record["value"] for record in records if record["shape"]["rate"] == rate}
        assert found["failed"] == 0 and found["requests"] >= 1
        assert found["time to first token, p50"] <= found["time to first token, p95"] <= found["total time, p99"]
    assert plot.read_bytes().startswith(b"\x89PNG") and "goodput" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --url, or --config"),
        (["--url=http://127.0.0.1:9", "--rate=1"], "check the address and the server"),
        (["--url=http://127.0.0.1:9", "--rate=0"], "--rate=0 must be numbers"),
        (["--url=http://127.0.0.1:9", "--output_tokens=x"], "is no distribution of lengths"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message):
    refused = [sys.executable, "-m", "experiments.benchmarks.serving", *arguments]
    done = subprocess.run(refused, cwd=command.ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
